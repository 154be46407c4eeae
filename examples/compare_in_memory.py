"""Evaluate the base and its deltas with one model in memory.

    python examples/compare_in_memory.py                               # trains layer 10 first
    python examples/compare_in_memory.py runs/quickstart/delta
    python examples/compare_in_memory.py runs/vote/layer-5 runs/vote/layer-8

Without a folder, one layer is trained and its delta saved in `runs/compare/delta`; the next call
uses that delta. Deltas are switched in place. The base is evaluated first and last, and must
generate the same completions.
"""

import argparse
from pathlib import Path

from chain_sum import answers, distinct, reward
from training import Setup, arguments, layers, parser, show, start, train

from layerrl import select_layers
from layerrl.delta import Deltas, disabled


def main() -> None:
    """Load, switch, compare."""
    options = parse()
    setup = start(options)
    folders: list[Path] = options.deltas or [trained(setup, options)]
    held_out = distinct(setup.data.held_out)
    model = setup.model()
    deltas = Deltas(model, {str(folder): folder for folder in folders})

    def texts() -> list[str]:
        return answers(model, setup.tokenizer, held_out, options.tokens)

    found = {"base": texts()}
    for folder in map(str, folders):
        deltas.use(folder)
        found[folder] = texts()
    with disabled(model):  # the base, whichever delta is in use
        if texts() != found["base"]:
            raise SystemExit("the base answers differently after the deltas were switched")
    show({name: reward(each, held_out["answer"]) for name, each in found.items()}, "base")


def trained(setup: Setup, options: argparse.Namespace) -> Path:
    """The delta that an earlier call made, or a new one."""
    folder: Path = options.output / "delta"
    if not folder.exists():
        model = setup.model()
        selection = select_layers(model, options.layers)
        train(setup, model, selection, arguments(options), "training").save_delta(folder)
    return folder


def parse() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0], "runs/compare")
    options.add_argument("deltas", type=Path, nargs="*", help="folders of deltas (default: train)")
    options.add_argument("--layers", type=layers, default=10, help="10, 10,12, middle:5, all, ...")
    return options.parse_args()


if __name__ == "__main__":
    main()
