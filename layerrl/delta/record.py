"""The record of a whole base: every tensor, the vocabulary, what its config computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerrl.blocks import embedding_of, unwrap
from layerrl.checks import check_kind
from layerrl.delta.fitting import is_packed, place_of
from layerrl.delta.origin import commit_of
from layerrl.delta.settings import computing_settings
from layerrl.digests import json_digest
from layerrl.errors import DeltaError
from layerrl.frozen import fingerprints, fingerprints_of_rows, saved_tensors
from layerrl.replacing import replaced
from layerrl.seams import imported
from layerrl.selection import LayerSelection
from layerrl.shards import is_sharded, shape, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBase:
    """The whole model that a delta will be applied to, taken before training."""

    name: str | None
    """Hub id or folder that the base came from, where its config says so."""
    revision: str | None
    """Commit of that hub id, where the files in the cache say so."""
    model_type: str | None
    """The config's architecture, `"llama"`."""
    trained: tuple[str, ...]
    """Checkpoint names of the tensors that the delta replaces."""
    dtypes: dict[str, str]
    """Checkpoint name to dtype of every tensor, trained and frozen, persistent buffers included."""
    shapes: dict[str, list[int]]
    """Checkpoint name to shape of each of them."""
    fingerprints: dict[str, str]
    """Checkpoint name to fingerprint of each of them."""
    tied: dict[str, str]
    """Further names of shared tensors, to the name that is recorded above."""
    quantised: tuple[str, ...]
    """Those of them that were packed by a quantisation."""
    vocabulary: int | None
    """Rows of the input embedding."""
    config: dict[str, Any] | None
    """Settings of the config that change what it computes; None: a model without one."""
    kept_rows: dict[str, str] = field(default_factory=dict, compare=False)
    """Fingerprints of rows of trained tensors that do not train. Of the run; not in the delta."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        selection: LayerSelection,
        *,
        frozen: Mapping[str, str] | None = None,
        device: torch.device | None = None,
    ) -> DeltaBase:
        """Record a model as it is now: call it before training.

        Args:
            model: The model that will be trained. Not changed. Collective: call on every rank where
                it is sharded.
            selection: What will train.
            frozen: `fingerprints(frozen_tensors(model, selection))` of this moment, if you have
                them: these tensors are not read again, unless their form on disk differs.
            device: Where to compute the fingerprints of tensors on the CPU; None: there.

        Returns:
            The record that `save_delta` takes as `base`.

        Raises:
            DeltaError: If an argument is of another type.
            SelectionError: If the selection does not fit the model.
        """
        _check_arguments(model, selection, frozen, device)
        trained = checkpoint_form(model, stand_ins(selection.parameters(model)))
        tensors, tied = saved_tensors(model)
        dtypes, shapes, marks, packed = {}, {}, {}, []
        for source, form in in_checkpoint_form(model, tensors):
            for name, tensor in form.items():
                dtypes[name] = dtype_name(tensor)
                shapes[name] = list(tensor.shape)
            packed += [name for name in form if any(is_packed(tensors[n]) for n in source)]
            # What shards hold has fingerprints of their own, and what is converted is other bits.
            known = None
            if len(source) == 1 and not is_sharded(tensors[source[0]]):
                [mine] = source
                if all(tensor is tensors[mine] for tensor in form.values()):
                    known = (frozen or {}).get(mine)
            marks |= dict.fromkeys(form, known) if known else fingerprints(form, device=device)
        config = getattr(unwrap(model), "config", None)
        record = cls(
            name=getattr(config, "name_or_path", None) or None,
            revision=getattr(config, "_commit_hash", None),
            model_type=model_type(model),
            trained=tuple(trained),
            dtypes=dtypes,
            shapes=shapes,
            fingerprints=marks,
            tied=checkpoint_names(model, tensors, tied),
            quantised=tuple(packed),
            vocabulary=vocabulary(model),
            config=None if config is None else computing_settings(config),
            kept_rows=fingerprints_of_rows(model, selection, device=device),
        )
        if record.name is None or record.revision is not None:
            return record
        return replace(record, revision=commit_of(record))

    @property
    def digest(self) -> str:
        """One number for all tensors: that of a delta's base and of its result tell a stack."""
        return json_digest(self.fingerprints)

    def as_json(self) -> dict[str, Any]:
        """What `delta.json` holds of it beside the trained tensors."""
        return {
            "digest": self.digest,
            "vocabulary": self.vocabulary,
            "config": self.config,
            "tied": self.tied,
            "quantised": list(self.quantised),
            "frozen": {
                name: {
                    "dtype": self.dtypes[name],
                    "shape": self.shapes[name],
                    "fingerprint": self.fingerprints[name],
                }
                for name in self.fingerprints
                if name not in set(self.trained)
            },
        }


def _check_arguments(model: object, selection: object, frozen: object, device: object) -> None:
    check_kind("model", model, nn.Module, "a model", DeltaError)
    selected = "what select_layers returns"
    check_kind("selection", selection, LayerSelection, selected, DeltaError)
    if frozen is not None:
        check_kind("frozen", frozen, Mapping, "fingerprints by name, or None", DeltaError)
    if device is not None:
        check_kind("device", device, torch.device, "a torch.device or None", DeltaError)


def dtype_name(tensor: Tensor) -> str:
    """`"bfloat16"`."""
    return str(tensor.dtype).removeprefix("torch.")


def model_type(model: nn.Module) -> str | None:
    """The architecture that a model's config names."""
    return getattr(getattr(unwrap(model), "config", None), "model_type", None)


def vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding; None where there is none."""
    weight = getattr(embedding_of(model), "weight", None)
    return None if weight is None else shape(weight)[0]


def in_checkpoint_form(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Tensors as a checkpoint would hold them, a few at a time. Collective where they are sharded.

    Most are only named otherwise, if at all. Others are converted (fused experts are split), layer
    by layer, so that shards are gathered, and copies made, of one layer at a time.

    Yields:
        Plain names, and the full tensors made of these by their names in a checkpoint.
    """
    for names, renamed in checkpoint_groups(model, tensors):
        if renamed is None:
            full = {name: whole(tensors[name]).detach() for name in names}
            yield names, checkpoint_form(model, full)
        else:
            tensor = tensors[names[0]]
            yield names, {renamed: whole(tensor).detach() if is_sharded(tensor) else tensor}


def checkpoint_groups(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> list[tuple[tuple[str, ...], str | None]]:
    """The fewest tensors that can be brought into the form of a checkpoint without the others.

    Returns:
        Plain names; and for a tensor that is only renamed, its name in a checkpoint.
    """
    empty = stand_ins(tensors)
    form = checkpoint_form(model, empty)
    same = {id(tensor): name for name, tensor in empty.items()}
    renamed = {same[id(tensor)]: name for name, tensor in form.items() if id(tensor) in same}
    groups: dict[Any, list[str]] = {}
    for name in [name for name in tensors if name not in renamed]:
        groups.setdefault(place_of(name) or name, []).append(name)
    made = {name for name in form if name not in set(renamed.values())}
    parts = [[empty[name] for name in group] for group in groups.values()]
    alone = [
        set(checkpoint_form(model, dict(zip(group, part, strict=True))))
        for group, part in zip(groups.values(), parts, strict=True)
    ]
    if alone and (set().union(*alone) != made or sum(map(len, alone)) != len(made)):
        groups = {"": [name for group in groups.values() for name in group]}
    return [
        *(((name,), renamed[name]) for name in tensors if name in renamed),
        *((tuple(group), None) for group in groups.values()),
    ]


def checkpoint_names(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]
) -> dict[str, str]:
    """Further names of shared tensors in a checkpoint, to the first name there."""
    if not tied:
        return {}
    pairs: dict[str, str] = {}
    for alias, first in tied.items():
        for name in (alias, first):
            form = list(checkpoint_form(model, stand_ins({name: tensors[first]})))
            pairs[name] = form[0] if len(form) == 1 else name
    return {pairs[alias]: pairs[first] for alias, first in tied.items()}


def stand_ins(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors on `meta` in the place of others."""
    return {
        name: torch.empty(shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def checkpoint_form(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names, and in the shapes, that `model.save_pretrained` would give them.

    Returns:
        Name in a checkpoint to tensor. The same tensors for most models; mixtures of experts are
        split into one tensor per expert.
    """
    base = unwrap(model)
    if not hasattr(base, "save_pretrained"):
        return dict(tensors)
    with imported():
        from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad(), _without_packing(base):
        return dict(revert_weight_conversion(base, dict(tensors)))  # pyright: ignore[reportArgumentType]


def _without_packing(base: nn.Module) -> AbstractContextManager[None]:
    """Leave out conversions that unpacked a quantisation when a model was loaded."""
    # Transformers reverts them in name only: full values would have the names of packed ones.
    made_by: Any = getattr(base, "_weight_conversions", None) or []
    kept = [c for c in made_by if not any(hasattr(o, "hf_quantizer") for o in _operations(c))]
    return replaced(base, _weight_conversions=kept) if len(kept) < len(made_by) else nullcontext()


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", [])
