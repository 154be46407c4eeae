"""Update half-precision weights in float32.

A bfloat16 number has 8 significant bits: a step of 1e-6 on a weight of 0.02 is lost in rounding,
every time. The optimizer steps on float32 master values instead; the model's own weights are those,
rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerrl.copies import copied_by
from layerrl.errors import SelectionError
from layerrl.seams import imported
from layerrl.swapping import swap, swapped

HALF = (torch.bfloat16, torch.float16)
"""The dtypes too narrow to be updated in."""
MASTER = "master"
"""Name of the master values in an optimizer's state, so that they are saved and resumed with it."""
_MASTERS = "layerrl_masters"  # the same in a state dict of the optimizer's own making


def step_in_float32(optimizer: Any) -> None:
    """Let an optimizer update its half-precision parameters in float32.

    While one of its methods runs, the parameters themselves are the float32 masters, with float32
    gradients: wherever the optimizer keeps references to them (groups, state, optimizers inside of
    it), it finds masters, and makes its own state in float32. Afterwards the parameters are the
    masters, rounded. If the caller has written to a parameter since, that value counts.

    Args:
        optimizer: Any torch optimizer, in accelerate's wrapper or not. `step`, `state_dict`,
            `load_state_dict` and its class's further public methods (`train` and `eval` of
            schedule-free ones) are replaced on the instance; twice is once.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(vars(optimizer).get(_MASTERS), _Masters):
        masters = _Masters(optimizer)
        setattr(optimizer, _MASTERS, masters)
        masters.install()


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer in accelerate's wrapper; not what an optimizer of the user's own wraps."""
    with imported():
        from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def stepped_value(optimizer: Any, parameter: Tensor) -> Tensor:
    """The value that an optimizer updates for a parameter: its master, or the parameter itself.

    Returns:
        For a half-precision parameter that is updated in float32, the master as the next step would
        find it, not changed by later steps; otherwise the parameter's own values.
    """
    masters = vars(optimizer).get(_MASTERS)
    if not isinstance(masters, _Masters) or parameter.dtype not in HALF:
        return parameter.detach()
    half, held = parameter.detach(), masters.values.get(parameter)
    return half.float() if held is None else torch.where(held.to(half.dtype) == half, held, half)


def nested(optimizer: Any) -> Iterator[Any]:
    """An optimizer and all that it holds in attributes, lists or dicts, from the outside in."""
    queue: list[Any] = [optimizer]
    seen: dict[int, Any] = {}
    while queue:
        item = queue.pop(0)
        if id(item) in seen or isinstance(item, torch.Tensor):
            continue
        seen[id(item)] = item
        if isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, list | tuple):
            queue += item
        elif hasattr(item, "param_groups") and hasattr(item, "state"):
            yield item
            own = {"param_groups", "state", "defaults"}
            attributes = getattr(item, "__dict__", {}).items()
            queue += [value for name, value in attributes if name not in own]


class _Masters:
    """An optimizer's master values.

    Between its calls they lie in `optimizer.state[parameter]["master"]` too, from where a state
    dict takes them. Optimizers take an empty state for a new one: inside a call they are not there.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.values: dict[Any, Tensor] = {}
        self._pairs: list[tuple[Any, Any, Tensor | None]] | None = None

    def install(self) -> None:
        """Replace the optimizer's methods."""
        optimizer = self.optimizer
        # Bound methods on the instance, as schedulers expect and make them: whatever they have put
        # around `step` before stays inside of this.
        replaced = {
            "step": self._stepping(optimizer.step),
            "state_dict": self._giving_state(optimizer.state_dict),
            "load_state_dict": self._loading_state(optimizer.load_state_dict),
        }
        for name in other_methods(type(optimizer)) - {*replaced}:
            replaced[name] = self._touching(getattr(optimizer, name))
        for name, function in replaced.items():
            setattr(optimizer, name, MethodType(function, optimizer))
        copied_by(optimizer, _copy_of)
        _widen_state(optimizer)

    def _stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def step_on_masters(_: Any, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            def on_model(*args: Any, **kwargs: Any) -> Any:
                with self._outside():  # the closure runs the model, on its own weights
                    return closure(*args, **kwargs)

            given = (None if closure is None else on_model, *args)
            with self._inside():
                return step(*args, **kwargs) if given == (None,) else step(*given, **kwargs)

        return step_on_masters

    def _touching(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def on_masters(_: Any, *args: Any, **kwargs: Any) -> Any:
            with self._inside():
                return method(*args, **kwargs)

        return on_masters

    def _giving_state(self, state_dict: Callable[..., Any]) -> Callable[..., Any]:
        def with_masters(_: Any, *args: Any, **kwargs: Any) -> Any:
            given = state_dict(*args, **kwargs)
            # An optimizer that gives the states of others inside of it leaves out its own.
            if isinstance(given, dict) and _count(given, MASTER) < len(self.values):
                index = {p: i for i, p in enumerate(self._parameters())}
                values = {index[p]: value for p, value in self.values.items() if p in index}
                given = {**given, _MASTERS: values}
            return given

        return with_masters

    def _loading_state(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def load_masters(_: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            state_dict, own = _without_masters(state_dict)
            before, self.values = self.values, {}
            pairs = [(p, nn.Parameter(p.detach().float())) for p in self._halves()]
            try:
                with swapped(pairs):  # torch casts what it loads to the parameter's dtype
                    loaded = load(state_dict, *args, **kwargs)
            except BaseException:
                self.values = before
                raise
            state = self.optimizer.state
            for index, parameter in enumerate(self._parameters()):
                value = state.get(parameter, {}).get(MASTER, own.get(index))
                if value is not None:
                    # Some optimizers leave what they load where the file was read to.
                    self._publish(parameter, value.to(parameter.device, torch.float32))
            return loaded

        return load_masters

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Inside, the half-precision parameters are their masters."""
        if self._pairs is not None:
            yield
            return
        self._enter()
        done, first = False, not self.values
        try:
            yield
            done = True
        except LookupError as error:
            if not first:
                raise
            raise SelectionError(
                f"{type(self.optimizer).__name__} cannot update half-precision weights in float32: "
                f"{type(error).__name__}: {error}. It seems to look weights up by their address or "
                "dtype, which those of the float32 masters do not have. Pass master_weights=False "
                "(small steps are lost in rounding), load the model in float32, or choose another "
                "optimizer."
            ) from error
        except RuntimeError as error:
            if any(word in str(error) for word in ("dtype", "BFloat16", "Half", "float16")):
                raise SelectionError(
                    f"{type(self.optimizer).__name__} cannot update half-precision weights in "
                    f"float32: {error}. It keeps values in the weights' own dtype. Pass "
                    "master_weights=False (small steps are lost in rounding), load the model in "
                    "float32, or choose another optimizer."
                ) from error
            raise
        finally:
            self._leave(done)

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Inside `_inside`, the model's own weights again."""
        self._leave(True)
        try:
            yield
        finally:
            self._enter()

    def _enter(self) -> None:
        state, pairs = getattr(self.optimizer, "state", {}), []
        for half in self._halves():
            value = state.get(half, {}).get(MASTER, self.values.get(half))
            if half.grad is not None or value is not None:
                master = nn.Parameter(_master(half.detach(), value))
                master.grad = None if half.grad is None else half.grad.float()
                pairs.append((half, master, master.grad))
        for half, master, _ in pairs:
            held = state.get(half, {})
            held.pop(MASTER, None)
            if not held:
                state.pop(half, None)
            swap(half, master)
        self._pairs = pairs

    def _leave(self, done: bool) -> None:
        pairs, self._pairs = self._pairs or [], None
        state = getattr(self.optimizer, "state", {})
        for half, master, grad in pairs:
            swap(half, master)
            if master.grad is None:
                half.grad = None
            elif half.grad is None:
                half.grad = master.grad.to(half.dtype)
            elif master.grad is not grad or master.grad._version:
                half.grad.copy_(master.grad)
            # A first step that failed before it made any state can be tried again.
            if done or half in self.values or state.get(half):
                half.data.copy_(master.data)
                self._publish(half, master.data)

    def _publish(self, parameter: Any, value: Tensor) -> None:
        self.values[parameter] = value
        state = getattr(self.optimizer, "state", {})
        state.setdefault(parameter, {})[MASTER] = value

    def _parameters(self) -> list[Any]:
        groups = self.optimizer.param_groups
        return list(dict.fromkeys(p for group in groups for p in group["params"]))

    def _halves(self) -> list[Any]:
        return [p for p in self._parameters() if p.dtype in HALF]


def _copy_of(make: Callable[..., Any], args: tuple[Any, ...], state: Any) -> Any:
    """A copy of an optimizer that steps in float32, with masters of its own."""
    optimizer, held = make(*args), state.get("state", {})
    values = {p: of.pop(MASTER) for p, of in held.items() if MASTER in of}
    for parameter in values:
        if not held[parameter]:
            del held[parameter]
    optimizer.__setstate__(state)
    step_in_float32(optimizer)
    masters = vars(optimizer)[_MASTERS]
    for parameter, value in values.items():
        masters._publish(parameter, value)
    return optimizer


def _without_masters(state_dict: Any) -> tuple[Any, dict[int, Tensor]]:
    """A state dict as the optimizer alone would have given it, and the masters in it by place."""
    # It looks for values of its own in every state that is not empty, and that of a layer whose
    # turn is over may hold a master alone.
    if not isinstance(state_dict, dict):
        return state_dict, {}
    state_dict = {**state_dict}
    own, states = dict(state_dict.pop(_MASTERS, {})), state_dict.get("state")
    if isinstance(states, dict):
        groups = state_dict.get("param_groups", ())
        places = {name: place for place, name in enumerate(n for g in groups for n in g["params"])}
        state_dict["state"] = kept = {}
        for name, values in states.items():
            if isinstance(values, dict) and MASTER in values and name in places:
                values = {**values}
                own[places[name]] = values.pop(MASTER)
                if not values:
                    continue
            kept[name] = values
    return state_dict, own


def other_methods(cls: type) -> set[str]:
    """Public methods that torch's optimizers do not have: they may write to the weights, too."""
    return {
        name
        for base in cls.__mro__
        if base is not object and not issubclass(Optimizer, base)
        for name, value in vars(base).items()
        if isinstance(value, FunctionType)
        and not name.startswith("_")
        and not hasattr(Optimizer, name)
    }


def _widen_state(optimizer: Any) -> None:
    """Put what optimizers have made of half-precision parameters beforehand in float32."""
    inner = [*nested(optimizer)]
    queue: list[Any] = [value for one in inner for value in (one.state, *vars(one).values())]
    parameters = [p for one in inner for group in one.param_groups for p in group["params"]]
    seen: dict[int, Any] = {id(parameter): parameter for parameter in parameters}
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, nn.Parameter):  # of the model, perhaps frozen
            continue
        seen[id(item)] = item
        if isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, list | tuple):
            queue += item
        elif isinstance(item, torch.Tensor) and item.dtype in HALF:
            item.data = item.data.float()


def _count(values: Any, key: str) -> int:
    if not isinstance(values, dict | list | tuple):
        return 0
    inner = values.values() if isinstance(values, dict) else values
    here = isinstance(values, dict) and key in values
    return here + sum(_count(value, key) for value in inner)


def _master(half: Tensor, master: Tensor | None) -> Tensor:
    if master is None:
        return half.float()
    return torch.where(master.to(half.dtype) == half, master, half.float(), out=master)
