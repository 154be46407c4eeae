"""Deltas in their base: a whole model on disk, without one in memory."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerrl.checks import check_path, check_switch
from layerrl.delta.checkpoint import (
    INDEX,
    Checkpoint,
    compared,
    described_model,
    stored_names,
    tensors_of,
)
from layerrl.delta.fitting import (
    Marks,
    check_base,
    check_model_type,
    check_rounding,
    misfit,
    origin,
    place_of,
    warn_of_nonfinite,
)
from layerrl.delta.folder import Delta, new_folder, refuse_existing
from layerrl.delta.hub import check_token
from layerrl.delta.processing import TEMPLATES, WEIGHTS, copy_processing, replaced_by
from layerrl.delta.settings import computing_settings
from layerrl.delta.stacks import hint, read_deltas, refuse_overlap
from layerrl.errors import DeltaError, SelectionError
from layerrl.quantisation import unpacked
from layerrl.selection import LayerSelection
from layerrl.warning import warn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replaced:
    """What takes the place of a tensor of the base."""

    delta: Delta
    name: str
    below: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        return self.delta.tensor(self.name, lambda _: self.below())


def merge_delta(
    base: str | os.PathLike[str],
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    union: bool = False,
    revision: str | Sequence[str | None] | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write the base with a delta in it: a whole model that plain transformers loads.

    Shards are copied as files and only the bytes of the delta's tensors are replaced, so memory
    holds one tensor at a time and everything else stays bit for bit what it was. Nothing outside
    `out` is written.

    Args:
        base: Folder of the base's safetensors checkpoint, or its hub id (at the delta's commit).
        path: A delta's folder, or `"user/name"` on the hub where there is no such folder; or
            several, in the order in which they were trained on top of each other.
        out: Folder to make. It is written under another name and renamed when complete.
        union: The deltas were made side by side, from the same base, and train different tensors.
        revision: Branch, tag or commit of a delta on the hub; or a list, one for each delta.
        token: For private repositories; None: of who is logged in.

    Returns:
        The folder: weights in the base's dtypes with its config; the tokenizer, chat template and
        generation config are those of the (last) delta where it has some, or else the base's.

    Raises:
        DeltaError: If an input is missing or damaged, the base is quantised, a delta was not made
            from what is below it, two of a union train the same tensor, or `out` exists or cannot
            be written. Nothing is left half-written.
    """
    union = _check_arguments(base, out, union, token)  # before anything is read
    deltas = read_deltas(path, revision=revision, token=token)
    checkpoint = Checkpoint(folder := _checkpoint_folder(base, deltas[0], token))
    for delta in deltas:
        check_model_type(delta, checkpoint.config.get("model_type"))
    _refuse_quantised(base, checkpoint.config)
    model = described_model(folder)
    config: Any = checkpoint.config if model is None else model.config
    settings = computing_settings(config)
    above: dict[str, _Replaced] = {}
    marks: Marks = {}
    for index, delta in enumerate(deltas):
        stored = stored_names(checkpoint, delta.base, model)
        own = _replaced(checkpoint, delta, stored, {} if union else above)
        _check_selection(delta, checkpoint, model, stored, set(own))
        if union:
            refuse_overlap(delta, own, {name: above[name].delta for name in above})
        found = compared(checkpoint, delta.base, stored, {} if union else above, marks)
        check_base(delta, found, config=settings, hint=hint(deltas, index, union=union))
        read = ((each.name, each()) for each in own.values())
        warn_of_nonfinite(read, f"the delta at {delta.path}")
        above |= own
    pairs = ((name, before, above[name]()) for name, before in checkpoint.tensors(only=above))
    check_rounding(pairs, str(out), "Merge onto a float32 copy of the base")
    _warn_of_other_files(deltas, union=union)
    _write(checkpoint, above, deltas, Path(out))
    return Path(out)


def _check_arguments(base: object, out: object, union: object, token: object) -> bool:
    """Refuse what is no argument of `merge_delta`, and return `union` as a plain bool."""
    check_path("base", base, DeltaError)
    refuse_existing(check_path("out", out, DeltaError))
    check_token(token)
    return check_switch("union", union, DeltaError)


def _replaced(
    checkpoint: Checkpoint, delta: Delta, stored: Mapping[str, str], above: Mapping[str, _Replaced]
) -> dict[str, _Replaced]:
    """Name in the checkpoint to what a delta puts there."""
    there = {*stored.values()}
    absent = sorted(name for name in delta.fingerprints if name not in there)
    if absent:
        raise DeltaError(
            f"the base at {checkpoint.folder} has no tensor {absent[0]!r}, which the delta at "
            f"{delta.path} replaces ({len(absent)} of {len(delta.fingerprints)} are missing). Is "
            "it the model it was made from?"
        )
    return {
        name: _Replaced(
            delta=delta, name=recorded, below=above.get(name) or partial(checkpoint.tensor, name)
        )
        for name, recorded in stored.items()
        if recorded in delta.fingerprints
    }


def _check_selection(
    delta: Delta,
    checkpoint: Checkpoint,
    model: nn.Module | None,
    stored: Mapping[str, str],
    own: set[str],
) -> None:
    """A delta's tensors must be exactly those of its selection, and its record complete."""
    if model is None:
        trained, known = _in_selected_layers(delta.selection, own), {*stored}
    else:
        try:
            trained, known = tensors_of(delta.selection, model, checkpoint.shards_of)
        except SelectionError as error:
            raise DeltaError(misfit(delta, "the base", error)) from error
    if delta.version > 1 and (unknown := sorted(known - {*stored})):
        raise DeltaError(
            f"the base has {len(unknown)} tensors that the base of the delta at {delta.path} had "
            f"not, such as {unknown[0]!r}. Its base is {origin(delta)}."
        )
    if trained != own:
        wrong = sorted(own - trained) or sorted(trained - own)
        raise DeltaError(
            f"the delta at {delta.path} trained {delta.selection}, but "
            f"{'replaces' if own - trained else 'does not replace'} {wrong[0]!r} ({len(wrong)} "
            "such tensors): its tensors are not those of its selection. It was damaged, or not "
            "written by save_delta."
        )


def _in_selected_layers(selection: LayerSelection, own: set[str]) -> set[str]:
    """What can be told from names alone, of a model whose code is not in transformers."""
    if selection.full or selection.also:  # whose names only the model's code could tell
        return own
    inside = {name: place for name in own if (place := place_of(name)) is not None}
    path = Counter(path for path, _ in inside.values()).most_common(1)
    return {name for name, (p, k) in inside.items() if p == path[0][0] and k in selection.layers}


def _refuse_quantised(base: object, config: Mapping[str, Any]) -> None:
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        load = unpacked(method)
        how = (
            f" A model that was published so is loaded in full precision{load} and saved with "
            "save_pretrained(..., save_original_format=False)."
            if load
            else ""
        )
        raise DeltaError(
            f"the base {base} is quantised ({method}), expected the full-precision model that it "
            f"was made from: merge into that one, and quantise the result if you need to.{how}"
        )


def _warn_of_other_files(deltas: list[Delta], *, union: bool) -> None:
    having = [delta for delta in deltas if delta.files]
    if union and any(delta.files != having[-1].files for delta in having):
        warn(
            "the deltas of this union hold different tokenizer or generation files: those of "
            f"{having[-1].path} are taken."
        )


def _write(
    checkpoint: Checkpoint, above: Mapping[str, _Replaced], deltas: list[Delta], out: Path
) -> None:
    last = next((delta for delta in reversed(deltas) if delta.files), deltas[-1])
    left_out = replaced_by(last.files) | {INDEX, "delta.json"}
    if (checkpoint.folder / "delta.json").exists():
        left_out.add("README.md")  # is about that delta
    with new_folder(out) as made:
        for file in sorted(checkpoint.folder.iterdir()):
            weights = file.suffix in WEIGHTS or ".safetensors" in file.name
            if file.is_file() and not weights and file.name not in left_out:
                shutil.copyfile(file, made / file.name)
        templates = checkpoint.folder / TEMPLATES
        if templates.is_dir() and TEMPLATES not in left_out:
            shutil.copytree(templates, made / TEMPLATES)
        copy_processing(last.path, last.files, made)
        checkpoint.copy_to(made)
        for name, tensor in above.items():
            checkpoint.replace_in(made, name, tensor())


def _checkpoint_folder(
    base: str | os.PathLike[str], delta: Delta, token: str | bool | None
) -> Path:
    folder = Path(base)
    if os.path.isdir(folder):  # of any text, while is_dir() raises for one that is too long
        return folder
    from huggingface_hub import snapshot_download

    revision = delta.base.revision if os.fspath(base) == delta.base.name else None
    patterns = ["*.safetensors", INDEX, "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    fetch = partial(
        snapshot_download, os.fspath(base), revision=revision, allow_patterns=patterns, token=token
    )
    try:
        return Path(fetch())
    except Exception as error:  # whatever the hub client raises, the sentence is the same
        if revision:  # a commit is the same wherever it comes from
            with suppress(Exception):
                return Path(fetch(local_files_only=True))
        at = f" at commit {revision}, which the delta was made from," if revision else ""
        raise DeltaError(
            f"base {os.fspath(base)!r}{at} is no folder here and no model the hub gives: {error}"
        ) from error
