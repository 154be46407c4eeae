"""What the frozen layers are besides what enters them: values, settings, hooks, modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from layerrl.replay.arguments import as_integers, row_keys
from layerrl.replay.attributes import (
    INTERNAL,
    LAUNCHERS,
    Snapshot,
    comparable,
    comparable_tensor,
    is_known,
)
from layerrl.seams import imported

with imported():
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd
    from torch.nn.modules.module import (
        _global_backward_hooks,
        _global_backward_pre_hooks,
        _global_forward_hooks,
        _global_forward_pre_hooks,
    )


Hooks = dict[int, Callable[..., Any]]

# Hooks of these move weights and activations about, or have collected what a call asked for, which
# is looked at apart. Those that torch.nn.utils puts on (spectral norm) do change results.
_HARMLESS_HOOKS = (*LAUNCHERS, "transformers.", "layerrl.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
]
_NUM_SAMPLED = 8
_NUMBERS = {bool, int, float, str}
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Options of a config that make a model return more than its output."""
_CLASSES = "__", "_abc_"  # prefixes of the attributes that Python gives to classes
_SEEN_APART = {"gradient_checkpointing", "use_cache", *OUTPUTS}


# Each call of the model looks at hundreds of modules, so that what is done with each has to be
# quick: torch's own walks (`modules`, `parameters`) take several times as long.


def modules_of(layers: Iterable[nn.Module], but: Iterable[nn.Module] = ()) -> list[nn.Module]:
    """All modules in some layers, the layers included, in a fixed order, `but` some and theirs."""
    found, queue, left_out = [], list(layers), {id(module) for module in but}
    while queue:
        module = queue.pop()
        if id(module) in left_out:
            continue
        found.append(module)
        queue.extend(child for child in module._modules.values() if child is not None)
    return found


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of modules; shared ones as often as they occur."""
    return [
        tensor
        for module in modules
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    ]


def state_of(prefix: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Which values the prefix's tensors hold, and how its modules and their configs are set.

    Returns:
        Something that differs after a write, but one in place through `.data`, after a setting
        changed, and where a forward was patched or a module replaced.
    """
    modules = modules_of(prefix)
    configs = {id(c): c for m in modules if (c := vars(m).get("config")) is not None}
    # FSDP2 gathers a layer's tensors anew for each pass, while the layer runs.
    gathered = any(type(module).__module__.startswith(LAUNCHERS) for module in modules)
    return (
        *modules,
        *(cls.forward for cls in dict.fromkeys(map(type, modules))),
        *map(comparable_tensor, [] if gathered else tensors_of(modules)),
        *(setting for owner in (*modules, *configs.values()) for setting in _settings(owner)),
    )


def _settings(owner: object) -> Iterator[tuple[str, Any]]:
    theirs, own = _classes(type(owner))
    for cls in own:
        yield from (
            (n, comparable(v)) for n, v in [*vars(cls).items()] if not n.startswith(_CLASSES)
        )
    if theirs is None:
        return
    for name, value in getattr(owner, "__dict__", {}).items():
        if name in INTERNAL or name == "config":
            continue
        kind = type(value)
        if kind in _NUMBERS:
            if kind is not bool or name not in _SEEN_APART:
                yield name, value
        # Those of a framework with an underscore, as how to checkpoint, are set anew without a
        # change, but for the adapter of PEFT that runs.
        elif not theirs or name[0] != "_" or name == "_active_adapter":
            yield name, comparable(value)


@lru_cache(maxsize=1 << 10)
def _classes(kind: type) -> tuple[bool | None, list[type]]:
    """Whether attributes may be a framework's (None: a launcher's wrapper), and user classes."""
    bases = [cls for cls in kind.__mro__ if not cls.__module__.startswith(LAUNCHERS)]
    own = [cls for cls in bases if cls is not object and not is_known(cls.__module__)]
    theirs = is_known(bases[0].__module__) or bases[0] is not kind
    return (None if bases[0] is nn.Module else theirs), own


def sampled(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return keys of a few elements of each dense tensor, for writes in place through `.data`.

    One for each dtype and device: these are read together, in one transfer.
    """
    samples: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in tensors:
        size = tensor.numel()
        if (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.is_contiguous()
            and size
            and tensor.untyped_storage().nbytes()  # launchers free some
        ):
            step = -(-size // _NUM_SAMPLED)
            few = tensor.detach().as_strided((size // step,), (step,))
            samples.setdefault((tensor.dtype, tensor.device), []).append(as_integers(few))
    together = [torch.cat(p)[None] for (_, device), p in samples.items() if device.type != "meta"]
    return tuple(int(row_keys(few)) for few in together)


def unfit(prefix: Sequence[nn.Module]) -> str | None:
    """Why what the prefix computes is no function of what enters it; None if it is."""
    if any(_GLOBAL_HOOKS):
        return "every module carries a global hook, which sees the layers run"
    why = next(filter(None, map(_unfit, modules_of(prefix))), None)
    if why is None:
        return None
    # By name, which takes longer, only where there is something to name.
    named = [(i, n, m) for i, layer in enumerate(prefix) for n, m in layer.named_modules()]
    layer, name, module = next((i, n, m) for i, n, m in named if _unfit(m))
    where = f"{name or type(module).__name__} of layer {layer}"
    return f"{_unfit(module)} ({where})"


def _unfit(module: nn.Module) -> str | None:
    if module.training:
        if isinstance(module, _DropoutNd) and module.p > 0:
            return f"dropout is active in frozen layers, p={module.p}"
        if isinstance(module, _BatchNorm):
            return "batch statistics are collected in frozen layers"
    for _, foreign in _foreign_hooks(module):
        return f"frozen layers carry a hook, {', '.join(map(_origin, foreign.values()))}"
    return None


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Let no hook of the user's, of a module or of a parameter, see what is computed inside."""
    found = [hooks for module in model.modules() for hooks in _foreign_hooks(module)]
    # autograd.grad calls a parameter's hooks, too; launchers have theirs at the accumulation.
    of_tensors = (p._backward_hooks for p in model.parameters())
    found += [(hooks, hooks.copy()) for hooks in of_tensors if hooks]
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
    """Put back what modules count or collect in buffers and attributes while they run."""
    before = Snapshot(model.modules())
    try:
        yield
    finally:
        before.restore()


def _foreign_hooks(module: nn.Module) -> Iterator[tuple[Hooks, Hooks]]:
    """All hooks of a kind, and those that nothing is known of; of the kinds that have some."""
    for kind in _HOOKS:
        hooks: Hooks = getattr(module, kind)
        if not hooks:
            continue
        foreign = {k: h for k, h in hooks.items() if not _origin(h).startswith(_HARMLESS_HOOKS)}
        if foreign:
            yield hooks, foreign


def _origin(hook: Any) -> str:  # any callable
    function = getattr(hook, "func", hook)  # of a functools.partial
    function = function if hasattr(function, "__qualname__") else type(function)
    return f"{function.__module__}.{function.__qualname__}"


def depends_on_other_rows(prefix: Sequence[nn.Module]) -> bool:
    """Whether a row's result depends on what else is in its batch, as with LLM.int8's outliers."""
    return any(
        type(tensor).__name__ == "Int8Params" for layer in prefix for tensor in layer.parameters()
    )
