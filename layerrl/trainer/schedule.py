"""Layers that take turns."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from layerrl.blocks import find_blocks
from layerrl.errors import SelectionError
from layerrl.trainer import launchers

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn


class LayerSchedule(TrainerCallback):
    """Lets the layers of a selection take turns: at any step, only one set of them trains.

    For a masked trainer whose `selection` is all the layers that ever train. The optimizer holds
    them all from the start; those whose turn it is not have no gradient, and no optimizer state
    unless it is kept. Which set trains follows from the step alone, so a resumed run goes on as if
    it had not been stopped. The family of LISA (arXiv:2403.17919) and BAdam (arXiv:2404.02827).

    Args:
        layers: The sets, each a layer or several that train together.
        every: Optimizer steps of a turn.
        order: `"rotate"`: one after the other; `"random"`: each once in a round, every round in
            another order.
        weights: With `"random"`, how likely each set is, instead of rounds: scores of a report,
            for example.
        keep_state: Keep a set's optimizer state until its next turn, instead of starting anew.
        seed: Of the random order.

    Raises:
        SelectionError: If it makes no sense, or, when training starts, if the trainer's selection
            does not have the same layers or a set would get no turn.
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
        weights: Sequence[float] | None = None,
        keep_state: bool = False,
        seed: int = 0,
    ) -> None:
        listed = [k if isinstance(k, Iterable) else [k] for k in layers]
        self._sets = [tuple(sorted({*chosen})) for chosen in listed]
        self._layers = {layer for chosen in self._sets for layer in chosen}
        whole = all(type(layer) is int for layer in self._layers)
        if not self._layers or not all(map(len, self._sets)) or not whole:
            raise SelectionError(
                f"layers is {self._sets}, expected layers or lists of layers, at least one"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise SelectionError(f"every is {every!r}, expected a number of steps, an int above 0")
        if order not in ("rotate", "random"):
            raise SelectionError(f'order is {order!r}, expected "rotate" or "random"')
        if weights is not None and (
            order != "random" or len(weights) != len(self._sets) or not min(weights) > 0
        ):
            raise SelectionError(
                f'weights is {list(weights)}, expected, with order="random", a number above 0 for '
                f"each of {len(self._sets)} sets: one that is never likely never trains"
            )
        self._every, self._order, self._seed = every, order, seed
        self._weights = None if weights is None else list(weights)
        self._keep_state = keep_state
        self._active: tuple[int, ...] | None = None

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

    def on_train_begin(
        self,
        args: Any,  # noqa: ANN401
        state: Any,  # noqa: ANN401
        control: Any,  # noqa: ANN401
        **given: Any,
    ) -> None:
        """Refuse what cannot take turns: a launcher, other layers, sets without a turn."""
        launchers.refuse_schedule(args)
        self._active = None
        blocks = find_blocks(given["model"])
        trained = {
            layer
            for layer in range(len(blocks.modules))
            if any(parameter.requires_grad for _, parameter in blocks.named_parameters(layer))
        }
        if self._layers != trained:
            raise SelectionError(
                f"the schedule has the layers {sorted(self._layers)}, the trainer's selection "
                f"trains {sorted(trained)} of {len(blocks.modules)}: give both the same"
            )
        turns = {self.at(step) for step in range(0, state.max_steps, self._every)}
        idle = [chosen for chosen in self._sets if chosen not in turns]
        if idle:
            raise SelectionError(
                f"in {state.max_steps} steps with turns of {self._every}, {idle} would never "
                "train: take more steps, shorter turns or fewer layers"
            )

    def on_step_begin(
        self,
        args: Any,  # noqa: ANN401
        state: Any,  # noqa: ANN401
        control: Any,  # noqa: ANN401
        **given: Any,
    ) -> None:
        """Change turns where it is time."""
        active = self.at(state.global_step)
        if active != self._active:
            self._mask(active, given["model"], given["optimizer"])
            self._active = active

    def on_train_end(self, *_: Any, **given: Any) -> None:
        """Every layer of the selection is masked in again."""
        self._mask(self._layers, given["model"], given["optimizer"])

    def _mask(self, active: Collection[int], model: nn.Module, optimizer: Any) -> None:  # noqa: ANN401
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        blocks = find_blocks(model)
        for layer in self._layers:
            for _, parameter in blocks.named_parameters(layer):
                if id(parameter) not in held:  # a part of the layer that never trains
                    continue
                parameter.requires_grad_(layer in active)
                if layer not in active:
                    parameter.grad = None
                    if not self._keep_state:
                        optimizer.state.pop(parameter, None)
