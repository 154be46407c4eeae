"""What exactness costs on SmolLM2-135M: a replayed pass's key, the base's record, a switched delta.

    python benchmarks/exactness.py

The key is what is computed of everything that enters layer 0, to know a recording again. The record
is a fingerprint of every tensor of the base, taken when a trainer is made and compared at saves.
Shares are of the training pass and of the save timed beside them in the same round. Two deltas of
the layer are switched in place, 1000 times in all, and compared with the base afterwards.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_report import MODEL
from train_step import ROOT, base
from transformers import AutoModelForCausalLM

from layerrl import LayerSelection, select_layers
from layerrl.blocks import find_blocks
from layerrl.delta import DeltaBase, Deltas, save_delta
from layerrl.frozen import FrozenRecord
from layerrl.replay.arguments import RowKeys
from layerrl.replay.entering import entry_of
from layerrl.replay.state import unfit

# One H100: bytes per second of memory, operations per second in bfloat16 at a usual utilisation.
BANDWIDTH, COMPUTE = 3.35e12, 4e14
PARAMETERS, HIDDEN = 8.0e9, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="hub id or path (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="default: %(default)s")
    options = parser.parse_args()
    (ROOT / "runs").mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base(options.model), dtype=torch.float32)
    selection = select_layers(model, "middle")
    ids_BT = torch.randint(100, 40_000, (options.rows, options.tokens))
    entered = what_enters(model, ids_BT)
    prefix = [find_blocks(model).modules[layer] for layer in selection.frozen_prefix]
    record = FrozenRecord(model, selection)
    before = DeltaBase.of(model, selection, frozen=record.fingerprints)

    def key() -> None:
        unfit(prefix)
        entry_of(*entered, RowKeys(options.rows), prefix)

    def save() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "delta"
            save_delta(model, path, selection=selection, base=before, check_frozen=False)

    with selection.masked(model):
        shares = [
            {
                "pass": seconds(lambda: training_pass(model, ids_BT)),
                "key": seconds(key),
                "record": seconds(
                    lambda: DeltaBase.of(model, selection, frozen=record.fingerprints)
                ),
                "check": seconds(lambda: record.check(model)),
                "save": seconds(save),
            }
            for _ in range(options.rounds)
        ]
    tokens = options.rows * options.tokens
    print(f"SmolLM2-135M, {selection}, {options.rows} x {options.tokens} tokens, float32, CPU")
    print(f"key / training pass     {spread([100 * r['key'] / r['pass'] for r in shares], '%')}")
    print(f"record beside the check {spread([r['record'] for r in shares], 's')}")
    print(f"check of what is frozen {spread([r['check'] for r in shares], 's')}")
    print(f"saving the delta        {spread([r['save'] for r in shares], 's')}")
    print(f"switching a delta       {spread(switches(model, selection, before), 'ms')}")
    key_bytes = 10 * tokens * HIDDEN * 2  # hidden states are passed over ten times
    of_pass = key_bytes / BANDWIDTH / (6 * PARAMETERS * tokens / COMPUTE)
    # Two bytes of each parameter are read, then eight are written, read, written and read.
    check = 34 * PARAMETERS / BANDWIDTH
    print(f"By arithmetic, 8 B parameters in bfloat16 on an H100: the key {of_pass:.1e} of a pass,")
    print(f"the check {check:.2f} s a save. Neither has been measured there.")


def switches(model: Any, selection: LayerSelection, base: DeltaBase) -> list[float]:
    """Milliseconds of each of 1000 switches between two deltas and the base."""
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("a", "b")}
        for path in paths.values():
            with torch.no_grad():
                for parameter in selection.parameters(model).values():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            save_delta(model, path, selection=selection, base=base, check_frozen=False)
        model.load_state_dict(original)
        deltas = Deltas(model, paths)
    names = ["a", "b", None, "b", "a", None]
    times = [1000 * seconds(lambda i=i: deltas.use(names[i % 6])) for i in range(1000)]
    deltas.use(None)
    words = {name: tensor.view(torch.uint8) for name, tensor in original.items()}
    same = all(torch.equal(t.view(torch.uint8), words[n]) for n, t in model.state_dict().items())
    print(f"after {len(times)} switches the base is bit for bit the base: {same}")
    return times


def what_enters(model: Any, ids_BT: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model calls its first layer with."""
    seen: list[Any] = []
    hook = (
        find_blocks(model)
        .modules[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
    )
    with torch.no_grad():
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[:, :3] = 0  # padding, so that there is a mask to read
        model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    hook.remove()
    return seen[0]


def training_pass(model: Any, ids_BT: torch.Tensor) -> None:
    """One policy pass that ends at the trained layer, as in training."""
    output = model(input_ids=ids_BT, labels=ids_BT, use_cache=False)
    output.loss.backward()
    model.zero_grad()


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.3g} {unit} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
