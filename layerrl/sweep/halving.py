"""Successive halving: layers that have fallen behind are not trained to the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from layerrl.statistics import bootstrap, interval_of

_SHARES = (1 / 8, 1 / 4, 1 / 2)


def rungs(num_steps: int, cycle: int = 1) -> tuple[int, ...]:
    """Return the steps at which layers may be dropped: after an eighth, a quarter, a half of a run.

    A run can be continued exactly only between batches, of `cycle` steps: rungs lie there.
    """
    found = {math.ceil(num_steps * share / cycle) * cycle for share in _SHARES}
    return tuple(sorted(step for step in found if step < num_steps))


def cycle(args: Any) -> int:
    """Optimizer steps on one generation batch."""
    forwards = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
    return forwards // math.gcd(forwards, args.gradient_accumulation_steps)


def below_the_cut(
    scores: Mapping[int, Sequence[Sequence[float]]], *, base: float, full: float
) -> dict[int, str]:
    """Return the layers resolved to be worse, by now, than the last of the better half, and why.

    Nothing is dropped before that one has half of the full gain: layers that only have not begun
    to learn would be the first to go, and such layers have ended level with the others. Resolved:
    the difference has a 95 % interval below zero.
    """
    draws = bootstrap({str(layer): rows for layer, rows in scores.items()})
    means = {layer: sum(map(sum, rows)) / sum(map(len, rows)) for layer, rows in scores.items()}
    ordered = sorted(means, key=lambda layer: (-means[layer], layer))
    cut = ordered[(len(ordered) - 1) // 2]
    dropped = {}
    if means[cut] - base < (full - base) / 2:
        return dropped
    for layer in ordered:
        difference = interval_of(draws[str(layer)] - draws[str(cut)])
        if difference.high < 0:
            dropped[layer] = (
                f"{means[layer]:.3f}, {difference:+.3f} against layer {cut} with {means[cut]:.3f}"
            )
    return dropped
