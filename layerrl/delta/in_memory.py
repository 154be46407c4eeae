"""A model in memory compared with what deltas were made from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from layerrl.adapters import adapter_tensors
from layerrl.blocks import unwrap
from layerrl.delta.fitting import (
    Comparison,
    Marks,
    check_base,
    check_model_type,
    check_rounding,
    described,
    misfit,
    origin,
    warn_of_nonfinite,
)
from layerrl.delta.folder import Delta, difference
from layerrl.delta.record import (
    DeltaBase,
    checkpoint_form,
    checkpoint_names,
    in_checkpoint_form,
    model_type,
    stand_ins,
)
from layerrl.delta.settings import computing_settings
from layerrl.delta.stacks import hint, refuse_overlap
from layerrl.errors import DeltaError, SelectionError
from layerrl.frozen import fingerprints_of_rows, saved_tensors
from layerrl.selection import LayerSelection
from layerrl.selection.masked import check_can_change
from layerrl.selection.parts import rows_kept


def checked(
    model: nn.Module,
    deltas: Sequence[Delta],
    *,
    union: bool = False,
    others: Sequence[Delta] = (),
    there: Sequence[Delta] = (),
    marks: Marks | None = None,
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Return what deltas write into a model that they were made from. Collective where sharded.

    `others` are further deltas that the caller was given, `there` those in the model, for hints;
    `marks`: fingerprints of the model as it is, taken so far.

    Returns:
        Name in the model to parameter, and name in a checkpoint to value, as `put_tensors` takes
        them.

    Raises:
        DeltaError: As `load_delta`.
    """
    check_can_change(model, DeltaError)
    trained: dict[str, nn.Parameter] = {}
    tensors: dict[str, Tensor] = {}
    source: dict[str, Delta] = {}
    config = getattr(unwrap(model), "config", None)
    settings = None if config is None else computing_settings(config)
    marks = {} if marks is None else marks
    for index, delta in enumerate(deltas):
        trained |= _parameters(model, delta)
        if union:
            refuse_overlap(delta, delta.fingerprints, source)
        found = compared(model, delta.base, above={} if union else tensors, marks=marks)
        if found.extra and delta.version > 1:
            raise DeltaError(
                f"{type(unwrap(model)).__name__} has {len(found.extra)} tensors that the base of "
                f"the delta at {delta.path} had not: {described(found.extra)}. Load it into a "
                "model without."
            )
        what = hint(deltas, index, union=union, others=others, there=there)
        check_base(delta, found, config=settings, hint=what)
        own = whole_tensors(delta, model, {} if union else tensors)
        warn_of_nonfinite(own.items(), f"the delta at {delta.path}")
        tensors |= own
        source |= dict.fromkeys(own, delta)
    pairs = (
        (name, before, tensors[name])
        for _, form in in_checkpoint_form(model, trained)
        for name, before in form.items()
    )
    check_rounding(pairs, f"this {type(unwrap(model)).__name__}", "Load the base in float32")
    return trained, tensors


def names_by_rows(model: nn.Module, selection: LayerSelection) -> set[str]:
    """Names in a checkpoint of the tensors of which some rows train; mostly none."""
    return set(checkpoint_form(model, stand_ins(_by_rows(model, selection))))


def kept_rows(model: nn.Module, selection: LayerSelection, base: DeltaBase) -> dict[str, str]:
    """Fingerprints, by name, of a model's rows that do not train, in the dtypes of the record."""
    dtypes = {
        name: getattr(torch, base.dtypes[known])
        for name, parameter in _by_rows(model, selection).items()
        for known in checkpoint_form(model, stand_ins({name: parameter}))
    }
    return fingerprints_of_rows(model, selection, dtypes=dtypes)


def _by_rows(model: nn.Module, selection: LayerSelection) -> dict[str, nn.Parameter]:
    kept = rows_kept(selection, unwrap(model))
    return {name: p for name, p in selection.parameters(model).items() if name in kept}


def whole_tensors(delta: Delta, model: nn.Module, above: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a delta's tensors by name in a checkpoint, new tokens' rows among the model's others.

    `above` is, by that name, what earlier deltas put there. Collective where the model is sharded.
    """
    below: dict[str, Tensor] = {}
    if delta.by_rows:
        for _, form in in_checkpoint_form(model, _by_rows(model, delta.selection)):
            below |= form
    below |= above
    return {name: delta.tensor(name, below.__getitem__) for name in delta.fingerprints}


def _parameters(model: nn.Module, delta: Delta) -> dict[str, nn.Parameter]:
    """What a delta trained, which must be saved under the names that it has."""
    check_model_type(delta, model_type(model))
    try:
        trained = delta.selection.parameters(model)
    except SelectionError as error:
        raise DeltaError(misfit(delta, "the model", error)) from error
    current = set(checkpoint_form(model, stand_ins(trained)))
    if current != set(delta.fingerprints):
        raise DeltaError(
            f"the delta at {delta.path} does not fit {type(unwrap(model)).__name__}: "
            f"{difference(delta.fingerprints, dict.fromkeys(current))}. "
            f"Its base is {origin(delta)}."
            + (" Load it before PEFT's adapters are added." if adapter_tensors(model) else "")
        )
    return trained


def compared(
    model: nn.Module,
    base: DeltaBase,
    *,
    leave_out: Collection[str] = frozenset(),
    above: Mapping[str, Tensor] | None = None,
    marks: Marks | None = None,
) -> Comparison:
    """Return what differs between a model and a record. Collective where the model is sharded.

    What a delta puts in a tensor's place (`above`) counts as it is, or as the model's dtype rounds
    it. `marks`: fingerprints of the model as it is, taken so far; more are added.
    """
    found, above = Comparison(base, marks={} if marks is None else marks), above or {}
    tensors, tied = saved_tensors(model)
    names: dict[str, list[str]] = {}
    for alias, first in checkpoint_names(model, tensors, tied).items():
        names.setdefault(first, []).append(alias)
    for _, form in in_checkpoint_form(model, tensors):
        for name, tensor in form.items():
            recorded = {base.tied.get(n, n) for n in (name, *names.get(name, ()))}
            for known in sorted(recorded & {*base.fingerprints} - {*leave_out}):
                new = above.get(known)
                found.add(known, name, *([tensor] if new is None else [new, new.to(tensor.dtype)]))
            if not recorded & {*base.fingerprints}:
                found.extra.append(name)
    return found
