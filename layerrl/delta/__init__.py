"""The trained layers' weights on disk: save them, load them; `merging` makes whole models of them.

A delta is a slice of a checkpoint. Its tensors carry the names and shapes that `save_pretrained`
gives them (experts apart, prefixes as on disk), so that merging needs no model in memory. It
records the whole base that it was made from, so that it fits that base and no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.checks import check_kind, check_path, check_switch, shown
from layerrl.delta.card import write_card
from layerrl.delta.description import FORMAT_VERSION
from layerrl.delta.fitting import (
    Comparison,
    check_same_base,
    check_settings,
    described,
    warn_of_nonfinite,
)
from layerrl.delta.folder import META, TENSORS, Delta, difference, new_folder
from layerrl.delta.hub import push_delta
from layerrl.delta.in_memory import checked, compared, kept_rows, names_by_rows, whole_tensors
from layerrl.delta.loaded import deltas_in, disabled, keeping, refuse_disabled, unload_delta
from layerrl.delta.placing import put_tensors
from layerrl.delta.processing import check_processing, save_processing, sums_of
from layerrl.delta.record import DeltaBase, checkpoint_form, dtype_name, model_type
from layerrl.delta.settings import computing_settings
from layerrl.delta.stacks import read_deltas
from layerrl.delta.switching import Deltas
from layerrl.digests import json_digest
from layerrl.errors import DeltaError
from layerrl.frozen import fingerprints
from layerrl.selection import LayerSelection
from layerrl.shards import whole

__all__ = [
    "DeltaBase",
    "Deltas",
    "checkpoint_form",
    "disabled",
    "load_delta",
    "push_delta",
    "put_tensors",
    "save_delta",
    "tensors_of_run",
    "unload_delta",
]


def save_delta(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    selection: LayerSelection,
    base: DeltaBase | nn.Module,
    processing_class: Any = None,  # a tokenizer or processor of any kind
    is_main_process: bool = True,
    check_frozen: bool = True,
) -> Path:
    """Write the selected tensors of a trained model, and what they replace, to a new folder.

    Args:
        model: The trained model. Not changed.
        path: Folder to make. It is written under another name and renamed when complete.
        selection: What was trained.
        base: The model before training: `DeltaBase.of(model, selection)` taken then, or another
            instance that still is what `model` was.
        processing_class: Tokenizer or processor of the run, saved with the model's generation
            config. Both take the place of the base's in a merged folder.
        is_main_process: Whether this process writes. Collective where the model is sharded.
        check_frozen: Compare the frozen tensors with the base's: False where the caller just did.

    Returns:
        The folder: `delta.safetensors` (tensors, in the model's dtype; of `also="new_tokens"` the
        new rows), `delta.json`, and the files of `processing_class`.

    Raises:
        DeltaError: Inside `disabled`; if the folder exists or cannot be written, `base` is another
            model, what is frozen changed since, or the tokenizer has ids beyond the vocabulary.
        SelectionError: If the selection does not fit the model.
    """
    _check_arguments(model, path, selection, base, processing_class, is_main_process, check_frozen)
    tensors = checkpoint_form(model, _whole(selection.parameters(model)))
    if any(tensor.is_meta for tensor in tensors.values()):
        raise DeltaError("the model is on the meta device: it has no weights to save")
    base = DeltaBase.of(base, selection) if isinstance(base, nn.Module) else base
    found = compared(model, base, leave_out={*tensors}) if check_frozen else None
    if not is_main_process:
        return Path(path)
    _check_trained(model, tensors, base)
    if found is not None:
        _check_unchanged(base, found, kept_rows(model, selection, base))
    config = getattr(unwrap(model), "config", None)
    if base.config is not None and config is not None:
        check_settings(base.config, computing_settings(config), "the base was recorded from")
    rows, by_rows = list(selection.token_rows), names_by_rows(model, selection)
    meta = _description(selection, tensors, base, by_rows)  # before the copy, so on their device
    for name, tensor in tensors.items():
        tensors[name] = (tensor[rows] if name in by_rows else tensor).detach().cpu().contiguous()
    with new_folder(path) as folder:
        if processing_class is not None:
            save_processing(processing_class, model, folder)
        meta["files"] = sums_of(folder)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        text = json.dumps({**meta, "sha256": json_digest(meta)}, indent=1)
        (folder / META).write_text(text + "\n", encoding="utf-8")
        write_card(folder, meta)
    return Path(path)


def _check_arguments(
    model: object,
    path: object,
    selection: object,
    base: object,
    processing_class: object,
    is_main_process: object,
    check_frozen: object,
) -> None:
    check_path("path", path, DeltaError)
    check_switch("is_main_process", is_main_process, DeltaError)
    check_switch("check_frozen", check_frozen, DeltaError)
    if processing_class is not None:
        check_processing(processing_class)
    refuse_disabled(check_kind("model", model, nn.Module, "the trained model", DeltaError))
    check_kind("selection", selection, LayerSelection, "what select_layers returns", DeltaError)
    if base is model or not isinstance(base, DeltaBase | nn.Module):
        given = "the trained model itself" if base is model else shown(base)
        raise DeltaError(
            f"base is {given}, expected the model before training: DeltaBase.of(model, selection) "
            "taken then, or another instance that was not trained"
        )


def _description(
    selection: LayerSelection,
    tensors: Mapping[str, Tensor],
    base: DeltaBase,
    by_rows: Collection[str],
) -> dict[str, Any]:
    """The content of `delta.json`, without its checksum and those of the files beside it."""
    now = fingerprints(tensors)
    rows = {"rows": len(selection.token_rows)}
    return {
        "format_version": FORMAT_VERSION if by_rows else 2,
        "base_model": base.name,
        "base_revision": base.revision,
        "model_type": base.model_type,
        "selection": json.loads(selection.to_json()),
        "tensors": {
            name: {
                "dtype": dtype_name(tensor),
                "shape": list(tensor.shape),
                "fingerprint": now[name],
                "base_dtype": base.dtypes[name],
                "base_fingerprint": base.fingerprints[name],
                **(rows if name in by_rows else {}),
            }
            for name, tensor in tensors.items()
        },
        "base": base.as_json(),
        "result": json_digest(base.fingerprints | now),
    }


def _check_trained(model: nn.Module, tensors: Mapping[str, Tensor], base: DeltaBase) -> None:
    if set(tensors) != set(base.trained):
        raise DeltaError(
            f"the base has other tensors than the model to save: "
            f"{difference(tensors, dict.fromkeys(base.trained))}. Take DeltaBase.of(model, "
            "selection) from this model, with this selection, before training."
        )
    for name, tensor in tensors.items():
        if list(tensor.shape) != base.shapes[name]:
            raise DeltaError(
                f"the base's {name!r} has shape {base.shapes[name]}, the model's "
                f"{list(tensor.shape)}: another model"
            )
    if base.model_type != model_type(model):
        raise DeltaError(
            f"the base is of type {base.model_type!r}, the model to save of {model_type(model)!r}"
        )
    warn_of_nonfinite(tensors.items(), "the model to save")


def _check_unchanged(base: DeltaBase, found: Comparison, rows: Mapping[str, str]) -> None:
    frozen = [name for name in base.fingerprints if name not in base.trained]
    changed = {*found.shapes, *found.values, *found.uncompared, *found.extra}
    changed |= {name for name, mark in rows.items() if mark != base.kept_rows.get(name)}
    changed |= {name for name in frozen if name not in found.names}
    if changed:
        raise DeltaError(
            f"{len(changed)} of {len(frozen)} frozen tensors are not what they were when the base "
            f"was recorded: {described(sorted(changed))}. The delta would not hold them. Select "
            "what was trained, or record the base after whatever else changes the model."
        )


def load_delta(
    model: nn.Module,
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    union: bool = False,
    keep_base: bool | None = None,
    revision: str | Sequence[str | None] | None = None,
    token: str | bool | None = None,
) -> LayerSelection:
    """Put a delta's weights into the model it was made from.

    Afterwards `layerrl.delta` has `disabled(model)`, in which the model is the base for a while,
    and `unload_delta(model)`.

    Args:
        model: The base, in any floating-point dtype that holds what the delta was made from. Its
            selected tensors are overwritten (converted to its dtype), after every check passed.
        path: A delta's folder, or `"user/name"` on the hub where there is no such folder; or
            several, in the order in which they were trained on top of each other. Loading one after
            the other is the same.
        union: The deltas were made side by side, from the same base, and train different tensors.
        keep_base: Keep what is overwritten, where the model is: as many bytes as the delta's
            tensors take in the model. None: if that is at most half of the model.
        revision: Branch, tag or commit of a delta on the hub, or one of each; None: `main`.
        token: For private repositories on the hub; None: of who is logged in.

    Returns:
        The selection the delta was trained with; of several, the last one's.

    Raises:
        DeltaError: If the folder is missing, damaged, or of a newer format; if a repository
            cannot be read, or holds something else; if the model has
            another architecture, vocabulary or config; if any of its tensors, frozen ones too,
            is not the one that the delta was made from, or its dtype would make a trained value
            infinite; if two of a union train the same tensor;
            if deltas in the model are disabled or switched by a `Deltas`; or if `keep_base` is True
            and an earlier delta's base was not kept. The model is then as it was, and so it is
            after an interruption where the base is kept.
    """
    there, union = deltas_in(model), check_switch("union", union, DeltaError)
    keep_base = check_switch("keep_base", keep_base, DeltaError, or_none=True)
    deltas = read_deltas(path, revision=revision, token=token)
    trained, tensors = checked(model, deltas, union=union, there=there)
    with keeping(model, trained, deltas, keep_base=keep_base):
        put_tensors(model, trained, tensors)
    return deltas[-1].selection


def tensors_of_run(
    path: str | os.PathLike[str], selection: LayerSelection, base: DeltaBase, model: nn.Module
) -> dict[str, Tensor]:
    """A delta's tensors by name in a checkpoint, if it is of this run. Collective where sharded."""
    delta = Delta.read(path)
    if delta.selection != selection:
        raise DeltaError(f"{path} trained {delta.selection}; this run trains {selection}")
    check_same_base(delta, base)
    return whole_tensors(delta, model, {})


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor).detach() for name, tensor in tensors.items()}
