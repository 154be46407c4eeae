"""What other tools take for a selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from layerrl.blocks import find_blocks, plain_name
from layerrl.errors import SelectionError

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

TOOLS = ("peft", "slime", "ms-swift", "axolotl")


def config_for(tool: object, selection: LayerSelection, base: nn.Module) -> dict[str, Any]:
    """The settings behind `LayerSelection.to_config`, which documents them.

    Args:
        tool: One of `TOOLS`.
        selection: What trains.
        base: The model, unwrapped; `meta` will do.

    Returns:
        Name of a setting to its value.

    Raises:
        SelectionError: If the tool is not known or cannot express the selection.
    """
    if tool not in TOOLS:
        raise SelectionError(f"to_config({tool!r}, ...): expected one of {', '.join(TOOLS)}")
    trained = selection.parameters(base)
    path = find_blocks(base).path
    _refuse(tool, selection, multimodal=_is_multimodal(base))
    if tool == "peft":
        return {"target_modules": _linear_modules(base, {*trained}, selection)}
    if tool == "slime":
        names = [rf"^decoder\.layers\.{layer}\." for layer in selection.layers]
        return {"only_train_params_name_list": names}
    whole = selection.modules is None
    names = [f"{path}.{layer}." for layer in selection.layers] if whole else [*trained]
    if tool == "axolotl":
        # It takes every dot for a literal one, and puts the backslash there itself.
        return {"unfrozen_parameters": [f"^{name}" if whole else f"^{name}$" for name in names]}
    return {
        "tuner_type": "full",
        "freeze_parameters_ratio": 1.0,
        "trainable_parameters": names,
    }


def _refuse(tool: object, selection: LayerSelection, *, multimodal: bool) -> None:
    problem = None
    if selection.full:
        problem = '"full" is full training, which needs no list of layers'
    elif set(selection.learning_rate_scale) != {1.0}:
        problem = "it has one learning rate for all layers. Select without boost"
    elif tool == "slime" and selection.modules is not None:
        problem = "Megatron fuses and renames what is inside a layer. Select whole layers"
    elif tool == "slime" and multimodal:
        problem = (
            "Megatron names the layers of text and vision alike. Select layers of a text model"
        )
    if problem:
        raise SelectionError(f"{tool} cannot be told to train {selection}: {problem}.")


def _is_multimodal(base: nn.Module) -> bool:
    config: Any = getattr(base, "config", None)
    return config is not None and config.get_text_config() is not config


def _linear_modules(base: nn.Module, trained: set[str], selection: LayerSelection) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    names = [
        plain_name(name)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and plain_name(f"{name}.weight") in trained
    ]
    if not names:
        raise SelectionError(
            f"peft cannot be told to train {selection}: it adapts linear modules, and no weight of "
            "one is selected."
        )
    return names
