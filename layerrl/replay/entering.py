"""What enters layer 0 in one call of a model, and whether the prefix may be replayed for it.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, dropout
from torch.nn.modules import module as module_globals

from layerrl.blocks import unwrap
from layerrl.replay.arguments import Arguments, RowKeys, hidden_states, leaves
from layerrl.shards import is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Hooks of these move weights and activations about, or have collected what a call asked for, which
# is looked at apart. Those that torch.nn.utils puts on (spectral norm) do change results.
_HARMLESS_HOOKS = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(module_globals, f"_global{kind}") for kind in _HOOKS]
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


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
    weights: tuple[Any, ...]
    """Which values the prefix's tensors hold, as far as torch counts writes."""
    modes: bytes
    """Which modules of the prefix are in training mode."""

    @property
    def circumstances(self) -> tuple[Any, ...]:
        """What two calls have to have in common, so that equal rows give equal results."""
        return self.setting, self.size, self.arguments.structure, self.weights

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls that compute alike have in common, whatever their size."""
        return self.setting, self.arguments.kind, self.modes, torch.is_grad_enabled()


def entry_of(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    keys: RowKeys,
    prefix: Sequence[nn.Module],
    model: nn.Module,
) -> Entry:
    """Describe a call of layer 0.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keys: Those of this pass.
        prefix: The frozen layers from the first on.
        model: The model.

    Returns:
        What enters.

    Raises:
        OpaqueArgumentError: If an argument cannot be compared between calls.
    """
    hidden_BTH = hidden_states(args, kwargs)
    arguments = keys.of(leaves(args, kwargs))
    hidden_keys = keys.of([("hidden_states", hidden_BTH)]).keys
    device = hidden_BTH.device
    config = getattr(unwrap(model), "config", None)
    return Entry(
        rows=tuple(zip(hidden_keys, arguments.keys, strict=True)),
        arguments=arguments,
        size=hidden_BTH.shape[1:],
        setting=(
            hidden_BTH.dtype,
            device,
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else None,
            torch.get_float32_matmul_precision(),
            getattr(config, "_attn_implementation", None),
        ),
        weights=tuple(map(_value, _tensors(prefix))),
        modes=bytes(module.training for layer in prefix for module in layer.modules()),
    )


def _tensors(prefix: Sequence[nn.Module]) -> Iterable[Tensor]:
    for layer in prefix:
        yield from layer.parameters()
        yield from layer.buffers()


def _value(tensor: Tensor) -> tuple[int, int] | None:
    """Changes when another tensor is put in its place or it is written to, but through `.data`."""
    if is_sharded(tensor):  # gathered anew for each pass
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def unfit(prefix: Sequence[nn.Module]) -> str | None:
    """Why what the prefix computes is no function of what enters it, if it is not.

    Args:
        prefix: The frozen layers.

    Returns:
        A clause, or None where nothing is known against it.
    """
    if any(_GLOBAL_HOOKS):
        return "every module carries a global hook, which sees the layers run"
    for index, layer in enumerate(prefix):
        for name, module in layer.named_modules():
            where = f"{name or type(module).__name__} of layer {index}"
            if module.training and isinstance(module, dropout._DropoutNd) and module.p > 0:
                return f"dropout is active in frozen layers ({where}, p={module.p})"
            if module.training and isinstance(module, batchnorm._BatchNorm):
                return f"batch statistics are collected in frozen layers ({where})"
            for kind in _HOOKS:
                for hook in getattr(module, kind).values():
                    if not _origin(hook).startswith(_HARMLESS_HOOKS):
                        return f"{where} carries a hook ({_origin(hook)})"
    return None


def _origin(hook: Any) -> str:  # noqa: ANN401 - any callable
    function = getattr(hook, "func", hook)  # of a functools.partial
    function = function if hasattr(function, "__qualname__") else type(function)
    return f"{function.__module__}.{function.__qualname__}"


def asked_of_prefix(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """What a call asks for that the frozen layers contribute to beside their output.

    Args:
        model: The model.
        args: The call's positional arguments.
        kwargs: The call's keyword arguments.

    Returns:
        Names such as `output_hidden_states`: of transformers' arguments, or settings of the config.
    """
    base = unwrap(model)
    names = list(inspect.signature(type(base).forward).parameters)[1:] if args else []
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    config: Any = getattr(base, "config", None)
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else []
    asked = {
        name: value
        for settings in configs
        for name in _OUTPUTS
        if (value := getattr(settings, name, None))
    }
    asked |= {n: v for n, v in given.items() if n.startswith("output_") and v is not None}
    return tuple(sorted(name for name, value in asked.items() if value is not False))


def depends_on_other_rows(prefix: Sequence[nn.Module]) -> bool:
    """Whether a row's result depends on what else is in its batch, as with LLM.int8's outliers."""
    return any(
        type(tensor).__name__ == "Int8Params" for layer in prefix for tensor in layer.parameters()
    )
