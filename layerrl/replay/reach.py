"""What lies in a module's attributes: told from other values, and put back after a pass.

Numbers, arrays and tensors, and what containers, objects and functions hold of them. Objects of the
packages that run the layers are told by identity: what they count decides no result.
"""

from __future__ import annotations

import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerrl.blocks import own_forward
from layerrl.replay.arguments import version
from layerrl.shards import is_sharded

LAUNCHERS = ("torch.distributed.", "deepspeed.", "accelerate.")
"""How the names of modules begin that move weights and activations about."""
PLAIN = (
    *(bool, int, float, complex, str, bytes, range, slice, type(None), type(...)),
    *(torch.dtype, torch.device),
)
# Of all modules: what torch keeps there, and what DeepSpeed counts, whatever they compute.
INTERNAL = {*vars(nn.Module())} | {
    "applied_pre_backward_ref_cnt", "ds_external_parameters", "ds_grads_remaining",
    "ds_inflight_param_registry", "post_bwd_fn", "pre_bwd_fn",
}  # fmt: skip
_KNOWN = {"torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "trl"}
_KNOWN |= {"layerrl", "logging", "threading", "_thread", "_io", "weakref", "typing"}
_DESCRIPTORS = (
    *(types.MemberDescriptorType, types.GetSetDescriptorType, types.MethodWrapperType),
    *(types.MethodDescriptorType, types.WrapperDescriptorType),
)
_BY_IDENTITY = (nn.Module, type, types.ModuleType, types.BuiltinFunctionType, *_DESCRIPTORS)
_SEQUENCES = (list, tuple, set, frozenset, deque, bytearray)
_FUNCTIONS = (types.FunctionType, types.MethodType, partial)
_KINDS = (OrderedDict, dict, list, set, deque, bytearray)
_FEW = 1 << 16  # elements of a parameter that may be a statistic, and no matrix of weights
_MOST = 1 << 12  # objects: what holds more may reach the whole program


class _Same:
    """Is equal to nothing but the same object, which it keeps alive."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(maxsize=1 << 12)
def is_known(origin: object) -> bool:
    """Whether what has this `__module__` is of a package that runs the layers."""
    return str(origin).partition(".")[0] in _KNOWN


def told(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """What tells a value from others; of one that cannot be compared, something equal to none."""
    value = own_forward(value)
    if isinstance(value, PLAIN):
        return type(value), value
    if seen is None:
        try:
            return told(value, {})
        except Exception:  # code of the value's own, or too much inside each other
            return object()
    if id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value
    if len(seen) > _MOST:
        return object()
    if isinstance(value, Tensor):
        # Kept alive, as another one may come to lie at its address.
        return None if is_sharded(value) else (_Same(value), version(value))
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return value.dtype.str, value.shape, value.tobytes()
    if generator := _generator(value):
        return told(generator[0], seen)
    held = _held(value)
    if held is None and type(value).__hash__ not in (None, object.__hash__):
        return type(value), value  # of a kind that says itself what is equal, as patterns and dates
    if held is None:
        same = type(value) is object or isinstance(value, _BY_IDENTITY) or _is_of_known(value)
        return _Same(value) if same else object()
    own: Any = type(value)  # may be made anew with equal contents
    if isinstance(value, types.FunctionType):
        own, named = _Same(value), value.__globals__
        if not is_known(named.get("__name__")):
            held += [named.get(name) for name in value.__code__.co_names]
    return own, tuple([told(part, seen) for part in held])


def told_tensor(tensor: Tensor) -> tuple[int, int] | None:
    """Where a tensor's values lie, and how often they were written; None of sharded ones."""
    if is_sharded(tensor):  # gathered anew for each pass
        return None
    return tensor.data_ptr(), version(tensor)


def _is_of_known(value: Any) -> bool:
    return is_known(type(value).__module__)


def _held(value: Any) -> list[Any] | None:
    """What a container, function or object holds; None of what is not looked into."""
    own = [*getattr(value, "__dict__", {}).items()]
    if isinstance(value, dict | types.MappingProxyType):
        return [*(part for pair in value.items() for part in pair), *own]
    if isinstance(value, _SEQUENCES):
        return [*value, *own]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.items()]
    if isinstance(value, types.FunctionType):
        closed = [content for _, content in _cells(value)]
        if is_known(value.__globals__.get("__name__")):  # as a decorator around anybody's
            return [content for content in closed if isinstance(content, _FUNCTIONS)]
        return [*closed, value.__defaults__, value.__kwdefaults__, *own]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, np.ndarray):  # of objects
        return [*value.flat]
    if isinstance(value, (*_BY_IDENTITY, Iterator)) or _is_of_known(value):
        return None
    attributes = [*own, *_in_slots(value).items()]
    empty = hasattr(value, "__dict__") or _slotted(value)
    return attributes or ([] if empty else None)


def _generator(value: Any) -> tuple[Any, Callable[[Any], object]] | None:
    """The state of a generator of random numbers, and what gives it one."""
    if isinstance(value, torch.Generator):
        state = value.get_state().numpy()
        return state, lambda state: value.set_state(torch.from_numpy(state))
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate(), value.setstate
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return bits.state, partial(setattr, bits, "state")
    return None


def _slotted(value: Any) -> list[type]:
    """The classes of an object that are written in Python and say where its attributes lie."""
    return [cls for cls in type(value).__mro__ if "__slots__" in vars(cls)]


def _in_slots(value: Any) -> dict[str, Any]:
    names = [
        name
        for cls in _slotted(value)
        for name, member in vars(cls).items()
        if isinstance(member, types.MemberDescriptorType) and not name.startswith("__")
    ]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _cells(function: types.FunctionType) -> Iterator[tuple[types.CellType, Any]]:
    for cell in function.__closure__ or ():
        try:
            yield cell, cell.cell_contents
        except ValueError:  # not filled yet
            continue


class Kept:
    """What modules hold in buffers and attributes, with the values that it has now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._restores: list[Callable[[], object]] = []
        self._seen: dict[int, Any] = {}
        for module in modules:
            known = is_known(type(module).__module__)
            held = {
                name: value
                for name, value in vars(module).items()
                if name not in INTERNAL and not (known and name[0] == "_" and not _plain(value))
            }
            self._restores.append(partial(_put_attributes, vars(module), held, known))
            if isinstance(module._buffers, dict):  # not of a scripted module
                self._restores.append(partial(module._buffers.update, module._buffers.copy()))
            own = () if known else module._parameters.values()
            for value in (*held.values(), *module._buffers.values(), *own):
                # Code of the value's own, or too much inside each other: it stays as it is left.
                with suppress(Exception):
                    self._keep(value)

    def put_back(self) -> None:
        """Give everything its values again; objects stay the same."""
        for restore in self._restores:
            restore()

    def _keep(self, value: Any) -> None:
        if isinstance(value, PLAIN) or id(value) in self._seen or len(self._seen) > _MOST:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            dense = type(value) is Tensor or (type(value) is nn.Parameter and value.numel() <= _FEW)
            if dense and not (value.is_meta or value.is_sparse or is_sharded(value)):
                kept = value.data, value.detach().clone(), value.requires_grad
                self._restores.append(partial(_put_tensor, value, *kept))
            return
        if isinstance(value, nn.Module):
            return
        if generator := _generator(value):
            self._restores.append(partial(generator[1], generator[0]))
            return
        if isinstance(value, np.ndarray) and value.flags.writeable:
            self._restores.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, dict):
            self._restores.append(partial(_put_items, value, [*value.items()]))
        elif isinstance(value, list | set | deque | bytearray):
            self._restores.append(partial(_put_items, value, [*value]))
        elif isinstance(value, types.FunctionType):
            cells = [*_cells(value)] if not is_known(value.__globals__.get("__name__")) else []
            for cell, content in cells:
                self._restores.append(partial(setattr, cell, "cell_contents", content))
        held = _held(value)
        if held is not None and not _is_of_known(value):
            if own := getattr(value, "__dict__", None):
                self._restores.append(partial(_put_attributes, own, {**own}, False))
            for name, part in _in_slots(value).items():
                self._restores.append(partial(object.__setattr__, value, name, part))
        for part in held or ():
            self._keep(part)


def _plain(value: object) -> bool:
    return isinstance(value, PLAIN)


def _put_attributes(now: dict[str, Any], before: dict[str, Any], known: bool) -> None:
    for name in () if known else now.keys() - before.keys() - INTERNAL:
        del now[name]
    for name, value in before.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _put_items(now: Any, before: list[Any]) -> None:
    # By the kind's own methods: a Counter would count what it is updated with.
    kind: Any = next(kind for kind in _KINDS if isinstance(now, kind))
    kind.clear(now)
    put: Any = kind.extend if isinstance(now, list | deque | bytearray) else kind.update
    put(now, before)


def _put_tensor(tensor: Tensor, data: Tensor, value: Tensor, requires_grad: bool) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.requires_grad and not requires_grad:  # it was added to in place
            tensor.detach_()
        if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
            tensor.data = data
        if not torch.equal(data, value):
            with suppress(RuntimeError):  # an expanded one, which nothing can have written to
                data.copy_(value)
