"""Train two new tokens, a tag around the answer: a layer with their rows, and the layer alone.

    python examples/new_tokens.py                    # six trainings, minutes on one CPU core
    python examples/new_tokens.py --steps 20 --seeds 0 --output runs/short

The model is a small Llama, trained here to write the larger of two digits in brackets: `3,9=` is
continued with `(9)`. Then two tokens are added, and GRPO rewards `<answer>9</answer>`, token by
token. transformers initialises both rows near the mean of all others, so they start nearly equal:
the rows must learn to tell the tags apart. Writes `runs/new-tokens/results.json`. If it is stopped,
the same command continues.
"""

import argparse
import json
import random
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import trange
from training import RewardBar, check_settings, letters, small_llama, write_json
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging
from trl import GRPOConfig

from layerrl import LayerMaskedGRPOTrainer, select_layers
from layerrl.statistics import bootstrap, interval_of

TAGS = ["<answer>", "</answer>"]
ARMS = {"layer": None, "layer and rows": "new_tokens"}
PROBLEMS = [(a, b) for a in range(10) for b in range(10)]


def main() -> None:
    """Pre-train, add the tokens, train with and without their rows, evaluate, compare."""
    options = parse()
    warnings.filterwarnings("ignore", module="(trl|transformers|torch|layerrl)")
    logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    base = options.output / "base"
    if not base.exists():
        teach(options.base_steps).save_pretrained(base)
        tokenizer().save_pretrained(base)
    train, held_out = split()
    path = options.output / "results.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "base" not in found:
        found["base"] = {"right": right(*with_tags(base, seed=0), held_out)}
    for arm, also in ARMS.items():
        for seed in options.seeds:
            run = f"{arm}, seed {seed}"
            if run in found:
                continue
            model, tokens = with_tags(base, seed)
            selection = select_layers(model, options.layer, also=also)
            trainer = make(model, tokens, selection, train, seed, run, options)
            trainer.train()
            rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
            found[run] = {
                "right": right(model, tokens, held_out),
                "rewards": rewards,
                "selection": str(selection),
            }
            write_json(path, found)
    show(found, options)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    return letters("0123456789,=()")


def with_tags(base: Path, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base and its tokenizer with two tokens added."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = tokenizer()
    tokens.add_tokens(TAGS)
    set_seed(seed)  # of the rows and of the training
    model.resize_token_embeddings(len(tokens))
    return model, tokens


def teach(steps: int) -> LlamaForCausalLM:
    """A small Llama that knows the task and gives every token some probability, for RL to try."""
    set_seed(0)
    tokens = tokenizer()
    model = small_llama(tokens, max_position_embeddings=32, tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    draw = random.Random(0)
    for _ in (bar := trange(steps, desc="teaching", unit="step")):
        drawn = draw.choices(PROBLEMS, k=64)
        texts = [f"{a},{b}=({max(a, b)})" for a, b in drawn]
        ids = tokens(texts, return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits[:, 3:-1]
        loss = smooth(logits.flatten(0, 1), ids[:, 4:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def split() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """70 pairs to train the tags on, 30 to evaluate on."""
    shuffled = random.Random(0).sample(PROBLEMS, len(PROBLEMS))
    return shuffled[:70], shuffled[70:]


def rows(problems: list[tuple[int, int]]) -> Dataset:
    """A prompt and its answer for each pair."""
    return Dataset.from_dict(
        {
            "prompt": [f"{a},{b}=" for a, b in problems],
            "answer": [str(max(a, b)) for a, b in problems],
        }
    )


def make(
    model: Any, tokens: Any, selection: Any, train: list[Any], seed: int, name: str, options: Any
) -> LayerMaskedGRPOTrainer:
    """A trainer for one run."""
    opening, closing = tokens.convert_tokens_to_ids(TAGS)

    def reward(completion_ids: list[list[int]], answer: list[str], **_: object) -> list[float]:
        """The share of tokens that are right and in their place."""
        scores = []
        for ids, digit in zip(completion_ids, answer, strict=True):
            wanted = [opening, tokens.convert_tokens_to_ids(digit), closing]
            scores.append(sum(a == b for a, b in zip(ids, wanted, strict=False)) / len(wanted))
        return scores

    trainer = LayerMaskedGRPOTrainer(
        model,
        reward,
        args=GRPOConfig(
            output_dir=str(options.output / "trainer"),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=256,
            num_generations=16,
            max_completion_length=3,
            seed=seed,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=rows(train),
        processing_class=tokens,
        selection=selection,
        callbacks=[RewardBar(name)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def right(model: Any, tokens: Any, problems: list[tuple[int, int]]) -> list[float]:
    """For each pair, the share of 8 sampled completions with both tags and the right digit."""
    data = rows(problems)
    set_seed(0)
    made = model.eval().generate(
        **tokens(list(data["prompt"]), return_tensors="pt"),
        max_new_tokens=3,
        num_return_sequences=8,
        do_sample=True,
        top_k=0,
    )
    wanted = [
        tokens.convert_tokens_to_ids([TAGS[0], digit, TAGS[1]])
        for digit in data["answer"]
        for _ in range(8)
    ]
    return (
        (made[:, -3:].cpu() == torch.tensor(wanted)).all(dim=1).view(-1, 8).float().mean(1).tolist()
    )


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Completions with both tags and the right digit, with 95 % intervals over seeds and pairs."""
    runs = {arm: [found[f"{arm}, seed {seed}"] for seed in options.seeds] for arm in ARMS}
    scores = {"base": [found["base"]["right"]]}
    scores |= {arm: [run["right"] for run in of] for arm, of in runs.items()}
    draws = bootstrap(scores, seedless=("base",))
    print(f"\n{len(scores['base'][0])} held-out pairs, 8 completions each, seeds {options.seeds}")
    print(f"{'trained':15} right  95 %            reward, first and last five steps")
    for arm, of in scores.items():
        mean = sum(map(sum, of)) / sum(map(len, of))
        rewards = [run["rewards"] for run in runs.get(arm, ())]
        ends = [
            f"{sum(sum(part) / len(part) for part in parts) / len(parts):.2f}"
            for parts in ([row[:5] for row in rewards], [row[-5:] for row in rewards])
            if parts
        ]
        interval = interval_of(draws[arm].clamp(0, 1), mean)
        print(f"{arm:15} {mean:5.3f}  {interval:.3f}  {' -> '.join(ends)}".rstrip())


def parse() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--layer", type=int, default=2, help="of 0 to 3 (default: %(default)s)")
    add("--steps", type=int, default=60, help="of each training (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--learning-rate", type=float, default=5e-3, help="default: %(default)s")
    add("--base-steps", type=int, default=300, help="of the base (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/new-tokens"), help="default: %(default)s")
    return made.parse_args()


if __name__ == "__main__":
    main()
