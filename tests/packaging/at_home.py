"""What a user does first, where only the wheel and what a notebook needs are.

    python at_home.py

Works in the current folder, which is empty, and takes less than three minutes. Each stage says
what it did, and any failure ends the script.
"""

import json
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

MOST_SECONDS = 180
ROOT = Path(__file__).parents[2]


def command_line() -> None:
    """`layerrl`, as pip has installed it: help, a training, a whole model of it."""
    layerrl = Path(sys.executable).parent / "layerrl"
    words = "--model_name_or_path base --dataset_name text.jsonl --output_dir out --layers 1"
    words += " --max_steps 1 --use_cpu --bf16 false --report_to none"
    for line, said in (
        ("train sft --help", "Train chosen layers with TRL's trainer and options"),
        ("plan base --layers 1", "LoRA+layerrl"),
        (f"train sft {words}", "'train_loss'"),
        ("merge base out/delta merged", ""),
        ("show out/delta", "layer 1 of 2"),
    ):
        ended = subprocess.run(
            [layerrl, *line.split()], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert said in ended.stdout, ended.stdout


def hub() -> None:
    """The delta goes to a hub and comes back."""
    import torch
    from transformers import AutoModelForCausalLM

    from layerrl import load_delta
    from layerrl.delta import push_delta

    spec = spec_from_file_location("hub", ROOT / "tests" / "hub.py")
    sys.modules["hub"] = hubs = module_from_spec(spec)
    spec.loader.exec_module(hubs)
    with hubs.served() as there, hubs.at(there.url, Path("cache"), token=hubs.WRITES):
        push_delta("out/delta", "me/delta")
        model = AutoModelForCausalLM.from_pretrained("base")
        load_delta(model, "me/delta")
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())


def notebook() -> None:
    """The quickstart, on the small model."""
    import nbformat
    from nbclient import NotebookClient

    file = ROOT / "examples" / "notebooks" / "quickstart.ipynb"
    quickstart = nbformat.read(file, as_version=4)
    problems = [{"prompt": a + b, "answer": 1} for a in "abcdef" for b in "abcdef"]
    Path("problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in problems))
    here = Path.cwd()
    changes = {"MODEL": f"{here}/base", "DATA": f"{here}/problems.jsonl", "LAYER": 1, "STEPS": 1}
    [cell] = [c for c in quickstart.cells if "parameters" in c.metadata.get("tags", ())]
    lines = [f"{name} = {value!r}" for name, value in (changes | {"OUTPUT": f"{here}/nb"}).items()]
    cell.source = "\n".join([cell.source, *lines])
    resources = {"metadata": {"path": str(file.parent)}}
    NotebookClient(quickstart, timeout=MOST_SECONDS, resources=resources).execute()
    assert (here / "nb" / "merged" / "model.safetensors").is_file()


STAGES = (command_line, hub, notebook)
"""One after the other, in a folder with `base`, `text.jsonl` and what stages before have made."""


def make_base() -> None:
    """A model of two layers with a tokenizer, and texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    level = models.WordLevel({c: i for i, c in enumerate("?_abcdef")}, unk_token="?")
    characters = Tokenizer(level)
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="_", eos_token="?", unk_token="?"
    ).save_pretrained("base")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes)).save_pretrained(
        "base"
    )
    lines = (json.dumps({"text": text}) for text in ["abc", "def", "fed", "cab"] * 4)
    Path("text.jsonl").write_text("\n".join(lines))


if __name__ == "__main__":
    started = time.monotonic()
    make_base()
    for stage in STAGES:
        begun = time.monotonic()
        stage()
        print(f"{stage.__name__}: {time.monotonic() - begun:.0f} s")
    seconds = time.monotonic() - started
    assert seconds < MOST_SECONDS, f"{seconds:.0f} s"
    print("at home")
