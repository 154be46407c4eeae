"""Turn any value into JSON that depends on its content, and on no address or hash seed."""

from __future__ import annotations

import copyreg
import hashlib
import inspect
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from layerrl.digests import json_digest
from layerrl.frozen import fingerprints

_DEEPEST = 100
_MOST = 200_000  # objects: a client may hold a whole framework
_VIEWS = type({}.keys()), type({}.items())
# Packages whose objects differ in each process: threads, files and sockets by their numbers.
_OPEN = (
    *("threading", "_thread", "subprocess", "socket", "_socket", "ssl", "_ssl", "multiprocessing"),
    *("concurrent", "asyncio", "_asyncio", "selectors", "select", "tempfile", "sqlite3", "weakref"),
    *("_weakref", "ray", "zmq"),
)
_STDLIB = Path(sysconfig.get_path("stdlib"))


def stored_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Rows as they are stored: images and other files are not decoded."""
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        yield from batch.to_pylist()  # pyright: ignore[reportAttributeAccessIssue]


def canonical(value: Any) -> Any:
    """Return JSON that is equal in every process for equal values, and differs for others.

    JSON values are themselves. Functions count by code, defaults and closure, methods by these and
    their object, arrays, tensors, modules and data sets by content, other objects by type and by
    what pickle would keep, a `__getstate__` included. Classes of the user's count by their code.
    Objects that pickle refuses (a lock, a file, a socket) count by type.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types that will not be taken apart one day
        return _Walk().of(value)


def instructions(code: types.CodeType) -> list[Any]:
    """Bytecode, names and constants of a function, as JSON: for functions without a source."""
    return [code.co_code.hex(), code.co_names, [_constant(each) for each in code.co_consts]]


def beside_code(function: Any) -> dict[str, Any]:
    """Defaults, closure and attributes of a function, as JSON; empty if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Walk().beside_code(function)


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return instructions(value)
    if isinstance(value, frozenset):  # of `in {...}`
        return sorted(map(repr, value))
    return repr(value)


class _Walk:
    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any]] = {}  # with the value: its id is its own that long
        self._above: list[int] = []
        self._sources: dict[int, Any] = {}  # finding one takes long
        self._count = 0

    def of(self, value: Any) -> Any:
        """The JSON of a value."""
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            return value if value.bit_length() <= 64 else hex(value)
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._above:
            return {"again": len(self._above) - self._above.index(id(value))}
        if len(self._above) >= _DEEPEST:
            return {"type": kind.__qualname__}
        self._above.append(id(value))
        try:
            made = self._made(value)
        finally:
            self._above.pop()
        self._known[id(value)] = value, made
        return made

    def _made(self, value: Any) -> Any:
        kind = type(value)
        if kind in (list, tuple):
            return [self.of(each) for each in value]
        if kind is dict and all(type(key) is str for key in value):
            return {key: self.of(each) for key, each in value.items()}
        self._count += 1
        try:
            found = self._taken_apart(value) if self._count <= _MOST else {}
            return {"type": _name(kind)} | ({"digest": json_digest(found)} if found else {})
        except Exception:  # code of the value's own
            return {"type": kind.__qualname__}

    def _taken_apart(self, value: Any) -> dict[str, Any]:
        """The parts of an object, by name; empty if it counts by type alone."""
        if isinstance(value, bytes | bytearray | memoryview):
            return {"bytes": hashlib.sha256(value).hexdigest()}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asarray(value))
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Dataset):
            return {"rows": json_digest(*stored_rows(value)), "format": self.of(value.format)}
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.CodeType):
            return {"code": instructions(value)}
        if isinstance(value, types.FunctionType):
            return {"code": _source(value)} | self.beside_code(value)
        if isinstance(value, types.MethodType):
            return {"of": self.of(value.__self__), "code": self.of(value.__func__)}
        if isinstance(value, types.ModuleType):
            return {"name": value.__name__}
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            owned = None if isinstance(owner, types.ModuleType) else self.of(owner)
            return {"name": f"{value.__module__}.{value.__qualname__}", "of": owned}
        if isinstance(value, staticmethod | classmethod | property):
            return {"code": self.of(value.fget if isinstance(value, property) else value.__func__)}
        if isinstance(value, (set, frozenset, *_VIEWS)):
            return {"set": self._sorted(value), "of": self.of(type(value)), **self._own(value)}
        if type(value) is dict or isinstance(value, types.MappingProxyType):
            return {"pairs": self._sorted(value.items())}
        return self._object(value)

    def _object(self, value: Any) -> dict[str, Any]:
        if str(type(value).__module__).partition(".")[0] in _OPEN:
            return {}
        found: dict[str, Any] = {"of": self.of(type(value))}
        try:
            made = copyreg.dispatch_table.get(type(value))
            reduced = made(value) if made else value.__reduce_ex__(4)
        except Exception:  # of what cannot be pickled, or code of the value's own
            return found | self._own(value)
        if isinstance(reduced, str):  # its name, which says it all but of a function that caches
            return found | {"name": reduced} | self._own(value)
        parts: tuple[Any, ...] = (*reduced, None, None, None)
        function, arguments, state, items, pairs = parts[:5]
        found |= {"made": self.of(function), "with": self.of(arguments), "state": self.of(state)}
        if items is not None:
            found["items"] = [self.of(each) for each in items]
        if pairs is not None:
            found["pairs"] = self._sorted(pairs)
        return found

    def _own(self, value: Any) -> dict[str, Any]:
        """The attributes of an object that pickle does not take apart."""
        attributes = getattr(value, "__dict__", None)
        return {"state": self.of(dict(attributes))} if attributes else {}

    def _sorted(self, values: Iterable[Any]) -> list[str]:
        known, found = self._known, []
        for each in values:
            self._known = {}  # of a cycle, it depends on the elements before, and so on their order
            found.append(json_digest(self.of(each)))
        self._known = known
        return sorted(found)

    def _array(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        if array.dtype.hasobject:
            content: Any = self.of(array.tolist())
        else:
            content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return {"dtype": str(array.dtype), "shape": list(array.shape), "content": content}

    def _module(self, module: nn.Module) -> dict[str, Any]:
        # What starts with "_" is torch's, and a pass may change it.
        attributes = {
            name: {
                each: self.of(value)
                for each, value in sorted(vars(part).items())
                if not each.startswith("_") and each != "training"
            }
            for name, part in module.named_modules()
        }
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {
            "of": {name: self.of(type(part)) for name, part in module.named_modules()},
            "attributes": attributes,
            "tensors": {name: _tensor(tensor) for name, tensor in tensors.items()},
        }

    def _source(self, kind: type) -> Any:
        if id(kind) not in self._sources:
            self._sources[id(kind)] = _source(kind)
        return self._sources[id(kind)]

    def _class(self, kind: type) -> dict[str, Any]:
        """A class by its name; with its code and attributes where it was not installed."""
        own = [each for each in kind.__mro__ if not _is_installed(str(each.__module__))]
        return {
            "name": _name(kind),
            "code": [self._source(each) for each in own],
            "attributes": [
                {
                    name: self.of(value)
                    for name, value in sorted(vars(each).items())
                    # Others are Python's and frameworks' notes on the class.
                    if not name.startswith("__") or isinstance(value, types.FunctionType)
                }
                for each in own
            ],
        }

    def beside_code(self, function: Any) -> dict[str, Any]:
        """Defaults, closure and attributes of a function; empty if it has none."""
        if not isinstance(function, types.FunctionType):  # of a cache in C, say
            inner = inspect.unwrap(function, stop=lambda each: isinstance(each, types.FunctionType))
            return {} if inner is function else self.beside_code(inner)
        attributes = {n: each for n, each in vars(function).items() if n != "__wrapped__"}
        found = {
            "defaults": self.of(function.__defaults__),
            "kwdefaults": self.of(function.__kwdefaults__),
            "closure": [self.of(_held(cell)) for cell in function.__closure__ or ()],
            "attributes": self.of(attributes),
            # The source is that of what it wraps.
            "wrapper": instructions(function.__code__) if "__wrapped__" in vars(function) else None,
        }
        return {name: each for name, each in found.items() if each}


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet
        return ...


def _tensor(tensor: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
    try:
        return found | fingerprints({"content": tensor})
    except Exception:  # of one without plain memory
        return found


def _name(kind: type) -> str:
    """A class's name; without its module if it is a script's, which has two names for it."""
    module = str(kind.__module__)
    return f"{module}.{kind.__qualname__}" if _is_installed(module) else kind.__qualname__


def _source(value: type | Callable[..., Any]) -> Any:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError, IndexError, SyntaxError):
        code = getattr(value, "__code__", None)
        return None if code is None else instructions(code)


@lru_cache(maxsize=1024)
def _is_installed(module: str) -> bool:
    """Whether a module is Python's, layerrl's or a package's, and not of a script or a project."""
    package = module.partition(".")[0]
    loaded = sys.modules.get(module)
    file = None if loaded is None else vars(loaded).get("__file__")  # none if built in, or a prompt
    if file is None or package == "layerrl":
        return package in ("layerrl", *sys.stdlib_module_names) and package != "__main__"
    path = Path(file)
    return path.is_relative_to(_STDLIB) or not {"site-packages", "dist-packages"}.isdisjoint(
        path.parts
    )
