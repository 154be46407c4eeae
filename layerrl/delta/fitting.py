"""Whether a model, or a checkpoint, is the base that a delta was made from; and if not, why."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerrl.delta.settings import differing_settings
from layerrl.errors import DeltaError, SelectionError
from layerrl.frozen import fingerprints
from layerrl.quantisation import is_quantised
from layerrl.selection.parsing import ranges
from layerrl.warning import warn

if TYPE_CHECKING:
    from layerrl.delta.folder import Delta
    from layerrl.delta.record import DeltaBase

_IN_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
Marks = dict[tuple[str, torch.dtype], list[str]]
"""Name of a tensor and dtype that it was converted to, to its fingerprint."""
_COMPUTING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
STAGES = (
    " If an earlier stage trained them, save that stage's delta and give both in order: "
    "[stage1, stage2]."
)


@dataclass(slots=True)
class Comparison:
    """What differs between a recorded base and what is there now."""

    base: DeltaBase
    names: set[str] = field(default_factory=set)
    """Recorded tensors that are there."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Shape of those with another one."""
    values: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Fingerprint of those with other values, in the recorded dtype and in their own."""
    uncompared: list[str] = field(default_factory=list)
    """Those that are quantised on one side."""
    extra: list[str] = field(default_factory=list)
    """Tensors of a model that the record has not."""
    marks: Marks = field(default_factory=dict)
    """Fingerprints taken so far, which comparisons of one model with several records share."""

    def add(self, name: str, there: str, *candidates: Tensor) -> None:
        """Compare a tensor with its record.

        Args:
            name: Its recorded name.
            there: Its name in what is compared.
            *candidates: The tensor; several if either of them would do. In any dtype: it counts as
                converted to the recorded one.

        Raises:
            DeltaError: If it has no values.
        """
        self.names.add(name)
        tensor = candidates[0]
        if tensor.is_meta:
            raise DeltaError(f"{name!r} is on the meta device: load the model's weights first")
        packed, was_packed = is_packed(tensor), name in self.base.quantised
        other_shape = list(tensor.shape) != self.base.shapes[name]
        if packed != was_packed or (packed and other_shape):  # or packed in another layout
            self.uncompared.append(name)
        elif other_shape:
            self.shapes[name] = list(tensor.shape)
        else:
            dtype = getattr(torch, self.base.dtypes[name])
            # What a delta puts there is another tensor for each stack.
            marks = self.marks if len(candidates) == 1 else {}
            try:
                if (there, dtype) not in marks:
                    marks[there, dtype] = [
                        fingerprints({"": t if t.dtype == dtype else t.detach().to(dtype)})[""]
                        for t in candidates
                    ]
            except RuntimeError as error:  # no conversion to a dtype of packed values
                raise DeltaError(
                    f"{name!r} is {tensor.dtype} and cannot be compared with the recorded "
                    f"{self.base.dtypes[name]}: {error}"
                ) from error
            if self.base.fingerprints[name] not in (found := marks[there, dtype]):
                self.values[name] = found[0], fingerprints({"": tensor.detach()})[""]


def is_packed(tensor: Tensor) -> bool:
    """Whether a parameter is what a quantisation stores; buffers of integers are not."""
    return isinstance(tensor, torch.nn.Parameter) and is_quantised(tensor)


def warn_of_nonfinite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Warn of trained values that no model computes with."""
    found = {}
    for name, tensor in tensors:
        if tensor.dtype in _COMPUTING and not (finite := tensor.isfinite()).all():
            found[name] = f"{int((~finite).sum())} of {tensor.numel()} elements of {name!r}"
    if found:
        warn(
            f"{what} has NaN or infinite values in {described(found)}: {next(iter(found.values()))}"
            f" ({len(found)} such tensors). A model computes nothing with them. Go back to an "
            "earlier checkpoint, and train on with a lower learning rate or in float32."
        )


def check_rounding(pairs: Iterable[tuple[str, Tensor, Tensor]], where: str, advice: str) -> None:
    """Refuse trained values that the base's dtype makes infinite; warn of those it rounds back.

    `pairs` are a name, the base's tensor and what takes its place in what `where` says; `advice`
    is a sentence without its end.

    Raises:
        DeltaError: If a finite value would become infinite.
    """
    lost = changed = 0
    infinite: dict[str, int] = {}
    for name, before, tensor in pairs:
        if tensor.dtype != before.dtype:
            rounded, before = tensor.to(before.dtype), before.detach().to(tensor.device)
            is_other = tensor != before  # few of an embedding of which new tokens' rows train
            changed += int(is_other.sum())
            lost += int(((rounded == before) & is_other).sum())
            if count := int((tensor.isfinite() & ~rounded.isfinite()).sum()):
                infinite[name] = count
    if infinite:
        raise DeltaError(
            f"{sum(infinite.values())} trained elements are too large for the base's dtype and "
            f"would become infinite, in {', '.join([*infinite][:3])} ({len(infinite)} tensors). "
            f"{advice}."
        )
    if lost:
        warn(
            f"{lost} elements ({lost / changed:.1%} of those that training changed) changed by "
            f"less than the base's dtype can hold: in {where} they are as before training. "
            f"{advice} to keep them."
        )


def check_model_type(delta: Delta, found: str | None) -> None:
    """The architecture must be the one that the delta was made from."""
    if found != delta.base.model_type:
        raise DeltaError(
            f"the delta at {delta.path} was made from a model of type {delta.base.model_type!r}, "
            f"this one is {found!r}. Its base is {origin(delta)}."
        )


def misfit(delta: Delta, what: str, error: SelectionError) -> str:
    """The sentence for a model that a delta's selection does not fit."""
    resized = " with resized embeddings, saved before it was trained"
    return (
        f"the delta at {delta.path} does not fit {what}: {str(error).rstrip('.')}. Its base is "
        f"{origin(delta)}{resized if delta.selection.token_rows else ''}."
    )


def check_base(
    delta: Delta, found: Comparison, *, config: Mapping[str, Any] | None, hint: str = STAGES
) -> None:
    """Refuse a base that is not the recorded one; warn of what cannot be compared."""
    base, path = delta.base, delta.path
    missing = [name for name in base.fingerprints if name not in found.names]
    if missing:
        raise DeltaError(
            f"{len(missing)} of {len(base.fingerprints)} tensors that the base of the delta at "
            f"{path} had are not there: {described(missing)}. Its base is {origin(delta)}."
        )
    for name, shape in found.shapes.items():
        then = base.shapes[name]
        if base.vocabulary and then[:1] == [base.vocabulary] and shape[1:] == then[1:]:
            raise DeltaError(
                f"this base has a vocabulary of {shape[0]} rows ({name!r}), the delta at {path} "
                f"was made on one of {base.vocabulary}: tokens were added or removed after the "
                "base was loaded. Save the model with resized embeddings (model.save_pretrained) "
                "before training, and use that as the base."
            )
    for name in sorted(found.shapes, key=lambda name: name not in base.trained):
        raise DeltaError(
            f"{name!r} has shape {found.shapes[name]}, in the delta at {path} it is "
            f"{base.shapes[name]}: another base than {origin(delta)}, which it was made from"
        )
    if base.config is not None and config is not None:
        check_settings(base.config, config, f"the delta at {path} was made from, {origin(delta)}")
    if found.values:
        raise DeltaError(_other_values(delta, found.values, hint))
    if delta.version == 1:
        _warn_of_version(delta)
    if found.uncompared:
        warn(
            f"{len(found.uncompared)} of {len(base.fingerprints)} tensors are quantised here or "
            f"were when the delta at {path} was trained, and cannot be compared with the others: "
            f"{described(found.uncompared)}."
        )


def check_same_base(delta: Delta, base: DeltaBase) -> None:
    """Refuse a delta that was made from another base than the run's, dtypes included."""
    then, path = delta.base, delta.path
    check_model_type(delta, base.model_type)
    if delta.version > 1:
        if then.vocabulary != base.vocabulary:
            raise DeltaError(
                f"{path} was made on a vocabulary of {then.vocabulary} rows, this run's base has "
                f"{base.vocabulary}: resize the embeddings as they were, before the trainer is made"
            )
        if then.config is not None and base.config is not None:
            check_settings(then.config, base.config, f"{path} was made from")
    names = {*then.fingerprints} | ({*base.fingerprints} if delta.version > 1 else set())
    differing = [
        name
        for name in sorted(names, key=lambda name: (name not in then.trained, name))
        if then.fingerprints.get(name) != base.fingerprints.get(name)
        or then.shapes.get(name) != base.shapes.get(name)
    ]
    if differing:
        name = differing[0]
        raise DeltaError(
            f"{path} was made from another base than this run's: the fingerprint of {name!r} is "
            f"{base.fingerprints.get(name)}, expected {then.fingerprints.get(name)}. "
            f"{len(differing)} of {len(names)} recorded tensors differ: {described(differing)}. "
            "Start from the model that the run started from: if an earlier stage trained them, "
            "load or merge that stage's delta first."
        )
    if delta.version == 1:
        _warn_of_version(delta)


def check_settings(recorded: Mapping[str, Any], now: Mapping[str, Any], whose: str) -> None:
    """The config must compute what the recorded one did."""
    differing = differing_settings(now, recorded)
    if differing:
        raise DeltaError(
            f"the config computes otherwise than that of the model that {whose}: "
            f"{'; '.join(list(differing.values())[:5])} ({len(differing)} settings differ). Use "
            "the config that it was trained with."
        )


def _warn_of_version(delta: Delta) -> None:
    warn(
        f"the delta at {delta.path} has format version 1, which knows only the "
        f"{len(delta.base.trained)} tensors that it replaces: whether the frozen tensors, the "
        "vocabulary and the config are those that it was trained with cannot be checked."
    )


def _other_values(delta: Delta, values: Mapping[str, tuple[str, str]], hint: str) -> str:
    base, path = delta.base, delta.path
    trained = [name for name in base.trained if name in values]
    first = next(iter(trained or values))
    found, as_it_is = values[first]
    if trained and len(trained) == len(values) and as_it_is == delta.fingerprints[first]:
        return f"the delta at {path} is already in this model ({first!r} holds it)"
    text = (
        f"{first!r} is not the {'tensor' if trained else 'frozen tensor'} that the delta at {path} "
        f"was {'made from' if trained else 'trained with'}: fingerprint {found}, expected "
        f"{base.fingerprints[first]}. Its base is {origin(delta)}, in {base.dtypes[first]}; other "
        f"weights, or the same rounded to fewer bits, are refused. {len(values)} of "
        f"{len(base.fingerprints)} recorded tensors differ: {described(values)}."
    )
    return text + hint


def origin(delta: Delta) -> str:
    """Where a delta's base came from."""
    revision = f" at {delta.base.revision}" if delta.base.revision else ""
    return f"{delta.base.name or 'an unnamed model'}{revision}"


def place_of(name: str) -> tuple[str, int] | None:
    """The list and number of the layer that a tensor's name says it is in."""
    inside = _IN_LAYER.match(name)
    return (inside[1], int(inside[2])) if inside else None


def described(names: Iterable[str]) -> str:
    """Tensors in few words: which layers, and the first few outside."""
    layers: dict[str, set[int]] = {}
    outside: list[str] = []
    for name in names:
        place = place_of(name)
        if place is not None:
            layers.setdefault(place[0], set()).add(place[1])
        else:
            outside.append(name)
    texts = [_layers(path, numbers) for path, numbers in layers.items()] + outside[:3]
    return ", ".join(texts) + (", ..." if len(outside) > 3 else "")


def _layers(path: str, numbers: Collection[int]) -> str:
    word = "layer" if len(numbers) == 1 else "layers"
    return f"{word} {ranges(tuple(sorted(numbers)))} of {path!r}"
