"""Compare the attributes of modules between passes, and restore them after one.

Both look into containers, objects and functions, for the numbers, arrays and tensors in them.
Objects of torch, transformers and the like are compared by identity: their counters decide no
result.
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
"""Prefixes of the Python modules whose code moves weights and activations about."""
# Compared by their own `==`.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, range, type(None), type(...)),
    *(torch.dtype, torch.device, types.GenericAlias, types.UnionType),
)
_NOT_ADDED = (*_PLAIN, nn.Module)
# Attributes of every module that decide no result: torch's own, and DeepSpeed's counters.
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


class _Identity:
    """Equal only to another one of the same object, which it keeps alive."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(maxsize=1 << 12)
def is_known(origin: object) -> bool:
    """Whether a `__module__` is of a package that runs the layers, and not the user's."""
    return str(origin).partition(".")[0] in _KNOWN


def comparable(value: Any) -> Any:
    """Return something that compares equal as long as `value`, and all that it holds, is the same.

    Values that cannot be compared (an iterator, one whose own code raises) give something that
    equals nothing.
    """
    try:
        found = _comparable(value, {})
        hash(found)  # as recordings are found by it
    except Exception:
        return object()
    return found


def _comparable(value: Any, seen: dict[int, Any]) -> Any:
    """As `comparable`; `seen` has the objects on the way to `value`, for cycles."""
    value = own_forward(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    if id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value
    if len(seen) > _MOST:
        return object()
    if isinstance(value, Tensor):
        # Kept alive, as another one may come to lie at its address.
        return None if is_sharded(value) else (_Identity(value), version(value))
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return value.dtype.str, value.shape, value.tobytes()
    if generator := _generator(value):
        return _comparable(generator[0], seen)
    inside = _contents(value)
    if inside is None:
        if type(value).__hash__ not in (None, object.__hash__):  # it has an `==`, as dates have
            return type(value), value
        same = type(value) is object or isinstance(value, _BY_IDENTITY) or _is_of_known(value)
        return _Identity(value) if same else object()
    own: Any = type(value)  # not the object: one that is made anew may hold the same
    if isinstance(value, types.FunctionType):
        own = _Identity(value)
        if not is_known(_origin(value)):
            inside += [value.__globals__.get(name) for name in value.__code__.co_names]
    return own, tuple([_comparable(part, seen) for part in inside])


def comparable_tensor(tensor: Tensor) -> tuple[int, int] | None:
    """A tensor's address and version, which a write changes; None of sharded ones."""
    if is_sharded(tensor):  # gathered anew for each pass
        return None
    return tensor.data_ptr(), version(tensor)


def _origin(function: types.FunctionType) -> Any:
    return function.__globals__.get("__name__")


def _is_of_known(value: Any) -> bool:
    return is_known(type(value).__module__)


def _contents(value: Any) -> list[Any] | None:
    """The values inside a container, function or object; None of kinds that are not opened."""
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
        if is_known(_origin(value)):  # a decorator, around anybody's
            return [content for content in closed if isinstance(content, _FUNCTIONS)]
        return [*closed, value.__defaults__, value.__kwdefaults__, *own]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
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


class Snapshot:
    """The present values of modules' buffers, attributes and small parameters, for `restore`."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._restores: list[Callable[[], object]] = []
        self._seen: dict[int, Any] = {}
        for module in modules:
            known, self._num_left = is_known(type(module).__module__), _MOST
            attributes = {
                name: value
                for name, value in vars(module).items()
                if name not in INTERNAL
                and (name[0] != "_" or not known or issubclass(type(value), _PLAIN))
            }
            self._restores.append(partial(_put_attributes, vars(module), attributes, known))
            self._restores.append(partial(module._buffers.update, module._buffers.copy()))
            parameters = () if known else module._parameters.values()
            for value in (*attributes.values(), *module._buffers.values(), *parameters):
                with suppress(Exception):  # raised by the value's own code
                    self._add(value)

    def restore(self) -> None:
        """Write the values back, in place: lists, objects and tensors stay the same ones."""
        for restore in self._restores:
            restore()

    def _add(self, value: Any) -> None:
        if isinstance(value, _NOT_ADDED) or id(value) in self._seen:
            return
        self._num_left -= 1
        if self._num_left < 0:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            dense = type(value) is Tensor or (type(value) is nn.Parameter and value.numel() <= _FEW)
            if dense and not (value.is_meta or value.is_sparse or is_sharded(value)):
                before = value.data, value.detach().clone(), value.requires_grad
                self._restores.append(partial(_put_tensor, value, *before))
            return
        if generator := _generator(value):
            self._restores.append(partial(generator[1], generator[0]))
            return
        if isinstance(value, np.ndarray) and value.flags.writeable:
            self._restores.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, _KINDS):
            items = value.items() if isinstance(value, dict) else value
            self._restores.append(partial(_put_items, value, [*items]))
        elif isinstance(value, types.FunctionType) and not is_known(_origin(value)):
            for cell, content in _cells(value):
                self._restores.append(partial(setattr, cell, "cell_contents", content))
        inside = _contents(value)
        if inside is None:
            return
        if not _is_of_known(value):
            if own := getattr(value, "__dict__", None):
                self._restores.append(partial(_put_attributes, own, {**own}, False))
            for name, part in _in_slots(value).items():
                self._restores.append(partial(object.__setattr__, value, name, part))
        for part in inside:
            self._add(part)


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
