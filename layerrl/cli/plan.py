"""`layerrl plan`: `LayerSelection.plan`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from typing import Any

from layerrl.cli.options import add_selection, config_of, selection_of

_DOES = "Print what a run will take, beside LoRA and full training. No weights are loaded."


def run(argv: list[str]) -> str:
    """Return the plan of a run, beside those of LoRA and full training, as text."""
    parser = ArgumentParser(prog="layerrl plan", description=_DOES)
    parser.add_argument("model", metavar="MODEL", help="folder, config.json or hub id")
    add_selection(parser)
    parser.add_argument("--dtype", help="of the weights, such as bfloat16 (default: the config's)")
    parser.add_argument("--beta", type=float, default=0.0, help="above 0: with a reference policy")
    parser.add_argument("--num_iterations", type=int, default=1, help="policy passes over a batch")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes")
    given = parser.parse_args(argv)
    config = config_of(given.model)
    selection = selection_of(config, given)
    plan = selection.plan(
        config, dtype=_dtype(given.dtype), beta=given.beta, num_iterations=given.num_iterations
    )
    print(f"{given.model}: {selection}", file=sys.stderr)
    return json.dumps(asdict(plan), indent=1) if given.json else str(plan)


def _dtype(name: str | None) -> Any:
    """A dtype of torch; of another name the name, which `plan` refuses."""
    import torch

    found = None if name is None else getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else name
