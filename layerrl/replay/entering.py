"""What enters layer 0 in one call of a model, and whether the prefix may be replayed for it.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, dropout
from torch.nn.modules import module as module_globals

from layerrl.blocks import own_forward, unwrap
from layerrl.replay.arguments import (
    Arguments,
    RowKeys,
    hidden_states,
    leaves,
    row_keys,
    version,
)
from layerrl.shards import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Hooks = dict[int, Callable[..., Any]]

# Hooks of these move weights and activations about, or have collected what a call asked for, which
# is looked at apart. Those that torch.nn.utils puts on (spectral norm) do change results.
_LAUNCHERS = ("torch.distributed.", "deepspeed.", "accelerate.")
_HARMLESS_HOOKS = (*_LAUNCHERS, "transformers.", "layerrl.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(module_globals, f"_global{kind}") for kind in _HOOKS]
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
# What changes in a run, beside settings that layers read: DeepSpeed counts, the rest is seen apart.
_COUNTERS = ("ds_", "applied_", "output_")
_NUM_SAMPLED = 8
_NUMBERS = (bool, int, float, str)
_PLAIN = (*_NUMBERS, type(None), torch.dtype)
_SEEN_APART = ("training", "gradient_checkpointing", "use_cache")


class Request:
    """A call of the model: what it asks for, and of which rows.

    Args:
        model: The model.
        args: The call's positional arguments.
        kwargs: The call's keyword arguments.
    """

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
        self._tensors = [(v, version(v)) for v in given.values() if isinstance(v, Tensor)]

    @property
    def written(self) -> bool:
        """Whether the model has written into a tensor that it was called with."""
        return any(version(tensor) != before for tensor, before in self._tensors)


def _asked_of_prefix(config: Any, given: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ANN401
    """Names such as `output_hidden_states`: of transformers' arguments, or of the config's."""
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else []
    asked = {
        name: value
        for settings in configs
        for name in _OUTPUTS
        if (value := getattr(settings, name, None))
    }
    asked |= {n: v for n, v in given.items() if n.startswith("output_") and v is not None}
    return tuple(sorted(name for name, value in asked.items() if value is not False))


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
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    keys: RowKeys,
    prefix: Sequence[nn.Module],
) -> Entry:
    """Describe a call of layer 0.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keys: Those of this pass.
        prefix: The frozen layers from the first on.

    Returns:
        What enters.

    Raises:
        OpaqueArgumentError: If an argument cannot be compared between calls.
    """
    hidden_BTH = hidden_states(args, kwargs)
    arguments = keys.of(leaves(args, kwargs))
    hidden_keys = row_keys(hidden_BTH).tolist()
    device = hidden_BTH.device
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
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        state=state_of(prefix),
        sample=tuple(_sampled(prefix)),
        storages=tuple(t.untyped_storage() for t in _tensors(prefix) if not is_sharded(t)),
        modes=bytes(module.training for layer in prefix for module in layer.modules()),
    )


def state_of(prefix: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Which values the prefix's tensors hold, and how its modules and their configs are set.

    Args:
        prefix: The frozen layers.

    Returns:
        Something that differs after a write, but one in place through `.data`, after a setting
        changed, and where a forward was patched or a module replaced.
    """
    modules = [module for layer in prefix for module in layer.modules()]
    configs = {id(c): c for m in modules if (c := vars(m).get("config")) is not None}
    owners = [m for m in modules if not type(m).__module__.startswith(_LAUNCHERS)]
    return (
        *modules,
        *map(_value, _tensors(prefix)),
        *(setting for owner in (*owners, *configs.values()) for setting in _settings(owner)),
    )


def _settings(owner: object) -> Iterator[tuple[str, Any]]:
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, _NUMBERS):
            if name not in _SEEN_APART and not name.startswith(_COUNTERS):
                yield name, value
        elif isinstance(value, Tensor):
            yield name, _value(value)
        # Others with an underscore, such as how to checkpoint, are set anew without a change.
        elif name[0] != "_" and not name.startswith(_COUNTERS):
            yield name, _comparable(value)


def _comparable(value: object) -> Any:  # noqa: ANN401
    """What tells a setting that is no number from another: a patched forward, a list, a dict."""
    if isinstance(value, dict):
        return tuple((key, _comparable(part)) for key, part in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(map(_comparable, value))
    if isinstance(value, Tensor):
        return _value(value)
    if callable(value):
        function = own_forward(value)
        return function if type(function).__hash__ else id(function)
    return value if isinstance(value, _PLAIN) else None


def _tensors(prefix: Sequence[nn.Module]) -> Iterator[Tensor]:
    for layer in prefix:
        yield from layer.parameters()
        yield from layer.buffers()


def _sampled(prefix: Sequence[nn.Module]) -> Iterator[int]:
    samples: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in _tensors(prefix):
        size = tensor.numel()
        if (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.is_contiguous()
            and size
            and tensor.untyped_storage().nbytes()  # launchers free some
        ):
            step = -(-size // _NUM_SAMPLED)
            few = tensor.detach().as_strided((size // step,), (step,))
            samples.setdefault((tensor.dtype, tensor.device), []).append(few)
    for (_, device), parts in samples.items():
        if device.type != "meta":
            yield from row_keys(torch.cat(parts)[None]).tolist()


def _value(tensor: Tensor) -> tuple[int, int] | None:
    if is_sharded(tensor):  # gathered anew for each pass
        return None
    return tensor.data_ptr(), version(tensor)


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
            for hooks in _foreign_hooks(module):
                return f"{where} carries a hook ({', '.join(map(_origin, hooks[1].values()))})"
    return None


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Let no hook of the user's see what is computed inside.

    Args:
        model: The model. Its modules' hooks are put back in their order.
    """
    found = [hooks for module in model.modules() for hooks in _foreign_hooks(module)]
    before = [hooks.copy() for hooks, _ in found]
    try:
        for hooks, foreign in found:
            for key in foreign:
                del hooks[key]
        yield
    finally:
        for (hooks, _), all_hooks in zip(found, before, strict=True):
            hooks.clear()
            hooks.update(all_hooks)


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Put back what modules count or collect in buffers and plain attributes while they run.

    Args:
        model: The model.
    """
    modules = [*model.modules()]
    numbers = [
        {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
        for module in modules
    ]
    buffers = [(module._buffers, module._buffers.copy()) for module in modules]
    dense = [
        (buffer, buffer.clone())
        for _, own in buffers
        for buffer in own.values()
        if type(buffer) is Tensor and not buffer.is_meta and not buffer.is_sparse
    ]
    try:
        yield
    finally:
        for module, settings in zip(modules, numbers, strict=True):
            vars(module).update(settings)
        for now, before in buffers:
            now.update(before)
        for buffer, value in dense:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


def _foreign_hooks(module: nn.Module) -> Iterator[tuple[Hooks, Hooks]]:
    """All hooks of a kind, and those that nothing is known of; of the kinds that have some."""
    for kind in _HOOKS:
        hooks: Hooks = getattr(module, kind)
        foreign = {k: h for k, h in hooks.items() if not _origin(h).startswith(_HARMLESS_HOOKS)}
        if foreign:
            yield hooks, foreign


def _origin(hook: Any) -> str:  # noqa: ANN401 - any callable
    function = getattr(hook, "func", hook)  # of a functools.partial
    function = function if hasattr(function, "__qualname__") else type(function)
    return f"{function.__module__}.{function.__qualname__}"


def depends_on_other_rows(prefix: Sequence[nn.Module]) -> bool:
    """Whether a row's result depends on what else is in its batch, as with LLM.int8's outliers."""
    return any(
        type(tensor).__name__ == "Int8Params" for layer in prefix for tensor in layer.parameters()
    )
