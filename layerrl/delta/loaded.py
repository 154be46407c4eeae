"""Base and trained model in one, in memory: a delta taken out, or left out for a while.

What a delta replaced is kept beside the model, not in it: copies and saved models hold nothing of
it, and it goes with the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.checks import check_kind
from layerrl.delta.folder import Delta
from layerrl.delta.placing import (
    all_differ,
    copies,
    named_parameters,
    present,
    put_values,
    surroundings,
)
from layerrl.errors import DeltaError
from layerrl.frozen import fingerprints
from layerrl.seams import imported
from layerrl.shards import is_sharded, shape
from layerrl.warning import warn

with imported():
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter


@dataclass(slots=True, kw_only=True)
class Loaded:
    """What is kept of the base of a model with deltas in it."""

    deltas: list[Delta]
    """What was loaded, for messages."""
    base: dict[str, Tensor] | None
    """Name in the model to what was there before any delta; None: not kept."""
    marks: dict[str, tuple[torch.dtype, str]]
    """Name to dtype and fingerprint of what deltas put there."""
    around: dict[str, Tensor]
    """Name to a row of a few tensors that they leave as they are."""
    switching: bool = False
    """Whether a `Deltas` says what is in the model."""
    num_inside: int = 0
    """Blocks of `disabled` that are open, in any thread: the base is in the model."""
    leaving: ExitStack = field(default_factory=ExitStack)
    """Puts the deltas back; closed when the last `disabled` block ends."""


# By the model without wrappers. The values must not lead to their model, or it would never go.
LOADED: WeakKeyDictionary[nn.Module, Loaded] = WeakKeyDictionary()
# The same thread may come again: whatever runs can end a block that was left open in a generator.
_LOCK = RLock()


@contextmanager
def keeping(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    deltas: list[Delta],
    *,
    keep_base: bool | None,
) -> Iterator[None]:
    """Keep what the block overwrites with deltas (`trained`, by name); take it back if it raises.

    Raises:
        DeltaError: If the base below an earlier delta is to be kept, which was not.
    """
    inner = unwrap(model)
    earlier = LOADED.get(inner)
    if earlier is not None and _replaced_since(model, earlier):
        earlier = None  # the model is another base now, or the base again
    if keep_base and earlier is not None and earlier.base is None:
        raise DeltaError(_not_kept(model, earlier))
    if keep_base is None:
        keep_base = 2 * _nbytes(trained.values()) <= _nbytes(inner.parameters())
    keeps = keep_base and (earlier is None or earlier.base is not None)
    own = copies(trained) if keeps else {}
    base = own | ((earlier and earlier.base) or {}) if keeps else None
    try:
        yield
    except BaseException:
        put_values(model, own)
        raise
    marks = (earlier.marks if earlier else {}) | _marks(trained)
    deltas = [*(earlier.deltas if earlier else []), *deltas]
    around = surroundings(model, marks)
    LOADED[inner] = Loaded(deltas=deltas, base=base, marks=marks, around=around)


def unload_delta(model: nn.Module) -> None:
    """Take every loaded delta out of a model: it is the base again, bit for bit.

    What was trained since in the deltas' tensors is lost. What was kept of the base is let go.

    Args:
        model: A model that `load_delta` or `Deltas` put deltas into, wrapped or not. Its
            parameters stay the same objects. Collective where it is sharded.

    Raises:
        DeltaError: If no delta is in the model, what it replaced was not kept, the model is inside
            `disabled`, has other weights everywhere, or has adapters merged into the tensors.
    """
    _, base = _in_use(model)
    refuse_disabled(model)
    put_values(model, base)
    del LOADED[unwrap(model)]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute with the base inside, with the trained values afterwards, also after an exception.

    The loaded deltas' tensors get the base's values in place, and their own back as they were on
    entry, with what was trained since they were loaded. A loss from before the block can be
    differentiated after it; one from inside must be differentiated inside. Of blocks inside each
    other or in several threads, the last one that ends puts the trained values back.

    Args:
        model: A model that `load_delta` or `Deltas` put deltas into, wrapped or not. Beside the
            base's values, the trained ones are kept during the block: twice the delta's bytes.

    Yields:
        Nothing: use the model.

    Raises:
        DeltaError: If no delta is in the model, what it replaced was not kept, or the model has
            other weights everywhere, or adapters merged into the tensors.

    Example:
        load_delta(model, "out/layer-10")
        trained = model(**batch).logits
        with torch.no_grad(), disabled(model):
            base = model(**batch).logits
    """
    loaded, base = _in_use(model)
    with _LOCK:
        if not loaded.num_inside:
            loaded.leaving = _base_put_in(model, base)
        loaded.num_inside += 1
    try:
        yield
    finally:
        with _LOCK:
            loaded.num_inside -= 1
            if not loaded.num_inside:
                loaded.leaving.close()


def _base_put_in(model: nn.Module, base: Mapping[str, Tensor]) -> ExitStack:
    """Put the base into the model; closed, what it returns puts back what was there."""
    parameters = present(model, base)
    own = copies(parameters)
    counted = tuple(p for p in parameters.values() if not p.is_inference())
    with ExitStack() as stack:
        # Autograd sees other values inside and the same as before afterwards, which they are.
        stack.enter_context(_unsafe_preserve_version_counter(counted))
        stack.callback(put_values, model, own)
        put_values(model, base)
        stack.callback(_warn_of_writes, [(p, p._version) for p in counted])
        return stack.pop_all()


def _warn_of_writes(versions: Iterable[tuple[nn.Parameter, int]]) -> None:
    if any(p._version != version for p, version in versions if not is_sharded(p)):
        warn(
            "tensors of deltas were written to inside `with disabled(model)`: what was trained or "
            "loaded there is lost now. Train outside of the block."
        )


def deltas_in(model: nn.Module) -> list[Delta]:
    """The deltas in a model to load others into, in order; none if their tensors were replaced."""
    expected = (
        "a model to load the delta into. To write a merged checkpoint from folders, use "
        "merge_delta(base, path, out)."
    )
    check_kind("model", model, nn.Module, expected, DeltaError)
    loaded = LOADED.get(unwrap(model))
    if loaded is None:
        return []
    refuse_disabled(model)
    if loaded.switching:
        raise DeltaError(
            f"a Deltas switches the deltas of this {name_of(model)}: unload_delta(model) first, or "
            "give it this one as well"
        )
    return [] if _replaced_since(model, loaded) else loaded.deltas


def refuse_disabled(model: nn.Module) -> None:
    """Refuse a model that is inside `disabled`."""
    loaded = LOADED.get(unwrap(model))
    if loaded is not None and loaded.num_inside:
        raise DeltaError(
            f"the deltas of this {name_of(model)} are disabled: leave the `with disabled(model)` "
            "block first"
        )


def _in_use(model: nn.Module) -> tuple[Loaded, dict[str, Tensor]]:
    """What is kept for a model, and the base's values."""
    check_kind("model", model, nn.Module, "the model with the delta in it", DeltaError)
    loaded = LOADED.get(unwrap(model))
    if loaded is None:
        raise DeltaError(
            f"no delta is loaded in this {name_of(model)}, expected the model that load_delta or "
            "Deltas put one into, and no copy of it"
        )
    if loaded.base is None:
        raise DeltaError(_not_kept(model, loaded))
    refuse_another(model, loaded, loaded.base)
    return loaded, loaded.base


def refuse_another(model: nn.Module, loaded: Loaded, names: Iterable[str]) -> None:
    """Other weights may have been loaded into the same model: a base around which it is none."""
    if all_differ(surroundings(model, names), loaded.around):
        raise DeltaError(
            f"this {name_of(model)} has other weights than when the delta at "
            f"{loaded.deltas[-1].path} was loaded, also where it trained nothing: what it replaced "
            "does not belong there. Load the base again"
        )


def _not_kept(model: nn.Module, loaded: Loaded) -> str:
    return (
        f"what the delta at {loaded.deltas[-1].path} replaced in this {name_of(model)} was not "
        "kept (without keep_base, up to half of the model is): load the base again, and every "
        "delta with keep_base=True"
    )


def name_of(model: nn.Module) -> str:
    """The class of a model, for messages."""
    return type(unwrap(model)).__name__


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(shape(p).numel() * p.element_size() for p in parameters)


def _marks(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[torch.dtype, str]]:
    """Dtype and fingerprint of values that can be compared later: not of shards."""
    marks = fingerprints({name: p for name, p in parameters.items() if not is_sharded(p)})
    return {name: (parameters[name].dtype, mark) for name, mark in marks.items()}


def _replaced_since(model: nn.Module, loaded: Loaded) -> bool:
    """Whether nothing that deltas put into a model is there any more, as far as can be told."""
    named = named_parameters(model)
    now = _marks({name: named[name] for name in loaded.marks if name in named})
    pairs = [(mark, loaded.marks[name]) for name, mark in now.items()]
    # What was cast since has other bits and may be the same.
    return bool(pairs) and all(m != then and m[0] == then[0] for m, then in pairs)
