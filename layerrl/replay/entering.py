"""What enters layer 0 in one call of a model, and whether the prefix may be replayed for it.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.randomness import devices_of
from layerrl.replay.arguments import Arguments, RowKeys, hidden_states, leaves, row_keys, version
from layerrl.replay.state import OUTPUTS, modules_of, sampled, state_of, tensors_of
from layerrl.shards import is_sharded


class Request:
    """A call of the model: what it asks for, and of which rows."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        base = unwrap(model)
        names = list(inspect.signature(type(base).forward).parameters)[1:] if args else []
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        self.asked = _asked_of_prefix(getattr(base, "config", None), given)
        """Names of what the frozen layers contribute to beside their output."""
        self.kind = (
            len(args),
            *((n, v if isinstance(v, bool | str) else v is None) for n, v in kwargs.items()),
        )
        """What calls that ask alike have in common, whatever their tensors."""
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        self.num_rows = len(tokens) if isinstance(tokens, Tensor) and tokens.dim() > 1 else None
        """None where that cannot be seen."""
        self.devices = devices_of(base, *given.values())
        """Where the call may draw random numbers."""
        self._tensors = [(v, version(v)) for v in given.values() if isinstance(v, Tensor)]

    @property
    def written(self) -> bool:
        """Whether the model has written into a tensor that it was called with."""
        return any(version(tensor) != before for tensor, before in self._tensors)


def _asked_of_prefix(config: Any, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Names such as `output_hidden_states`: of transformers' arguments, or of the config's."""
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else []
    asked = {
        name: value
        for settings in configs
        for name in OUTPUTS
        if (value := getattr(settings, name, None))
    }
    asked |= {n: v for n, v in given.items() if n.startswith("output_") and v is not None}
    return tuple(sorted(name for name, value in asked.items() if value is not False))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes on a device; None where it is off or unknown."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def matmul_precisions() -> tuple[str, str]:
    """How float32 is multiplied.

    Returns:
        `fp32_precision` of GPUs and of CPUs. `torch.get_float32_matmul_precision` raises where
        these were set, as transformers does for `tf32` and `torch_compile`.
    """
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


@dataclass(frozen=True, slots=True)
class Entry:
    """What enters layer 0 in one call, and all else that decides what the prefix makes of it."""

    rows: tuple[tuple[int, int], ...]
    """Keys of each row's hidden states, and of the other arguments."""
    arguments: Arguments
    """Everything but the hidden states."""
    size: torch.Size
    """Of a row's hidden states."""
    setting: tuple[Any, ...]
    """Dtype and device of the hidden states, autocast, kernels."""
    state: tuple[Any, ...]
    """Of the prefix, as `state_of` gives it."""
    sample: tuple[int, ...]
    """Keys of a few elements of each of the prefix's tensors: torch counts no write in place
    through `.data`, and reading all would take as long as reading the weights."""
    storages: tuple[Any, ...]
    """Of the prefix's tensors."""
    modes: bytes
    """Which modules of the prefix are in training mode."""

    @property
    def circumstances(self) -> tuple[Any, ...]:
        """What two calls have to have in common, so that equal rows give equal results."""
        return self.setting, self.size, self.arguments.structure, self.state, self.sample

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls that compute alike have in common, whatever their size."""
        return self.setting, self.arguments.kind, self.modes, torch.is_grad_enabled()


def entry_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], keys: RowKeys, prefix: Sequence[nn.Module]
) -> Entry:
    """Describe a call of layer 0; an `OpaqueArgumentError` if an argument cannot be compared."""
    hidden_BTH = hidden_states(args, kwargs)
    arguments = keys.of(leaves(args, kwargs))
    hidden_keys = row_keys(hidden_BTH).tolist()
    device = hidden_BTH.device
    modules = modules_of(prefix)
    # Those of ZeRO-3 may be gathered ahead, or not, when the pass comes to layer 0.
    tensors = [tensor for tensor in tensors_of(modules) if not is_sharded(tensor)]
    return Entry(
        rows=tuple(zip(hidden_keys, arguments.keys, strict=True)),
        arguments=arguments,
        size=hidden_BTH.shape[1:],
        setting=(
            hidden_BTH.dtype,
            device,
            autocast_dtype(device),
            matmul_precisions(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        state=state_of(prefix),
        sample=sampled(tensors),
        storages=tuple(tensor.untyped_storage() for tensor in tensors),
        modes=bytes(module.training for module in modules),
    )
