"""Gradient checkpointing, and where the backward ends: at the first trained layer.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from layerrl.blocks import replaced_forwards, unwrap
from layerrl.randomness import devices_of, random_state, set_random_state
from layerrl.replacing import replaced
from layerrl.seams import INPUT_GRAD_HOOKS
from layerrl.selection import LayerSelection

logger = logging.getLogger(__name__)

_FLAG = "gradient_checkpointing"  # transformers' own, on each layer that can be checkpointed


@contextmanager
def backward_from_first_trained(model: nn.Module, selection: LayerSelection) -> Iterator[None]:
    """Let the backward of what is computed inside end at the first trained layer.

    With activation checkpointing, transformers makes the embedding's output require a gradient, so
    that everything above it is recomputed and visited even when it is frozen. Here that hook is
    removed and no layer of the frozen prefix is checkpointed; the trained tensors get the same
    gradients. Reentrant checkpointing needs an input with a gradient: there, and where the layers
    may checkpoint in code of their own, the one of the first trained layer gets it. A model that
    checkpoints reentrantly around its layers keeps the hook, and a warning says so. Flags and hooks
    are restored, also after an exception.

    Args:
        model: The model, after checkpointing has been enabled.
        selection: What trains; with something below the layers, nothing changes. That of a vision
            tower leaves the text's hook: rows without an image have no other gradient.
    """
    base = unwrap(model)
    _drop_forgotten(base)
    if selection.trains_below or base in _checkpointed_around:
        yield
        return
    blocks = selection.blocks(model)
    layers = blocks.modules
    below, first = layers[: selection.first], layers[selection.first : selection.first + 1]
    # Not base.disable_input_require_grads(): PEFT has a hook of its own.
    hooked = [
        (module, module._forward_hooks.copy())
        for module in blocks.part.modules()
        if any(map(_requires_input_grad, module._forward_hooks.values()))
    ]
    own_code = bool(hooked) and not _is_of_transformers(layers[0])
    if own_code and (not first or blocks.part is not base):  # it may checkpoint around more
        yield
        return

    def put_back() -> None:
        for module, hooks in hooked:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)

    try:
        for module, hooks in hooked:
            for key, function in hooks.items():
                if _requires_input_grad(function):
                    del module._forward_hooks[key]
        with (
            _not_checkpointed(below),
            _input_grad_at_checkpoint(*first) if first else nullcontext(),
            _watched(base, (*below, *first), put_back) if own_code else nullcontext(),
        ):
            yield
    finally:
        put_back()


def _drop_forgotten(base: nn.Module) -> None:
    """Leave one of the embedding's hooks of each kind, the newest.

    Each time checkpointing is enabled anew, as TRL does after every generation, transformers adds
    one and forgets the one before, which every later pass would call.
    """
    for module in base.modules():
        kinds = set()
        for key, function in reversed([*module._forward_hooks.items()]):
            if _requires_input_grad(function):
                kind = getattr(function, "__code__", function)
                if kind in kinds:
                    del module._forward_hooks[key]
                kinds.add(kind)


# Models that checkpoint reentrantly around their layers: all that is above the embedding.
_checkpointed_around: WeakSet[nn.Module] = WeakSet()


class _WithoutGradient(Exception):
    """A layer runs without a gradient in a pass that has one."""


@contextmanager
def _watched(
    base: nn.Module, layers: Sequence[nn.Module], put_back: Callable[[], None]
) -> Iterator[None]:
    """Give the first trained layer an input with a gradient, where code of its own checkpoints.

    A pass that calls the layers without gradient runs again, with the embedding's hook: the model's
    code checkpoints around them, reentrantly, and no hook of a layer can give what it checkpoints
    an input with a gradient.
    """
    watching = False

    def look(*_: object) -> None:
        if watching and not torch.is_grad_enabled():
            raise _WithoutGradient

    def watch(_: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal watching
            if not torch.is_grad_enabled() or base in _checkpointed_around:
                return forward(*args, **kwargs)
            drawn = random_state(*devices_of(base, *args, *kwargs.values()))
            watching = True
            try:
                return forward(*args, **kwargs)
            except _WithoutGradient:
                _checkpointed_around.add(base)
            finally:
                watching = False
            logger.warning(
                "%s checkpoints around its layers, reentrantly, in code of its own: the backward "
                "does not end at the first trained layer, but runs through all of them, with the "
                "same results. gradient_checkpointing_kwargs={'use_reentrant': False} may help.",
                type(base).__name__,
            )
            put_back()
            set_random_state(drawn)
            # Of images and text, the embedding was looked up before.
            if isinstance(embedded := kwargs.get("inputs_embeds"), Tensor):
                kwargs["inputs_embeds"] = _with_gradient(embedded)
            return forward(*args, **kwargs)

        return run

    hooks = [layer.register_forward_pre_hook(look, prepend=True) for layer in layers]
    hooks.append(layers[-1].register_forward_pre_hook(_require_input_grad, with_kwargs=True))
    try:
        with replaced_forwards([_caller_of(layers[0], base)], watch):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _caller_of(layer: nn.Module, base: nn.Module) -> nn.Module:
    """The module that holds the list of layers, whose forward calls them."""
    return next(
        module
        for module in base.modules()
        if any(isinstance(c, nn.ModuleList) and layer in {*c} for c in module.children())
    )


@contextmanager
def _input_grad_at_checkpoint(layer: Any) -> Iterator[None]:  # a module
    """Give a reentrant checkpoint of a layer an input with a gradient.

    Not by a hook of the layer: before transformers 5.23 hooks run inside the checkpoint.
    """
    given = getattr(layer, "_gradient_checkpointing_func", None)
    if given is None or not checkpoints_reentrantly(layer):
        yield
        return

    def checkpoint(run: Callable[..., Any], *args: Any) -> Any:
        return given(run, *_first_with_gradient(args)[0])

    with replaced(layer, _gradient_checkpointing_func=checkpoint):
        yield


@contextmanager
def _not_checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (module for layer in layers for module in layer.modules()):
            if getattr(module, _FLAG, False):
                stack.enter_context(replaced(module, **{_FLAG: False}))
        yield


def _requires_input_grad(hook: Any) -> bool:  # any callable
    return getattr(hook, "__name__", "") in INPUT_GRAD_HOOKS


def _is_of_transformers(layer: nn.Module) -> bool:
    """Whether it is checkpointed, if at all, as its flag says; others may do it in their code."""
    # FSDP2 puts a class of its own in front.
    modules = (cls.__module__ for cls in type(layer).__mro__)
    module = next(name for name in modules if not name.startswith("torch.distributed."))
    return module.startswith("transformers.models.")


def checkpoints_reentrantly(layer: nn.Module) -> bool:
    """Whether a layer is checkpointed reentrantly, for which its input must require a gradient."""
    if not getattr(layer, _FLAG, False):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    # torch's own default where a partial does not say: reentrant unless told otherwise
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def _require_input_grad(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not torch.is_grad_enabled() or _is_inside_checkpoint():
        return args, kwargs
    return _with_input_grad(args, kwargs)


def _is_inside_checkpoint() -> bool:
    """Whether this is recomputed without reentry: as it is now, though hooks are gone by then."""
    top: Any = getattr(torch._C, "_autograd")._top_saved_tensors_default_hooks  # noqa: B009
    hooks = top(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _with_input_grad(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments, of which the hidden states have a gradient: the first that could be."""
    order = sorted(kwargs, key=lambda name: name != "hidden_states")
    given, found = _first_with_gradient([*args, *(kwargs[name] for name in order)])
    if not found:
        return args, kwargs
    named = dict(zip(order, given[len(args) :], strict=True))
    return tuple(given[: len(args)]), {name: named[name] for name in kwargs}


def _first_with_gradient(values: Sequence[Any]) -> tuple[list[Any], bool]:
    given = list(values)
    for index, value in enumerate(given):
        if isinstance(value, Tensor) and value.is_floating_point():
            given[index] = _with_gradient(value)
            return given, True
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            inner, found = _first_with_gradient(value)
            if found:
                given[index] = type(value)(inner)
                return given, True
    return given, False


def _with_gradient(hidden: Tensor) -> Tensor:
    if hidden.requires_grad:
        return hidden
    # A copy, as a layer may work in place, which a leaf does not allow.
    return hidden.detach().requires_grad_().clone()
