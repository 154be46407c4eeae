"""The record of frozen tensors: their fingerprints, taken and compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from layerrl.adapters import idle_adapters
from layerrl.blocks import plain_name, unwrap
from layerrl.errors import FrozenTensorError
from layerrl.selection import LayerSelection
from layerrl.selection.parts import rows_kept
from layerrl.shards import local

_WORD_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
CHUNK = 1 << 18
# A GPU waits for launches: it takes as many chunks at once as make a product of 128 MiB. A CPU is
# faster with one, which stays in its cache.
_CHUNKS_AT_ONCE = {"cpu": 1}
ODD_MULTIPLIER = 0x1E3779B97F4A7C15


def fingerprints(
    tensors: Mapping[str, Tensor], *, device: torch.device | None = None
) -> dict[str, str]:
    r"""A 64-bit checksum of each tensor's bits, computed where it lies or on a faster device.

    With the bits read as integers $b_i$ of at most 32 bits and fixed odd weights $w_i$ without a
    pattern, the checksum is $\sum_i w_i b_i \bmod 2^{64}$. One changed element always changes it,
    as an odd weight has an inverse; several do unless they cancel by chance. It does not
    protect against collisions made on purpose.

    Args:
        tensors: Name to tensor of any dtype and device. Not changed; `meta` tensors are left out.
            Of a sharded one, the part that this process holds counts.
        device: Where to compute those of tensors on the CPU, which get there some MB at a time.
            None: on the CPU.

    Returns:
        Name to 16 hexadecimal digits: the same on every device, another one for other bits.
    """
    sums = {
        name: _chunk_sums(local(tensor).detach(), device)
        for name, tensor in tensors.items()
        if not tensor.is_meta
    }
    return {name: f"{_combined(of_chunks.tolist()):016x}" for name, of_chunks in sums.items()}


@lru_cache(maxsize=8)
def odd_weights(device: torch.device) -> Tensor:
    """Fixed odd 64-bit numbers without a pattern: positions, mixed as in splitmix64."""
    mixed = torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device) * ODD_MULTIPLIER
    for shift, multiplier in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        logical = (mixed >> shift) & ((1 << (64 - shift)) - 1)
        mixed = (mixed ^ logical) * multiplier
    return (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))) | 1


def _chunk_sums(tensor: Tensor, device: torch.device | None) -> Tensor:
    """The weighted sum of each chunk of a tensor's words, on its device or a CPU's on another."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    words = flat.view(_WORD_OF_SIZE[flat.element_size()])
    if device is None or words.device.type != "cpu":
        device = words.device
    weights = odd_weights(device)
    at_once = _CHUNKS_AT_ONCE.get(device.type, 64)
    num_rest = len(words) % CHUNK
    full, rest = words.split([len(words) - num_rest, num_rest])
    groups = full.split(at_once * CHUNK) if len(full) else ()
    sums = [(group.to(device).view(-1, CHUNK) * weights).sum(dim=1) for group in groups]
    if num_rest or not sums:
        sums.append((rest.to(device) * weights.narrow(0, 0, num_rest)).sum().view(1))
    return torch.cat(sums)


def _combined(sums: Iterable[int]) -> int:
    """One checksum of all chunks, in their order."""
    total = 0
    for of_chunk in sums:
        total = (total * ODD_MULTIPLIER + of_chunk) % (1 << 64)
    return total


def frozen_tensors(model: nn.Module, selection: LayerSelection) -> dict[str, Tensor]:
    """Everything in a model's state that must not move while the selection trains.

    Returns:
        Name to tensor: parameters outside the selection and all persistent buffers, those of
        trained blocks too (a moved router bias would be missing from the delta). Buffers that are
        not saved with the model, such as rotary caches, may be recomputed and are left out, and so
        are adapters that are not active: TRL keeps moving averages in one. Empty for `"full"`, the
        plain trainer's own case.
    """
    if selection.full:
        return {}
    base = unwrap(model)
    chosen = {id(parameter) for parameter in selection.parameters(model).values()}
    frozen: dict[str, Tensor] = {
        plain_name(name): parameter
        for name, parameter in base.named_parameters()
        if id(parameter) not in chosen
    }
    frozen |= _persistent_buffers(model)
    idle = idle_adapters(model)
    return {name: value for name, value in frozen.items() if not f"{name}.".startswith(idle)}


def frozen_rows(model: nn.Module, selection: LayerSelection) -> Iterator[tuple[str, slice, Tensor]]:
    """The rows of trained tensors that must not move while the selection trains.

    Yields:
        Name of a tensor, a run of its rows, and these rows, a view. Mostly none.
    """
    base = unwrap(model)
    kept = rows_kept(selection, base)
    named = {plain_name(name): parameter for name, parameter in base.named_parameters()}
    for name, runs in kept.items():
        for run in runs:
            yield name, run, named[name].detach()[run]


def fingerprints_of_rows(
    model: nn.Module,
    selection: LayerSelection,
    *,
    device: torch.device | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, str]:
    """Return the fingerprints of `frozen_rows`, by name as `"model.embed_tokens.weight[0:49152]"`.

    `dtypes` has what the rows of a tensor, by its plain name, count as converted to.
    """
    rows = {
        f"{name}[{run.start}:{run.stop}]": values.to((dtypes or {}).get(name, values.dtype))
        for name, run, values in frozen_rows(model, selection)
    }
    return fingerprints(rows, device=device)


def saved_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and persistent buffers, each once; further names of shared ones, to the first."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    parameters = unwrap(model).named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *_persistent_buffers(model)):
        name = plain_name(name)
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)], tensors[name] = name, tensor
    return tensors, tied


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in unwrap(model).named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield plain_name(f"{prefix}.{name}" if prefix else name), buffer


class FrozenRecord:
    """The fingerprints of everything in a model that must not move while a selection trains."""

    def __init__(
        self, model: nn.Module, selection: LayerSelection, *, device: torch.device | None = None
    ) -> None:
        self._selection, self._device = selection, device
        self.take(model)

    def _now(self, model: nn.Module) -> dict[str, str]:
        return fingerprints(
            frozen_tensors(model, self._selection), device=self._device
        ) | fingerprints_of_rows(model, self._selection, device=self._device)

    def take(self, model: nn.Module) -> None:
        """Record the frozen tensors as they are now: check them first, or a change is lost."""
        self.fingerprints = self._now(model)
        """Name of a frozen tensor to its fingerprint."""

    def check(self, model: nn.Module) -> None:
        """Compare the frozen tensors with the record; a `FrozenTensorError` if one changed."""
        now, then = self._now(model), self.fingerprints
        changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        if changed:
            shown = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
            raise FrozenTensorError(
                f"{len(changed)} of {len(then)} frozen tensors are not what they were when the "
                f"model was masked: {shown}. Only {self._selection} may change. Something else "
                "writes to them: a callback, a module's buffer update, another base's checkpoint "
                "or weights loaded after the trainer was made."
            )
