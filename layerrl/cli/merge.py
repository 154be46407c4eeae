"""`layerrl merge`: `merge_delta`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

_DOES = "Write the base with deltas in it: a whole model that plain transformers loads."


def run(argv: list[str]) -> None:
    """Write the base with deltas in it: a whole model that plain transformers loads."""
    parser = ArgumentParser(prog="layerrl merge", description=_DOES)
    parser.add_argument("base", metavar="BASE", help="folder or hub id of the base")
    parser.add_argument(
        "deltas", metavar="DELTA", nargs="+", help="its folder; several in the order of training"
    )
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument(
        "--union",
        action="store_true",
        help="the deltas were trained side by side, and train different layers",
    )
    parser.add_argument(
        "--revision",
        action="append",
        metavar="REV",
        help="branch, tag or commit of a delta on the hub; of several, give it once for each",
    )
    given = parser.parse_args(argv)

    from layerrl import merge_delta

    words = [word or None for word in given.revision or ()]  # an empty one is a folder's
    revision = words if len(words) > 1 else next(iter(words), None)
    made = merge_delta(given.base, given.deltas, given.out, union=given.union, revision=revision)
    print(f"Wrote {made}: AutoModelForCausalLM.from_pretrained loads it.", file=sys.stderr)
