"""An optimizer gets the trained tensors only, and its first step is seen to reach each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerrl.blocks import plain_name, unwrap
from layerrl.errors import DeltaError, SelectionError
from layerrl.frozen import fingerprints
from layerrl.precision import HALF, MASTER, nested, stepped_value, unwrap_optimizer
from layerrl.selection import LayerSelection
from layerrl.selection.rates import learning_rate_factors
from layerrl.shards import local
from layerrl.trained import TrainedLayers

_CHECK = "layerrl_step_check"
_LOMO = ("Lomo", "AdaLomo")
_FLOAT32 = torch.finfo(torch.float32)


def updates_in_backward(optimizer: Any) -> bool:
    """Whether an optimizer, or one of this `optim`, updates in the backward: LOMO, layer-wise."""
    if isinstance(optimizer, str):
        return optimizer.endswith("_layerwise") or optimizer in [name.lower() for name in _LOMO]
    optimizer = unwrap_optimizer(optimizer)
    return isinstance(getattr(optimizer, "optimizer_dict", None), dict) or (
        type(optimizer).__name__ in _LOMO
    )


def refuse_updates_in_backward(
    name: str, selection: LayerSelection, *, master_weights: bool
) -> None:
    """Refuse an optimizer that updates in the backward, where the step matters."""
    if selection.token_rows:
        raise SelectionError(
            f"{selection}: {name} updates layer by layer, in the backward, and the other rows of "
            "the embedding could not be kept. Choose another optimizer in the args."
        )
    if selection.is_boosted:
        raise SelectionError(
            f"{selection}: the scales cannot be put into {name}, which updates layer by layer. "
            "Choose another optimizer in the args, or select without boost."
        )
    if master_weights:
        raise SelectionError(
            f"{name} updates layer by layer, in the backward, and can keep no float32 master "
            "weights for tensors in half precision. Choose another optimizer, load the model in "
            "float32, or pass master_weights=False and lose small steps."
        )


def keep_only(optimizer: Any, parameters: Collection[nn.Parameter]) -> None:
    """Take everything but these parameters out of a new optimizer.

    Transformers builds GaLore, APOLLO and LOMO over the whole model, frozen tensors too; a factory
    in `optimizer_cls_and_kwargs` may do the same. What these draw for each parameter (APOLLO's
    seeds) depends on its place among all, so that they are not given fewer to begin with.

    Args:
        optimizer: Just made; its groups and state are changed in place, and those of optimizers
            inside of it.
        parameters: Those that stay.

    Raises:
        SelectionError: If it projects some of the gradients, but none of these.
    """
    chosen = {id(parameter) for parameter in parameters}
    one_each = getattr(optimizer, "optimizer_dict", {})  # transformers' layer-wise ones
    for parameter in [p for p in one_each if id(p) not in chosen]:
        del one_each[parameter]
    low_rank, projected = False, 0
    for inner in nested(optimizer):
        if inner is optimizer and one_each:
            continue  # transformers' stand-in, with a tensor of no model
        for group in inner.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) in chosen]
            low_rank = low_rank or "rank" in group
            projected += len(group["params"]) if "rank" in group else 0
        for parameter in [p for p in inner.state if id(p) not in chosen]:
            del inner.state[parameter]
    if low_rank and not projected:
        raise SelectionError(
            f"{type(optimizer).__name__} projects the gradients of the linear layers that "
            "optim_target_modules matches, and none of them trains: name modules of the trained "
            "layers, or choose another optim."
        )


def check_steps(optimizer: Any, trained: Callable[[], Mapping[str, nn.Parameter]]) -> None:
    """Make sure, in the first step with a gradient, that an optimizer's step reaches each tensor.

    A tensor is reached if its value, or its master's, is another one afterwards, or if the
    optimizer has made a state for it. One that a plain gradient step would not have moved either
    (rate 0, no gradient, a step below the precision) is looked at again in the next step.

    Args:
        optimizer: Its `step` is replaced on the instance, once. It then raises a `SelectionError`
            if a tensor is not reached, and a `DeltaError` if the first step misses something in
            the state that was loaded.
        trained: What trains, by name; asked in the first step, when launchers have done with it.
    """
    optimizer = unwrap_optimizer(optimizer)
    known = vars(optimizer).get(_CHECK)
    if isinstance(known, _StepCheck):
        known.waiting = None
        return
    check = _StepCheck(optimizer, trained)
    setattr(optimizer, _CHECK, check)
    step, own_state = optimizer.step, bool(getattr(optimizer, "state", None))

    def checked_step(_: Any, *args: Any, **kwargs: Any) -> Any:
        # In the first step what is there was loaded, unless the optimizer has made it itself.
        loaded = check.waiting is None and not own_state and bool(getattr(optimizer, "state", None))
        before = check.before()
        try:
            result = step(*args, **kwargs)
        except LookupError as error:
            if not loaded:
                raise
            raise DeltaError(
                f"{type(optimizer).__name__} cannot step from the state that was loaded into it: "
                f"{error!r:.200}. Was the checkpoint written with another optim? Resume with that "
                "one, or delete the checkpoint's optimizer.pt: the run then goes on from its "
                "weights with a new optimizer."
            ) from error
        if before:
            check.after(before)
        return result

    optimizer.step = MethodType(checked_step, optimizer)


class _StepCheck:
    """Which tensors the steps of an optimizer have not been seen to reach yet."""

    def __init__(self, optimizer: Any, trained: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        self.optimizer = optimizer
        self.trained = trained
        self.waiting: dict[str, nn.Parameter] | None = None

    def before(self) -> dict[str, tuple[Tensor, str]]:
        """Gradient and fingerprint of each tensor that this step is to be seen to reach."""
        if self.waiting is None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            trained = self.trained()
            # DeepSpeed gives the optimizer tensors of its own, and checks its steps itself.
            by_others = held.isdisjoint(id(p) for p in trained.values())
            self.waiting = {} if by_others else dict(trained)
        return {
            name: (p.grad, self._fingerprint(p))
            for name, p in self.waiting.items()
            if p.grad is not None
        }

    def after(self, before: Mapping[str, tuple[Tensor, str]]) -> None:
        """Raise an error for those that were not reached."""
        assert self.waiting is not None
        states = [inner.state for inner in nested(self.optimizer)]
        lost = []
        for name, (gradient, fingerprint) in before.items():
            parameter = self.waiting[name]
            has_state = any({*state.get(parameter, {})} - {MASTER} for state in states)
            if has_state or self._fingerprint(parameter) != fingerprint:
                del self.waiting[name]
            elif self._would_move(parameter, gradient):
                lost.append(name)
        if lost:
            half = self.waiting[lost[0]].dtype in HALF
            raise SelectionError(
                f"the step of {type(self.optimizer).__name__} did not reach {len(lost)} of "
                f"{len(before)} trained tensors that had a gradient: "
                + ", ".join(lost[:3])
                + (", ..." if len(lost) > 3 else "")
                + ". They are what they were, and have no optimizer state. Build it, and every "
                "optimizer inside of it, over selection.parameters(model).values() themselves, "
                "not over copies"
                + (
                    "; if it keeps other references to the half-precision weights (a flat buffer), "
                    "pass master_weights=False or load the model in float32."
                    if half
                    else "."
                )
            )

    def _fingerprint(self, parameter: nn.Parameter) -> str:
        return fingerprints({"": stepped_value(self.optimizer, parameter)}).get("", "")

    def _would_move(self, parameter: nn.Parameter, gradient: Tensor) -> bool:
        value, gradient = stepped_value(self.optimizer, parameter), gradient.detach()
        rates = [
            group.get("lr")
            for inner in nested(self.optimizer)
            for group in inner.param_groups
            if any(parameter is p for p in group["params"])
        ]
        known = [float(rate) for rate in rates if rate is not None]
        value, gradient = local(value), local(gradient).to(value.dtype)
        moved = value - min(known, default=1.0) * gradient
        return bool(gradient.isfinite().all() and (moved != value).any())


def scale_learning_rates(optimizer: Optimizer, layers: TrainedLayers) -> None:
    """Split an optimizer's parameter groups by the selection's learning-rate factors.

    Every group keeps its own options (weight decay above all); schedulers made afterwards see the
    scaled rates as their base rates. Groups stay as they are where every factor is 1.

    Args:
        optimizer: A new optimizer without state. Its groups are replaced.
        layers: What it holds; a parameter that no boost names has factor 1.

    Raises:
        SelectionError: If the optimizer sets its own learning rate, so that none can be scaled; if
            a scaled rate is none in float32. The groups are as they were then.
    """
    if not layers.selection.is_boosted:
        return
    scale_of = learning_rate_factors(layers.selection, layers.model, layers.parameters)
    groups = list(optimizer.param_groups)
    if any(group.get("lr") is None for group in groups):
        raise SelectionError(
            f"{type(optimizer).__name__} sets its own learning rate (lr=None): the selection's "
            f"scales {set(scale_of.values())} cannot apply. Use an optimizer with a "
            "learning rate, or a selection without boost."
        )
    scaled = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_scale[scale_of.get(id(parameter), 1.0)].append(parameter)
        for scale in sorted(by_scale, key=lambda scale: (scale != 1.0, scale)):
            rate = group["lr"] * scale
            if scale != 1 and group["lr"] and not _FLOAT32.tiny <= rate <= _FLOAT32.max:
                raise SelectionError(
                    f"boost {scale:g} times the learning rate {float(group['lr']):g} is "
                    f"{float(rate):g}, and optimizers step in float32, which holds "
                    f"{_FLOAT32.tiny:.2g} to {_FLOAT32.max:.2g}: the tensor would be lost, or not "
                    "move. Choose a boost nearer 1."
                )
            scaled.append({**group, "params": by_scale[scale], "lr": rate})
    optimizer.param_groups.clear()
    for group in scaled:
        optimizer.add_param_group(group)


def check_optimizer(optimizer: Optimizer, layers: TrainedLayers) -> None:
    """Make sure that an optimizer holds the trained tensors and nothing else."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = layers.parameters
    names = {id(p): plain_name(name) for name, p in unwrap(layers.model).named_parameters()}
    missing = [name for name, p in trained.items() if id(p) not in held]
    extra = sorted(
        names.get(i, "a tensor of no parameter") for i in held - {id(p) for p in trained.values()}
    )
    if missing or extra:
        problem = f"misses trained {missing[0]!r}" if missing else f"holds frozen {extra[0]!r}"
        raise SelectionError(
            f"the {type(optimizer).__name__} {problem} ({len(missing)} missing, {len(extra)} too "
            f"many; {layers.selection} trains {len(trained)} tensors). Whoever built it "
            "(optimizers=, optimizer_cls_and_kwargs= or a create_optimizer of your own) has to "
            "give it selection.parameters(model).values(); what the args name (optim) gets just "
            "these."
        )
