"""Base and trained model in one, in memory: a delta taken out, left out for a while, or switched.

What a delta replaced is kept beside the model, not in it: copies and saved models hold nothing of
it, and it goes with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.checks import check_kind, shown
from layerrl.delta.in_memory import checked
from layerrl.delta.placing import copies, like, memory_form, named_parameters, present, put_values
from layerrl.delta.stacks import read_deltas
from layerrl.errors import DeltaError
from layerrl.frozen import fingerprints
from layerrl.seams import imported
from layerrl.shards import is_sharded, shape

with imported():
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from layerrl.delta.folder import Delta


@dataclass(slots=True, kw_only=True)
class _Loaded:
    """What is kept of the base of a model with deltas in it."""

    deltas: list[Delta]
    """What was loaded, for messages."""
    base: dict[str, Tensor] | None
    """Name in the model to what was there before any delta; None: not kept."""
    marks: dict[str, tuple[torch.dtype, str]]
    """Name to dtype and fingerprint of what deltas put there."""
    switching: bool = False
    """Whether a `Deltas` says what is in the model."""
    disabled: bool = False
    """Whether the base is in the model for a while."""


# By the model without wrappers. The values must not lead to their model, or it would never go.
_LOADED: WeakKeyDictionary[nn.Module, _Loaded] = WeakKeyDictionary()


@contextmanager
def keeping(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    deltas: list[Delta],
    *,
    keep_base: bool | None,
) -> Iterator[None]:
    """Keep what the block is going to overwrite with deltas.

    Args:
        model: The model, with other deltas in it or none.
        trained: Name to parameter to overwrite.
        deltas: What it is overwritten with, for messages.
        keep_base: As `load_delta` takes it.

    Yields:
        Nothing. Nothing is kept if the block raises.

    Raises:
        DeltaError: If the base below an earlier delta is to be kept, which was not.
    """
    inner = unwrap(model)
    earlier = _LOADED.get(inner)
    if earlier is not None and _replaced_since(model, earlier):
        earlier = None  # the model is another base now, or the base again
    if keep_base and earlier is not None and earlier.base is None:
        raise DeltaError(_not_kept(model, earlier))
    if keep_base is None:
        keep_base = 2 * _nbytes(trained.values()) <= _nbytes(inner.parameters())
    base = None
    if keep_base and (earlier is None or earlier.base is not None):
        base = copies(trained) | ((earlier and earlier.base) or {})
    yield
    marks = (earlier.marks if earlier else {}) | _marks(trained)
    deltas = [*(earlier.deltas if earlier else []), *deltas]
    _LOADED[inner] = _Loaded(deltas=deltas, base=base, marks=marks)


def unload_delta(model: nn.Module) -> None:
    """Take every loaded delta out of a model: it is the base again, bit for bit.

    What was trained since in the deltas' tensors is lost. What was kept of the base is let go.

    Args:
        model: A model that `load_delta` or `Deltas` put deltas into, wrapped or not. Its
            parameters stay the same objects. Collective where it is sharded.

    Raises:
        DeltaError: If no delta is in the model, what it replaced was not kept, or the model is
            inside `disabled`.
    """
    loaded, base = _in_use(model)
    _refuse_disabled(model, loaded)
    put_values(model, base)
    del _LOADED[unwrap(model)]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute with the base inside, with the trained values afterwards, also after an exception.

    The loaded deltas' tensors get the base's values in place, and their own back as they were on
    entry, with what was trained since they were loaded. A loss from before the block can be
    differentiated after it; one from inside must be differentiated inside. A block inside another
    changes nothing.

    Args:
        model: A model that `load_delta` or `Deltas` put deltas into, wrapped or not. Beside the
            base's values, the trained ones are kept during the block: twice the delta's bytes.

    Yields:
        Nothing: use the model.

    Raises:
        DeltaError: If no delta is in the model, or what it replaced was not kept.

    Example:
        load_delta(model, "out/layer-10")
        trained = model(**batch).logits
        with torch.no_grad(), disabled(model):
            base = model(**batch).logits
    """
    loaded, base = _in_use(model)
    if loaded.disabled:
        yield
        return
    parameters = present(model, base)
    own = copies(parameters)
    # Autograd sees other values inside and the same as before afterwards, which they are.
    counted = tuple(p for p in parameters.values() if not p.is_inference())
    with _unsafe_preserve_version_counter(counted):
        loaded.disabled = True
        try:
            put_values(model, base)
            yield
        finally:
            loaded.disabled = False
            put_values(model, own)


class Deltas:
    """Several deltas of one base in one model, of which one is in use, switched in place.

    All checks of `load_delta` are made here, once. It keeps the values of every delta and what
    they replace, in the model's dtype where the model is: of n deltas of one layer, n + 1 times
    the bytes of that layer. They may be of the same layers or of different ones.

    Args:
        model: The base, wrapped or not, with no delta in it. Not changed yet.
        paths: Name of your choice to a delta's folder; or to several, in the order in which they
            were trained on top of each other.

    Raises:
        DeltaError: As `load_delta`, or if a delta is in the model already.

    Example:
        deltas = Deltas(model, {"layer 10": "out/layer-10", "layer 14": "out/layer-14"})
        deltas.use("layer 14")
        deltas.use(None)  # the base
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str | os.PathLike[str] | Iterable[str | os.PathLike[str]]],
    ) -> None:
        there = deltas_in(model)
        named = isinstance(paths, Mapping) and all(isinstance(name, str) for name in paths)
        if not named or not paths:
            raise DeltaError(
                f"paths is {shown(paths)}, expected a name for each delta: "
                '{"a": "out/a", "b": "out/b"}'
            )
        if there:
            raise DeltaError(
                f"the delta at {there[-1].path} is in this {_name(model)}, expected the base "
                "alone: unload_delta(model) first"
            )
        self._model, self.current = model, None
        deltas = {name: read_deltas(each) for name, each in paths.items()}
        others = [delta for stack in deltas.values() for delta in stack]
        self._values: dict[str, dict[str, Tensor]] = {}
        touched: dict[str, nn.Parameter] = {}
        for name, stack in deltas.items():
            trained, tensors = checked(model, stack, others=others)
            values = memory_form(model, trained, tensors)
            self._values[name] = {n: like(value, trained[n]) for n, value in values}
            touched |= trained
        self._base = copies(touched)
        self._changed: set[str] = set()
        self._loaded = _Loaded(deltas=others, base=self._base, marks={}, switching=True)
        _LOADED[unwrap(model)] = self._loaded

    current: str | None
    """Name of the delta in use; None: the base."""

    def use(self, name: str | None) -> None:
        """Put one of the deltas into the model in place of the one in use.

        Only tensors of the two are copied; parameters stay the same objects in the same memory.
        What was trained since in these tensors is lost.

        Args:
            name: Its name; None: the base, bit for bit.

        Raises:
            DeltaError: If there is none of this name, `unload_delta` took all of them out, or the
                model is inside `disabled`.
        """
        if name is not None and not (isinstance(name, str) and name in self._values):
            names = ", ".join(map(repr, self._values))
            raise DeltaError(f"no delta {shown(name)} here, expected {names}, or None for the base")
        if _LOADED.get(unwrap(self._model)) is not self._loaded:
            raise DeltaError(
                f"unload_delta took these deltas out of the {_name(self._model)}: make another "
                "Deltas to use them"
            )
        _refuse_disabled(self._model, self._loaded)
        values = {} if name is None else self._values[name]
        back = self._base if name is None else {n: self._base[n] for n in self._changed}
        self._changed |= {*values}
        put_values(self._model, back | values)
        self._changed, self.current = {*values}, name

    def __repr__(self) -> str:
        return f"Deltas({', '.join(map(repr, self._values))}; in use: {self.current!r})"


def deltas_in(model: nn.Module) -> list[Delta]:
    """The deltas in a model that others are to be loaded into.

    Args:
        model: Any.

    Returns:
        Them, in the order in which they were loaded; none if all of their tensors were replaced.

    Raises:
        DeltaError: If it is no model, a `Deltas` switches its deltas, or they are disabled.
    """
    expected = (
        "a model to load the delta into. To write a merged checkpoint from folders, use "
        "merge_delta(base, path, out)."
    )
    check_kind("model", model, nn.Module, expected, DeltaError)
    loaded = _LOADED.get(unwrap(model))
    if loaded is None:
        return []
    _refuse_disabled(model, loaded)
    if loaded.switching:
        raise DeltaError(
            f"a Deltas switches the deltas of this {_name(model)}: unload_delta(model) first, or "
            "give it this one as well"
        )
    return [] if _replaced_since(model, loaded) else loaded.deltas


def _refuse_disabled(model: nn.Module, loaded: _Loaded) -> None:
    if loaded.disabled:
        raise DeltaError(
            f"the deltas of this {_name(model)} are disabled: leave the `with disabled(model)` "
            "block first"
        )


def _in_use(model: nn.Module) -> tuple[_Loaded, dict[str, Tensor]]:
    """What is kept for a model, and the base's values."""
    check_kind("model", model, nn.Module, "the model with the delta in it", DeltaError)
    loaded = _LOADED.get(unwrap(model))
    if loaded is None:
        raise DeltaError(
            f"no delta is loaded in this {_name(model)}, expected the model that load_delta or "
            "Deltas put one into, and no copy of it"
        )
    if loaded.base is None:
        raise DeltaError(_not_kept(model, loaded))
    return loaded, loaded.base


def _not_kept(model: nn.Module, loaded: _Loaded) -> str:
    return (
        f"what the delta at {loaded.deltas[-1].path} replaced in this {_name(model)} was not kept "
        "(without keep_base, up to half of the model is): load the base again, and every delta "
        "with keep_base=True"
    )


def _name(model: nn.Module) -> str:
    return type(unwrap(model)).__name__


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(shape(p).numel() * p.element_size() for p in parameters)


def _marks(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[torch.dtype, str]]:
    """Dtype and fingerprint of values that can be compared later: not of shards."""
    marks = fingerprints({name: p for name, p in parameters.items() if not is_sharded(p)})
    return {name: (parameters[name].dtype, mark) for name, mark in marks.items()}


def _replaced_since(model: nn.Module, loaded: _Loaded) -> bool:
    """Whether nothing that deltas put into a model is there any more, as far as can be told."""
    named = named_parameters(model)
    now = _marks({name: named[name] for name in loaded.marks if name in named})
    pairs = [(mark, loaded.marks[name]) for name, mark in now.items()]
    # What was cast since has other bits and may be the same.
    return bool(pairs) and all(m != then and m[0] == then[0] for m, then in pairs)
