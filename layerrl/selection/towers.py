"""Where a vision-language model keeps its vision tower and its projector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from layerrl.blocks import Blocks, find_blocks, outermost_lists, plain_name, unwrap
from layerrl.errors import ModelError

STACKS = {"text": "decoder", "vision": "vision"}
"""Stacks that a selection can be of, and what kind of layers each has."""
PROJECTORS = frozenset(
    {
        "aligner",
        "connector",
        "deepstack_merger_list",
        "embed_vision",
        "merger",
        "merger_list",
        "mm_projector",
        "multi_modal_projector",
        "projector",
        "resampler_model",
        "vision_adapter",
        "vision_projection",
    }
)
"""What transformers calls the modules that make tokens of a tower's output. It has no getter of
them, as it has of the tower."""


def blocks_of(model: nn.Module, stack: str) -> Blocks:
    """Return the layers of one stack of a model.

    A tower is what transformers' own `get_encoder(modality="image")` gives. Its layers are its one
    list of modules; of several, the one whose modules transformers can checkpoint.

    Raises:
        ModelError: If the model has no such stack, or several.
    """
    if stack == "text":
        return find_blocks(model)
    base = unwrap(model)
    name, tower = type(base).__name__, _tower(base)
    if tower is None:
        raise ModelError(
            f'stack="vision": {name} is no decoder-only model with a vision tower, which '
            'transformers\' get_encoder(modality="image") would give. Text layers are selected '
            "without stack."
        )
    path = next(plain_name(name) for name, module in base.named_modules() if module is tower)
    stacks = dict(outermost_lists(tower, f"{path}."))
    described = ", ".join(f"{path!r} ({len(each)})" for path, each in stacks.items()) or "none"
    if len(stacks) > 1:
        stacks = {
            path: each
            for path, each in stacks.items()
            if all(hasattr(block, "gradient_checkpointing") for block in each)
        }
    if len(stacks) != 1:
        raise ModelError(
            f'stack="vision": the vision tower of {name}, {path!r}, has no unambiguous stack of '
            f"layers. Candidates (layers): {described}. Name what trains by also=, globs of full "
            "names."
        )
    [(path, blocks)] = stacks.items()
    return Blocks(path=path, modules=tuple(blocks), part=tower)


def projectors(base: nn.Module) -> list[nn.Module]:
    """The modules that make tokens of what a vision tower computes, beside the tower or in it.

    Returns:
        All of them: a Qwen3-VL has one for each layer that it takes features from. None in a model
        without a tower.
    """
    tower = _tower(base)
    if tower is None:
        return []
    holder = next(module for module in base.modules() if tower in module.children())
    beside = [child for name, child in holder.named_children() if name in PROJECTORS]
    return [*beside, *_projectors_in(tower)]


def _projectors_in(module: nn.Module) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if name in PROJECTORS:
            yield child
        elif not isinstance(child, nn.ModuleList):
            yield from _projectors_in(child)


def _tower(base: nn.Module) -> nn.Module | None:
    getter: Any = getattr(base, "get_encoder", None)
    if getter is None or getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    try:
        tower = getter(modality="image")
    except TypeError:  # a model's own getter, of another kind
        return None
    # A model without a tower gives itself, or the model inside its head.
    whole = (base, getattr(base, "base_model", None))
    return None if tower is None or any(tower is each for each in whole) else tower
