"""Run all Python snippets of pages, in order, as a reader would: `python run_pages.py PAGE...`.

A snippet finds what its reader has (a model, data, a reward) and what those before it made.
"""

import re
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

import layerrl

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_check = TrainingArguments.__post_init__


def _short(args: Any) -> None:
    """One step and few tokens, whatever the page says."""
    args.max_steps, args.max_completion_length = 1, 4
    args.use_cpu, args.bf16, args.report_to = True, False, "none"
    _check(args)


TrainingArguments.__post_init__ = _short


def reward(completions: list[str], **_: Any) -> list[float]:
    """Differs between the completions of any group."""
    return [float(sum(map(ord, text)) % 17) for text in completions]


def prompts(letters: str) -> Dataset:
    """Rows of what any trainer of a page asks for."""
    rows = [{"prompt": a + b, "chosen": "b", "rejected": "a"} for a in letters for b in letters]
    return Dataset.from_list(rows)


def trained(model: Any, *, layer: int) -> layerrl.LayerMaskedGRPOTrainer:
    """A trainer after a step."""
    args = GRPOConfig(output_dir=f"runs/layer-{layer}")
    shared = {"args": args, "train_dataset": prompts("abc"), "selection": layer}
    trainer = layerrl.LayerMaskedGRPOTrainer(model, reward, **shared)
    trainer.train()
    return trainer


def before(snippet: str) -> dict[str, Any]:
    """What the reader has before a snippet: a model as it was loaded, not as another left it.

    The reward and the data are such that a random model learns, which it does not on a page's own.
    """
    model = AutoModelForCausalLM.from_pretrained(HUB_ID)
    if "stage-1" in snippet:
        for stage, layer in enumerate((3, 5), 1):
            trained(model, layer=layer).save_delta(f"runs/stage-{stage}/delta")
    found = {
        "model": model,
        "config": model.config,
        "reward": reward,
        "data": prompts("abcdefgh"),
        "tokenizer": AutoTokenizer.from_pretrained(HUB_ID),
        "inputs": {"input_ids": torch.tensor([[3, 4, 5]])},
    }
    if "trainer.save_delta" in snippet and "trainer = " not in snippet:
        found["trainer"] = trained(model, layer=10)
    if "layer-14" in snippet:  # beside the delta of layer 10, which the snippets before it made
        other = AutoModelForCausalLM.from_pretrained(HUB_ID)
        trained(other, layer=14).save_delta("runs/layer-14/delta")
    return found


def run(page: Path) -> None:
    """Run a page's snippets; the traceback of one that fails names its line of the page."""
    namespace = {
        "held_out": prompts("ijk"),
        "preferences": prompts("abc"),
        "safes": Dataset.from_list([{"prompt": "a", "code": ["left", "right"]}] * 8),
        "args": GRPOConfig(output_dir="out", per_device_train_batch_size=32),
        "MyTrainer": GRPOTrainer,
    }
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(1))
        if '"user/' in match[1]:
            print(f"{page.name}:{line + 1} needs a hub: tests/unit/test_hub.py has one")
            continue
        print(f"{page.name}:{line + 1}", flush=True)
        namespace |= before(match[1])
        exec(compile("\n" * line + match[1], page, "exec"), namespace)


if __name__ == "__main__":
    assert Path(sys.prefix) in Path(layerrl.__file__).parents, layerrl.__file__
    for name in sys.argv[1:]:
        folder = Path(name).stem
        AutoModelForCausalLM.from_pretrained(HUB_ID).save_pretrained(f"{folder}/path/to/base")
        with chdir(folder):
            run(Path(name))
