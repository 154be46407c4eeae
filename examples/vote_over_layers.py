"""Train several layers, each alone, and take the majority of their answers.

    python examples/vote_over_layers.py                       # layers 5, 8, 11, 14, 17 of SmolLM2
    python examples/vote_over_layers.py --layers first:3

One base, one small delta for each layer. The majority of their greedy answers is compared with each
layer alone, and with the majority of as many sampled answers of the fully trained model. Writes
`runs/vote/layer-*`. A layer whose delta exists is not trained again.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from chain_sum import answers, distinct, last_integer
from datasets import Dataset
from training import Setup, arguments, check_settings, layers, parser, start, train

from layerrl import load_delta, select_layers
from layerrl.statistics import bootstrap, interval_of


def main() -> None:
    """Train layers that have no delta yet, generate, vote, compare."""
    options = parse()
    setup = start(options)
    check_settings(options)
    held_out = distinct(setup.data.held_out)
    chosen = select_layers(setup.model(), options.layers).layers
    rows: dict[str, list[float]] = {}
    voters = []
    for layer in chosen:
        model = trained(setup, options, layer)
        voters.append(integers(model, setup, held_out, options.tokens))
        rows[f"layer {layer}"] = right(voters[-1], held_out)
    full = trained(setup, options, "full")
    rows["full, greedy"] = right(integers(full, setup, held_out, options.tokens), held_out)
    torch.manual_seed(options.seed)
    sampled = [integers(full, setup, held_out, options.tokens, 0.7) for _ in chosen]
    rows[f"full, {len(chosen)} samples vote"] = right(majority(sampled), held_out)
    rows[f"{len(chosen)} layers vote"] = right(majority(voters), held_out)
    show(rows)


def trained(setup: Setup, options: argparse.Namespace, layer: int | str) -> Any:
    """The base with the delta of one layer or of `"full"`, trained now if there is none."""
    folder: Path = options.output / f"layer-{layer}"
    model = setup.model()
    if folder.exists():
        load_delta(model, folder)
        return model
    rate = options.full_learning_rate if layer == "full" else options.learning_rate
    args = arguments(options, learning_rate=rate)
    train(setup, model, select_layers(model, layer), args, f"layer {layer}").save_delta(folder)
    return model


def integers(
    model: Any, setup: Setup, data: Dataset, tokens: int, temperature: float = 0.0
) -> list[int | None]:
    """The model's answer to each problem."""
    return [
        last_integer(text) for text in answers(model, setup.tokenizer, data, tokens, temperature)
    ]


def majority(voters: list[list[int | None]]) -> list[int | None]:
    """The most frequent answer to each problem; in a tie, that of the earlier voter."""
    return [Counter(votes).most_common(1)[0][0] for votes in zip(*voters, strict=True)]


def right(found: list[int | None], data: Dataset) -> list[float]:
    """1 where the answer is right."""
    return [float(a == int(b)) for a, b in zip(found, data["answer"], strict=True)]


def show(rows: dict[str, list[float]]) -> None:
    """Print accuracies, and the vote's difference to each, with 95 % intervals over problems."""
    draws = bootstrap({name: [row] for name, row in rows.items()})
    [*_, vote] = rows
    print(f"{len(rows[vote])} held-out problems, one seed")
    print(f"{'':22} accuracy  95 %              vote is better by")
    for name, row in rows.items():
        mean, ours = (sum(values) / len(values) for values in (row, rows[vote]))
        gain = f"{ours - mean:+.3f}  {interval_of(draws[vote] - draws[name]):+.3f}"
        own = f"{interval_of(draws[name], mean):.3f}"
        print(f"{name:22} {mean:8.3f}  {own}  {gain if name != vote else ''}".rstrip())


def parse() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0], "runs/vote")
    add = options.add_argument
    add("--layers", type=layers, default=[5, 8, 11, 14, 17], help="5,8,11 or middle:5, ...")
    add("--full-learning-rate", type=float, default=3e-5, help="default: %(default)s")
    return options.parse_args()


if __name__ == "__main__":
    main()
