"""`LayerSchedule`: the layers of a selection take turns during one training."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from layerrl.blocks import find_blocks
from layerrl.checks import (
    check_choice,
    check_count,
    finite_number,
    is_unordered,
    listed,
    shown,
    whole_number,
)
from layerrl.errors import SelectionError
from layerrl.precision import MASTER, nested
from layerrl.trainer import launchers


class LayerSchedule(TrainerCallback, ExportableState):
    """Lets the layers of a selection take turns: at any step, only one set of them trains.

    For a masked trainer whose `selection` is all the layers that ever train. The optimizer holds
    them all from the start; those whose turn it is not have no gradient, and no optimizer state but
    for the float32 values of what trains in half precision. Which set trains follows from the step
    alone, so a resumed run goes on as if it had not been stopped. The family of LISA
    (arXiv:2403.17919) and BAdam (arXiv:2404.02827).

    Args:
        layers: The sets, each a layer or several that train together.
        every: Optimizer steps of a turn.
        order: `"rotate"`: one after the other; `"random"`: each once in a round, every round in
            another order.
        weights: With `"random"`, how likely each set is, instead of rounds: a number above 0 for
            each, or for each layer by its number (`report.scores`), of which a set has the mean.
        seed: Of the random order.

    Raises:
        SelectionError: If it makes no sense, or, when training starts, if the trainer trains other
            layers or more than layers, has an optimizer that updates layer by layer, sends vLLM a
            fixed list of weights, or resumes a run with another schedule; or if a set would get no
            turn.
        LauncherError: When training starts, under a launcher that fixes what trains beforehand.

    Example:
        ```python
        trainer = LayerMaskedGRPOTrainer(
            model, reward, ..., selection=[8, 10, 12],
            callbacks=[LayerSchedule([8, 10, 12], every=5)],
        )
        ```
    """

    def __init__(
        self,
        layers: Iterable[int | Iterable[int]],
        *,
        every: int,
        order: Literal["rotate", "random"] = "rotate",
        weights: Sequence[float] | Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> None:
        several = listed(layers) if isinstance(layers, Iterable) else ()
        sets = [listed(chosen) for chosen in several]
        numbers = [[whole_number(layer, least=0) for layer in chosen] for chosen in sets]
        found = [layer for chosen in numbers for layer in chosen if layer is not None]
        if not found or not all(sets) or len(found) < sum(map(len, sets)):
            raise SelectionError(
                f"layers is {shown(layers)}, expected layers or lists of layers, at least one"
            )
        self._sets = [
            tuple(sorted({layer for layer in chosen if layer is not None})) for chosen in numbers
        ]
        self._layers = {*found}
        turn = check_count("every", every, SelectionError, of="a number of steps, ")
        number = check_count("seed", seed, SelectionError, least=None)
        check_choice("order", order, ("rotate", "random"), SelectionError)
        self._weights = None if weights is None else self._of_sets(weights, order)
        self._every, self._order, self._seed = turn, order, number
        self._active: tuple[int, ...] | None = None

    def _of_sets(self, weights: Any, order: str) -> list[float]:
        if isinstance(weights, Mapping):
            rows = [[weights.get(layer) for layer in chosen] for chosen in self._sets]
        else:
            rows = [[weight] for weight in listed(weights)]
        numbers = [[finite_number(weight) or 0.0 for weight in row] for row in rows]
        found = [sum(row) / len(row) for row in numbers]
        good = min(min(row) for row in numbers) > 0 if numbers else False
        good = good and math.isfinite(sum(found))  # they are drawn by their share of it
        good = good and not is_unordered(weights)
        if order != "random" or not good or len(found) != len(self._sets):
            raise SelectionError(
                f'weights is {shown(weights)}, expected, with order="random", a finite number '
                f"above 0 for each of {len(self._sets)} sets or for each of the layers "
                f"{sorted(self._layers)}, with a finite sum: one that is never likely never trains"
            )
        return found

    def state(self) -> dict[str, Any]:
        """The state of the schedule for a checkpoint, as JSON values."""
        given = {
            "layers": [list(chosen) for chosen in self._sets],
            "every": self._every,
            "order": self._order,
            "weights": self._weights,
            "seed": self._seed,
        }
        return {"args": given, "attributes": {}}

    def __repr__(self) -> str:
        return f"LayerSchedule {self.state()['args']}"

    def at(self, step: int) -> tuple[int, ...]:
        """The layers that train in a step.

        Args:
            step: Optimizer steps done before it.

        Returns:
            Their numbers, in order.
        """
        turn = step // self._every
        if self._weights is not None:
            [chosen] = random.Random(f"{self._seed} {turn}").choices(self._sets, self._weights)
            return chosen
        rounds, place = divmod(turn, len(self._sets))
        sets = list(self._sets)
        if self._order == "random":
            random.Random(f"{self._seed} {rounds}").shuffle(sets)
        return sets[place]

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what cannot take turns."""
        self._active = None
        self._refuse_layers(given["model"])
        if hasattr(args, "weight_sync_steps"):
            raise SelectionError(
                f"{type(args).__name__}: the trainer told vLLM, when it was made, of every weight "
                "that it will send, and sends those that train: with layers that take turns the "
                "server would wait for the rest. Use a trainer that generates between its steps."
            )
        launchers.refuse_schedule(args)  # before the optimizer: DeepSpeed's holds others' tensors
        self._refuse_optimizer(given["model"], given["optimizer"])
        known = state.stateful_callbacks.get(type(self).__name__, self.state())
        if isinstance(known, list):
            raise SelectionError(f"the trainer has {len(known)} schedules, expected one")
        if not known["args"].get("keep_state"):  # an option that is gone; the default did as now
            known["args"].pop("keep_state", None)
        if known != self.state():
            raise SelectionError(
                f"the checkpoint was written with another schedule, {known['args']}; this one is "
                f"{self.state()['args']}. Resume with the same."
            )
        turns = {self.at(step) for step in range(0, state.max_steps, self._every)}
        idle = [chosen for chosen in self._sets if chosen not in turns]
        if idle:
            seeds = "" if self._weights is None else ", another seed"
            raise SelectionError(
                f"in {state.max_steps} steps with turns of {self._every}, {idle} would never "
                f"train: take more steps, shorter turns{seeds} or fewer layers"
            )

    def _refuse_layers(self, model: nn.Module) -> None:
        blocks = find_blocks(model)
        of_layer = {
            id(parameter): layer
            for layer in range(len(blocks.modules))
            for _, parameter in blocks.named_parameters(layer)
        }
        training = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = {of_layer[id(p)] for p in training.values() if id(p) in of_layer}
        if self._layers != trained:
            raise SelectionError(
                f"the schedule has the layers {sorted(self._layers)}, the trainer's selection "
                f"trains {sorted(trained)} of {len(blocks.modules)} decoder layers: give both the "
                "same. Those of a vision tower do not take turns."
            )
        outside = [name for name, p in training.items() if id(p) not in of_layer]
        if outside:
            raise SelectionError(
                f"{outside[0]!r} and {len(outside) - 1} other tensors outside the layers would "
                'train in every step: use a masked trainer, with selection="all" for every layer'
            )

    def _refuse_optimizer(self, model: nn.Module, optimizer: Any) -> None:
        held, blocks = _held(optimizer), find_blocks(model)
        missing = [
            layer
            for layer in sorted(self._layers)
            if held.isdisjoint(id(parameter) for _, parameter in blocks.named_parameters(layer))
        ]
        if missing:
            raise SelectionError(
                f"the optimizer, a {type(optimizer).__name__}, holds nothing of the layers "
                f"{missing}, so they cannot take turns. Choose one that updates all layers in its "
                "step."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Change turns where it is time."""
        active = self.at(state.global_step)
        if active != self._active:
            self._mask(active, given["model"], given["optimizer"])
            self._active = active

    def on_train_end(self, *_: Any, **given: Any) -> None:
        """Every layer of the selection is masked in again."""
        self._mask(self._layers, given["model"], given["optimizer"])

    def _mask(self, active: Collection[int], model: nn.Module, optimizer: Any) -> None:
        held, blocks = _held(optimizer), find_blocks(model)
        states = [inner.state for inner in nested(optimizer)]
        for layer in self._layers:
            for _, parameter in blocks.named_parameters(layer):
                if id(parameter) not in held:  # a part of the layer that never trains
                    continue
                parameter.requires_grad_(layer in active)
                if layer not in active:
                    parameter.grad = None
                    for state in states:
                        values = state.pop(parameter, {})
                        if MASTER in values:  # the weight itself, which the model has rounded
                            state[parameter] = {MASTER: values[MASTER]}


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
