"""A decoder layer's call, told apart from others row by row by all that enters the layer.

Legend: B rows, T tokens, H hidden size, N 64-bit words of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerrl.frozen import CHUNK, ODD_MULTIPLIER, odd_weights
from layerrl.shards import is_sharded

_SLICE_BYTES = 1 << 26
_SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OpaqueArgumentError(TypeError):
    """An argument that cannot be compared between calls: a cache, a function, any object."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What enters a layer beside the hidden states, comparable between calls."""

    structure: tuple[Any, ...]
    """Path, type and size of each argument; the value of those that are no tensor."""
    keys: tuple[int, ...]
    """A 64-bit key of the tensors' bits for each row."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """The structure without sizes."""
        return tuple(
            (path, what, len(rest[0]), *rest[1:]) if isinstance(what, torch.dtype) else (path, what)
            for path, what, *rest in self.structure
        )


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Hidden states that a layer is called with, mostly (B, T, H); or an `OpaqueArgumentError`."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or not hidden.dim():
        raise OpaqueArgumentError(
            f"hidden states neither first nor by that name, but {', '.join(kwargs) or 'nothing'}"
        )
    return hidden


def leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Path and value of each argument but the hidden states, or an `OpaqueArgumentError`."""
    positional = [(str(index), value) for index, value in enumerate(args)][1:]
    named = [(name, value) for name, value in kwargs.items() if args or name != "hidden_states"]
    return [leaf for path, value in (*positional, *named) for leaf in _leaves(path, value)]


def _leaves(path: str, value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        if is_sharded(value) or value.is_nested or value.is_sparse or value.is_quantized:
            raise OpaqueArgumentError(f"{path}, a {type(value).__name__} that is not dense")
        yield path, value
    elif isinstance(value, _SCALARS):
        yield path, value
    elif isinstance(value, tuple | list):
        yield f"{path}: {type(value).__name__} of {len(value)}", None
        for index, part in enumerate(value):
            yield from _leaves(f"{path}[{index}]", part)
    elif isinstance(value, dict):
        yield f"{path}: dict of {sorted(map(str, value))}", None
        for key, part in value.items():
            yield from _leaves(f"{path}[{key!r}]", part)
    else:
        raise OpaqueArgumentError(f"{path}, a {type(value).__name__}")


class RowKeys:
    """Keys of the rows of one pass, each tensor read once however many layers it enters."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._keys: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._arguments: dict[tuple[Any, ...], Arguments] = {}

    def of(self, found: list[tuple[str, Any]]) -> Arguments:
        """Structure of the arguments, and a key per row; a tensor without rows counts for all."""
        same = tuple(
            (path, id(v), version(v)) if isinstance(v, Tensor) else (path, type(v), v)
            for path, v in found
        )
        known = self._arguments.get(same)
        if known is None:
            known = self._arguments[same] = self._describe(found)
        return known

    def _describe(self, found: list[tuple[str, Any]]) -> Arguments:
        structure, total = [], None
        for place, (path, value) in enumerate(found):
            if not isinstance(value, Tensor):
                structure.append((path, type(value), value))
                continue
            dim = self._row_dim(value)
            size = [size for index, size in enumerate(value.shape) if index != dim]
            structure.append((path, value.dtype, tuple(size), dim))
            key = self._key(value, dim)
            # Another factor for each place, or two arguments could change places.
            key = _mixed(key * (ODD_MULTIPLIER * (2 * place + 1) % (1 << 63)))
            total = key if total is None else total.to(key.device) + key
        keys = [0] * self._num_rows if total is None else total.expand(self._num_rows).tolist()
        return Arguments(structure=tuple(structure), keys=tuple(keys))

    def _row_dim(self, value: Tensor) -> int | None:
        """The dimension along which a tensor has a row for each; None where it has none."""
        counts = (1, self._num_rows)
        if value.dim() > 2 and value.shape[1] == self._num_rows and len(value) != 1:
            # Cosines of text, height and width for each row; of three rows, either could be meant.
            return None if len(value) == self._num_rows else 1
        return 0 if value.dim() > 1 and len(value) in counts else None

    def _key(self, value: Tensor, dim: int | None) -> Tensor:
        place = id(value), version(value)
        known = self._keys.get(place)
        if known is None:
            rows = value[None] if dim is None else value.transpose(0, dim)
            if rows.stride(0) == 0:
                rows = rows[:1]  # all are one
            # Beside the key the tensor, or another one could be given its id.
            known = self._keys[place] = (value, row_keys(rows))
        return known[1]


def version(tensor: Tensor) -> int:
    """How often torch has seen a tensor be written to."""
    return 0 if tensor.is_inference() else tensor._version


def as_integers(tensor: Tensor) -> Tensor:
    """Return a view of a tensor's bits as integers, which autocast neither casts nor refuses.

    Under autocast, torch joins floating-point tensors of float32 and of autocast's dtype alone: no
    float16 beside bfloat16. Bookkeeping must not depend on what a caller computes in.
    """
    return tensor.view(_INTEGERS.get(tensor.element_size(), tensor.dtype))


def row_keys(tensor: Tensor) -> Tensor:
    r"""A 64-bit key of the bits of each row.

    With a row's bits read as 64-bit words $b_i$, fixed odd weights $w_i$ without a pattern and
    $m(x) = x \oplus (x \gg 32)$, the key is $\sum_i m(m(b_i) w_i) \bmod 2^{64}$. Any one word that
    changes always changes it, as each step has an inverse; several do unless they cancel by chance.
    Integers add up to the same in every order, so that a row has the same key in every batch.

    Args:
        tensor: Of any dtype, rows along its first dimension. Not changed.

    Returns:
        One key per row, shape (B,), int64, on the tensor's device.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    row_bytes = max(1, tensor[:1].numel() * tensor.element_size())
    slices = tensor.split(max(1, _SLICE_BYTES // row_bytes)) if len(tensor) else [tensor]
    return torch.cat([_slice_keys(part) for part in slices])


def _slice_keys(tensor: Tensor) -> Tensor:
    words_BN = _words(tensor)
    keys_B = torch.zeros(len(tensor), dtype=torch.int64, device=tensor.device)
    for chunk_BN in words_BN.split(CHUNK, dim=1):
        weights_N = odd_weights(tensor.device)[: chunk_BN.shape[1]]
        keys_B = keys_B * ODD_MULTIPLIER + _mixed(_mixed(chunk_BN) * weights_N).sum(dim=1)
    return keys_B


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.resolve_neg().reshape(len(tensor), tensor[:1].numel()).contiguous()
    if not flat.numel():
        return flat.new_zeros((len(tensor), 0), dtype=torch.int64)
    bytes_ = flat.view(torch.uint8)
    missing = -bytes_.shape[1] % 8
    if missing:
        bytes_ = nn.functional.pad(bytes_, (0, missing))
    elif bytes_.storage_offset() % 8:
        bytes_ = bytes_.clone()
    return bytes_.view(torch.int64)


def _mixed(words: Tensor) -> Tensor:
    """Let each word's upper bits reach the lower ones, which a product does not."""
    return words ^ ((words >> 32) & 0xFFFFFFFF)
