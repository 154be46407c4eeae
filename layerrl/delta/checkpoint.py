"""A model's safetensors checkpoint on disk: where each tensor lies, what it is, a copy to write to.

Paths in an index are data: nothing outside the folder that is being made is opened for writing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from layerrl.delta.fitting import Comparison, Marks
from layerrl.errors import DeltaError
from layerrl.frozen import saved_tensors
from layerrl.schema import fitted
from layerrl.seams import imported
from layerrl.selection import LayerSelection
from layerrl.stored import bytes_of, decoded, refused_as, tensors_in

if TYPE_CHECKING:
    from layerrl.delta.record import DeltaBase

_T = TypeVar("_T")
INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """The weights of a checkpoint folder, found once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json_object(folder / "config.json")
        self._refuse_other_weights()
        self.sources: dict[str, Path] = {}
        """Name inside a copy of the folder to the file with these tensors."""
        self._index: dict[str, Any] | None = None
        self._weight_map: dict[str, str] = {}
        if (folder / _SINGLE).is_file():  # first, as upstream
            self.sources[_SINGLE] = folder / _SINGLE
        elif (folder / INDEX).is_file():
            self._index = json_object(folder / INDEX)
            self._weight_map = self._read_index(self._index.get("weight_map"))
        else:
            raise DeltaError(
                f"no safetensors checkpoint at {folder}: neither {INDEX} nor {_SINGLE}. Write one "
                "with model.save_pretrained(...); pickled and GGUF weights are not read."
            )
        self.shards_of: dict[str, list[str]] = {}
        """Tensor to the shards that hold it, usually one."""
        for shard, source in self.sources.items():
            with readable(source) as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    self.shards_of.setdefault(name, []).append(shard)
        for name, shard in self._weight_map.items():
            if shard not in self.shards_of.get(name, ()):
                raise DeltaError(
                    f"{folder / INDEX} is damaged: {self.sources[shard]} holds no {name!r}"
                )

    def _refuse_other_weights(self) -> None:
        """Transformers would load something else from a folder with one of these."""
        if (adapter := self.folder / "adapter_config.json").is_file():
            raise DeltaError(
                f"{self.folder} holds an adapter ({adapter.name}), which transformers puts on top "
                "of a base that it names. Merge the two (merge_and_unload), save that model and "
                "use it as the base."
            )
        if (file := self.config.get("transformers_weights") or _SINGLE) != _SINGLE:
            raise DeltaError(
                f"the config at {self.folder} says that the weights are in {file!r:.80}, expected "
                f"{_SINGLE} or {INDEX}. Load that model and write it with save_pretrained."
            )

    def _read_index(self, weight_map: object) -> dict[str, str]:
        """Give every shard a name inside the folder, wherever it lies."""
        if not isinstance(weight_map, dict) or not weight_map:
            raise DeltaError(f"{self.folder / INDEX} is damaged: it has no weight_map")
        for name, entry in weight_map.items():
            if not isinstance(entry, str) or not entry.endswith(".safetensors") or "\0" in entry:
                raise DeltaError(
                    f"{self.folder / INDEX} is damaged: {name!r} lies in {entry!r}, expected the "
                    "name of a .safetensors file"
                )
        inside = {entry: plain for entry in weight_map.values() if (plain := _plain(entry))}
        self.sources |= {plain: self.folder / plain for plain in inside.values()}
        for entry in dict.fromkeys(weight_map.values()):
            if entry not in inside:
                source = self._resolved(self.folder / entry)
                same = [s for s, file in self.sources.items() if self._resolved(file) == source]
                inside[entry] = same[0] if same else self._free_name(source)
                self.sources.setdefault(inside[entry], source)
        return {name: inside[entry] for name, entry in weight_map.items()}

    def _resolved(self, file: Path) -> Path:
        try:
            return file.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, odd names
            raise DeltaError(
                f"{self.folder / INDEX} names a file that cannot be: {error}"
            ) from error

    def _free_name(self, source: Path) -> str:
        # A file of the name that upstream looks for first would hide the index.
        taken = {name.lower() for name in (*self.sources, _SINGLE)}
        names = (f"{source.stem}-{number}.safetensors" for number in count(1))
        return next(name for name in chain([source.name], names) if name.lower() not in taken)

    def tensors(self, *, only: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Some tensors, one at a time; several times where several shards hold it."""
        for source in self.sources.values():
            with readable(source) as opened:
                for name in [name for name in opened.keys() if name in only]:  # noqa: SIM118
                    yield name, opened.get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor that it holds."""
        return next(tensor for _, tensor in self.tensors(only={name}))

    def copy_to(self, made: Path) -> None:
        """Copy the shards, and an index that names the copies."""
        for shard, source in _shown(self.sources.items(), "copying", len(self.sources)):
            (made / shard).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, made / shard)
        if self._index is not None:
            index = {**self._index, "weight_map": self._weight_map}
            if index == self._index:
                shutil.copyfile(self.folder / INDEX, made / INDEX)
            else:
                (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def replace_in(self, made: Path, name: str, tensor: Tensor) -> None:
        """Overwrite a tensor in a copy, wherever it holds it, in the dtype that it has there."""
        for shard in self.shards_of[name]:
            _replace_bytes(made / shard, name, tensor)


def _shown(items: Iterable[_T], doing: str, number: int) -> Iterable[_T]:
    """The same, with a progress bar where a terminal shows it."""
    return tqdm(items, desc=f"{doing} the base", total=number, leave=False, disable=None)


def _plain(entry: str) -> str | None:
    """The normal form of a path that goes down from its folder; None for any other."""
    path = PurePosixPath(entry)
    goes_down = not path.is_absolute() and path.parts and ".." not in path.parts
    # A backslash or a drive leads elsewhere on Windows.
    return str(path) if goes_down and not {"\\", ":"} & {*entry} else None


def stored_names(
    checkpoint: Checkpoint, base: DeltaBase, model: nn.Module | None
) -> dict[str, str]:
    """Return the recorded names, by those in a checkpoint, of the tensors that a record knows.

    A tensor that the model shares may lie in a checkpoint under any of its names, or several.
    Checkpoints of the model without its head leave out the prefix of the model inside.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    recorded = {name: name for name in base.fingerprints} | base.tied
    bare = not any(name.startswith(prefix) for name in checkpoint.shards_of)
    found: dict[str, str] = {}
    for name in checkpoint.shards_of:
        known = recorded.get(name)
        if known is None:
            known = recorded.get(prefix + name if bare else name.removeprefix(prefix))
        if known is not None:
            found[name] = known
    return found


def compared(
    checkpoint: Checkpoint,
    base: DeltaBase,
    stored: Mapping[str, str],
    above: Mapping[str, Callable[[], Tensor]],
    marks: Marks | None = None,
) -> Comparison:
    """Return what differs between a checkpoint and a record, compared tensor by tensor.

    What a delta puts in a tensor's place (`above`) counts as it is, or as the checkpoint's dtype
    rounds it. `marks`: its fingerprints taken so far; more are added.
    """
    found = Comparison(base, marks={} if marks is None else marks)
    for name, tensor in _shown(checkpoint.tensors(only=stored), "comparing", len(stored)):
        new = above[name]() if name in above else None
        found.add(stored[name], name, *([tensor] if new is None else [new, new.to(tensor.dtype)]))
    return found


def described_model(folder: Path) -> nn.Module | None:
    """The model that a folder's config describes, on `meta`; None where transformers has none."""
    from transformers import AutoConfig

    from layerrl.blocks import meta_model

    try:
        return meta_model(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # code of the model's own, or a version that does not know it
        return None


def loaded_as(model: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """What transformers makes of a checkpoint's tensors.

    Returns:
        Name in the checkpoint to the tensor in the model that it is, or is a part of. Without those
        that the model ignores.
    """
    with imported():
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

    state, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):
        loaded, _ = rename_source_key(name, renamings, converters, prefix, state)
        if loaded not in state and name in state:
            loaded, _ = rename_source_key(name, [], [], prefix, state)
        if loaded in state:
            found[name] = loaded
    return found


def tensors_of(
    selection: LayerSelection, model: nn.Module, names: Mapping[str, Any]
) -> tuple[set[str], set[str]]:
    """Which tensors of a checkpoint a selection trains, and which the model reads at all."""
    loaded = loaded_as(model, names)
    _, tied = saved_tensors(model)
    trained = selection.parameters(model)
    return {n for n, name in loaded.items() if tied.get(name, name) in trained}, {*loaded}


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, as transformers or another tool wrote it."""
    with refused_as(DeltaError, f"no transformers model at {file.parent}: {file.name}"):
        return fitted(dict[str, Any], decoded(bytes_of(file)))


@contextmanager
def readable(file: Path) -> Iterator[Any]:
    """A base's safetensors file, open."""
    said = f"the base's {file} is missing or damaged"
    with refused_as(DeltaError, said), tensors_in(file) as shard:
        yield shard


def _replace_bytes(file: Path, name: str, tensor: Tensor) -> None:
    with safe_open(file, framework="pt") as shard:
        dtype = shard.get_tensor(name).dtype
    with file.open("r+b") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(header_size))[name]["data_offsets"]
        data = tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if len(data) != end - begin:
            raise DeltaError(
                f"{name!r} takes {len(data)} bytes, {file.name} has {end - begin} for it"
            )
        stream.seek(8 + header_size + begin)
        stream.write(data)
