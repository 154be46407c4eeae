"""What other tools take for a selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from layerrl.blocks import plain_name
from layerrl.checks import check_choice
from layerrl.errors import SelectionError
from layerrl.seams import imported
from layerrl.selection.rows import names_rows

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

TOOLS = ("peft", "slime", "ms-swift", "axolotl")


def config_for(tool: object, selection: LayerSelection, base: nn.Module) -> dict[str, Any]:
    """The settings behind `LayerSelection.to_config`, which documents them."""
    check_choice("tool", tool, TOOLS, SelectionError)
    trained = selection.parameters(base)
    path = selection.blocks(base).path
    config: Any = getattr(base, "config", None)
    is_multimodal = config is not None and config.get_text_config() is not config
    _refuse(tool, selection, multimodal=is_multimodal)
    if tool == "peft":
        return {"target_modules": _linear_modules(base, {*trained}, selection)}
    if tool == "slime":
        names = [rf"^decoder\.layers\.{layer}\." for layer in selection.layers]
        return {"only_train_params_name_list": names}
    whole = selection.modules is None
    layers = [f"{path}.{layer}." for layer in selection.layers] if whole else []
    alone = [name for name in trained if not name.startswith(tuple(layers))]
    if tool == "axolotl":
        # It takes every dot for a literal one, and puts the backslash there itself.
        names = [*(f"^{layer}" for layer in layers), *(f"^{name}$" for name in alone)]
        return {"unfrozen_parameters": names}
    return {
        "tuner_type": "full",
        "freeze_parameters_ratio": 1.0,
        "trainable_parameters": [*layers, *alone],
    }


def _refuse(tool: object, selection: LayerSelection, *, multimodal: bool) -> None:
    problem = None
    if selection.full:
        problem = '"full" is full training, which needs no list of layers'
    elif selection.is_boosted:
        problem = "it has one learning rate for all layers. Select without boost"
    elif tool in ("peft", "slime") and selection.also:
        problem = f"it takes layers alone. Leave out also={list(selection.also)}"
    elif any(map(names_rows, selection.also)):
        problem = "it would train all rows of the embedding. Leave out the new tokens"
    elif tool == "slime" and selection.modules is not None:
        problem = "Megatron fuses and renames what is inside a layer. Select whole layers"
    elif tool == "slime" and multimodal:
        problem = (
            "Megatron names the layers of text and vision alike. Select layers of a text model"
        )
    if problem:
        raise SelectionError(f"{tool} cannot be told to train {selection}: {problem}.")


def _linear_modules(base: nn.Module, trained: set[str], selection: LayerSelection) -> list[str]:
    with imported():
        from transformers.pytorch_utils import Conv1D

    modules = {plain_name(name): module for name, module in base.named_modules()}
    names = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and f"{name}.weight" in trained
        # A router that is one, but returns more than its product, is no linear module to PEFT.
        and not type(module).__module__.startswith("transformers.models.")
    ]
    if not names:
        raise SelectionError(
            f"peft cannot be told to train {selection}: it adapts linear modules, and no weight of "
            "one is selected."
        )
    rewritten = _rewritten_by_peft(base, names)
    if rewritten:
        raise SelectionError(
            f"peft cannot be told to train {selection}: in a {type(base).__name__}, it takes "
            f"{rewritten[0]!r} and {len(rewritten) - 1} others of {len(names)} linear modules "
            "for the experts of every layer, and would adapt those. Select what it does not "
            'rewrite, such as modules="self_attn.*", or train the layers themselves.'
        )
    named = {*names}
    for other in modules.keys() - named:  # PEFT also takes a target for the end of a name
        parts = other.split(".")
        if any(".".join(parts[start:]) in named for start in range(1, len(parts))):
            raise SelectionError(
                f"peft cannot be told to train {selection}: the name of {other!r} ends as that of "
                "a selected module does, and it would adapt both."
            )
    return names


def _rewritten_by_peft(base: nn.Module, names: list[str]) -> list[str]:
    """Targets that PEFT replaces, for models whose experts transformers has fused; it is asked."""
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # there is none, or none that does
        return []
    if not hasattr(getattr(base, "config", None), "model_type"):
        return []
    left: set[str] = set()
    for name in names:  # one by one: it refuses some without their siblings
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, base, None)
        except ValueError:
            continue
        left |= {*(config.target_modules or ())}
    return [name for name in names if name not in left]
