"""Keep frozen what is frozen, and hand the rest to the optimizer layer by layer."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerrl.blocks import find_blocks, plain_name, unwrap
from layerrl.errors import FrozenTensorError, SelectionError
from layerrl.shards import local, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch.optim import Optimizer

    from layerrl.selection import LayerSelection

_WORD_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_CHUNK = 1 << 18
# A GPU waits for launches: it takes as many chunks at once as make a product of 128 MiB. A CPU is
# faster with one, which stays in its cache.
_CHUNKS_AT_ONCE = {"cpu": 1}
_TENSORS = {"_parameters", "_buffers"}
_ODD_MULTIPLIER = 0x1E3779B97F4A7C15


def fingerprints(
    tensors: Mapping[str, Tensor], *, device: torch.device | None = None
) -> dict[str, str]:
    r"""A 64-bit checksum of each tensor's bits, computed where it lies or on a faster device.

    With the bits read as integers $b_i$ of at most 32 bits and fixed odd weights $w_i$ without a
    pattern, the checksum is $\sum_i w_i b_i \bmod 2^{64}$. One changed element always changes it,
    as an odd weight has an inverse; several do unless they cancel by chance. It is no defence
    against somebody who wants a collision.

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
def _weights(device: torch.device) -> Tensor:
    """Fixed odd 64-bit numbers without a pattern: positions, mixed as in splitmix64."""
    mixed = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device) * _ODD_MULTIPLIER
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
    weights = _weights(device)
    at_once = _CHUNKS_AT_ONCE.get(device.type, 64)
    num_rest = len(words) % _CHUNK
    full, rest = words.split([len(words) - num_rest, num_rest])
    groups = full.split(at_once * _CHUNK) if len(full) else ()
    sums = [(group.to(device).view(-1, _CHUNK) * weights).sum(dim=1) for group in groups]
    if num_rest or not sums:
        sums.append((rest.to(device) * weights.narrow(0, 0, num_rest)).sum().view(1))
    return torch.cat(sums)


def _combined(sums: Iterable[int]) -> int:
    """One checksum of all chunks, in their order."""
    total = 0
    for of_chunk in sums:
        total = (total * _ODD_MULTIPLIER + of_chunk) % (1 << 64)
    return total


def frozen_tensors(model: nn.Module, selection: LayerSelection) -> dict[str, Tensor]:
    """Everything in a model's state that must not move while the selection trains.

    Args:
        model: The model the selection fits, wrapped or not.
        selection: What trains.

    Returns:
        Name to tensor: parameters outside the selection and all persistent buffers, those of
        trained blocks too (a moved router bias would be missing from the delta). Buffers that are
        not saved with the model, such as rotary caches, may be recomputed and are left out. Empty
        for `"full"`, the plain trainer's own case.
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
    return frozen | dict(_persistent_buffers(model))


def saved_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All that is saved with a model.

    Args:
        model: Any, wrapped or not.

    Returns:
        Plain name to parameter or persistent buffer, each once; and further names of shared ones,
        to the first.
    """
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


def check_frozen(
    model: nn.Module,
    selection: LayerSelection,
    recorded: Mapping[str, str],
    *,
    device: torch.device | None = None,
) -> None:
    """Compare a model's frozen tensors with the fingerprints taken when they were frozen.

    Args:
        model: The model, not changed.
        selection: What trains.
        recorded: `fingerprints(frozen_tensors(model, selection))` from then.
        device: As `fingerprints` takes it.

    Raises:
        FrozenTensorError: If a frozen parameter or buffer has other bits, or is new, or is gone.
    """
    now = fingerprints(frozen_tensors(model, selection), device=device)
    changed = sorted(name for name in {*now, *recorded} if now.get(name) != recorded.get(name))
    if changed:
        shown = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
        raise FrozenTensorError(
            f"{len(changed)} of {len(recorded)} frozen tensors are not what they were when the "
            f"model was masked: {shown}. Only {selection} may change. Something else writes to "
            "them: a callback, a module's buffer update, another base's checkpoint or weights "
            "loaded after the trainer was made."
        )


@contextmanager
def as_found(*models: nn.Module) -> Iterator[None]:
    """Give models back with all that they had, but for their weights.

    That is flags, gradients, dtypes, devices, modes, hooks and settings.

    Args:
        *models: Any models. A trainer sets many of these: checkpointing, `use_cache`, a cast.

    Yields:
        Nothing.
    """
    modules = [module for model in models for module in model.modules()]
    parameters = [parameter for model in models for parameter in model.parameters()]
    kinds = [
        (of_module, name, tensor.dtype, tensor.device)
        for module in modules
        for of_module in (module._parameters, module._buffers)
        for name, tensor in of_module.items()
        if tensor is not None
    ]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    owners: dict[int, object] = {id(module): module for module in modules}
    for module in modules:
        for name in ("config", "generation_config"):
            settings = getattr(module, name, None)
            if hasattr(settings, "__dict__"):
                owners[id(settings)] = settings
    held = [
        (
            vars(owner),
            {
                name: copy(value) if isinstance(value, dict) else value
                for name, value in vars(owner).items()
                if name not in _TENSORS
            },
        )
        for owner in owners.values()
    ]
    try:
        yield
    finally:
        for of_module, name, dtype, device in kinds:
            tensor = of_module.get(name)
            if tensor is not None and (tensor.dtype, tensor.device) != (dtype, device):
                tensor.data = tensor.data.to(device, dtype)
        for parameter, flag, grad in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for now, before in held:
            for name in {*now} - {*before} - _TENSORS:
                del now[name]
            for name, value in before.items():
                if isinstance(value, dict) and isinstance(now.get(name), dict):
                    now[name].clear()  # in place: handles of hooks refer to their dict
                    now[name].update(value)
                else:
                    now[name] = value


def parameters_by_layer(
    model: nn.Module, selection: LayerSelection
) -> dict[int, list[nn.Parameter]]:
    """The trained tensors of each selected layer, in the order of the layers."""
    chosen = {id(parameter) for parameter in selection.parameters(model).values()}
    blocks = find_blocks(model)
    return {
        layer: [p for _, p in blocks.named_parameters(layer) if id(p) in chosen]
        for layer in selection.layers
    }


def scale_learning_rates(optimizer: Optimizer, model: nn.Module, selection: LayerSelection) -> None:
    """Split an optimizer's parameter groups by the layers' learning-rate scales.

    Every group keeps its own options (weight decay above all); schedulers made afterwards see the
    scaled rates as their base rates. Groups stay as they are where every scale is 1.

    Args:
        optimizer: A new optimizer without state. Its groups are replaced.
        model: The model whose parameters it holds.
        selection: The layers and their scales; parameters outside the blocks have scale 1.

    Raises:
        SelectionError: If the optimizer sets its own learning rate, so that none can be scaled.
    """
    if set(selection.learning_rate_scale) == {1.0}:
        return
    scale_of = {
        id(parameter): scale
        for parameters, scale in zip(
            parameters_by_layer(model, selection).values(),
            selection.learning_rate_scale,
            strict=True,
        )
        for parameter in parameters
    }
    groups = list(optimizer.param_groups)
    if any(group.get("lr") is None for group in groups):
        raise SelectionError(
            f"{type(optimizer).__name__} sets its own learning rate (lr=None): the selection's "
            f"scales {set(selection.learning_rate_scale)} cannot apply. Use an optimizer with a "
            "learning rate, or a selection without boost."
        )
    optimizer.param_groups.clear()
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_scale[scale_of.get(id(parameter), 1.0)].append(parameter)
        for scale in sorted(by_scale, key=lambda scale: (scale != 1.0, scale)):
            optimizer.add_param_group(
                {**group, "params": by_scale[scale], "lr": group["lr"] * scale}
            )


def check_optimizer(optimizer: Optimizer, model: nn.Module, selection: LayerSelection) -> None:
    """Make sure that an optimizer holds the trained tensors and nothing else.

    Args:
        optimizer: The optimizer that will train the model.
        model: The model.
        selection: What trains.

    Raises:
        SelectionError: If it misses a trained tensor or holds a frozen one.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = selection.parameters(model)
    names = {id(p): plain_name(name) for name, p in unwrap(model).named_parameters()}
    missing = [name for name, p in trained.items() if id(p) not in held]
    extra = sorted(
        names.get(i, "a tensor of no parameter") for i in held - {id(p) for p in trained.values()}
    )
    if missing or extra:
        problem = f"misses trained {missing[0]!r}" if missing else f"holds frozen {extra[0]!r}"
        raise SelectionError(
            f"the {type(optimizer).__name__} {problem} ({len(missing)} missing, {len(extra)} too "
            f"many; {selection} trains {len(trained)} tensors). Whoever built it (optimizers=, "
            "optimizer_cls_and_kwargs= or a create_optimizer of your own) has to give it "
            "selection.parameters(model).values(); what the args name (optim) gets just these."
        )


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over several tensors, in float32 or wider, on the device of the first."""
    norms = [
        torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32))
        for t in tensors
    ]
    if not norms:
        return torch.zeros(())
    # With device_map="auto", layers lie on several devices.
    together = torch.stack([value.to(norms[0].device) for value in norms])
    return whole(torch.linalg.vector_norm(together))
