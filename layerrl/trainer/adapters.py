"""LoRA and its like on chosen layers: PEFT makes the adapters, of what the selection trains."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn

from layerrl.adapters import adapted_modules, adapter_tensors, described_adapters
from layerrl.blocks import is_peft, meta_model
from layerrl.errors import SelectionError, TrainerError
from layerrl.selection import LayerSelection


def has_adapters(model: object, peft_config: object = None) -> bool:
    """Whether adapters train, and not the model's own tensors.

    Args:
        model: The model, or what stands for it until it is loaded.
        peft_config: The trainer's argument of that name.

    Returns:
        True of a PEFT model, or if the trainer will make one.

    Raises:
        SelectionError: If a model has adapters without PEFT's wrapper, put into it by transformers
            (`model.add_adapter`) or `inject_adapter_in_model`: TRL takes them for its own tensors.
    """
    if isinstance(model, nn.Module):
        given = described_adapters(model)
        if given:
            raise SelectionError(
                f"a selection was given together with {given}, that PEFT has not wrapped: TRL "
                "would not know them for adapters. Pass peft_config to the trainer, or a model of "
                "get_peft_model; or merge them into the model first."
            )
        if is_peft(model):
            return True
    return peft_config is not None


def check_prompt_learning(model: nn.Module) -> None:
    """Refuse a PEFT model whose method does not belong to layers."""
    if is_peft(model) and not adapter_tensors(model):
        configs: Any = getattr(model, "peft_config", {})
        kinds = ", ".join(type(config).__name__ for config in configs.values())
        raise SelectionError(
            f"a selection was given together with a PEFT model of {kinds}, which has no active "
            "adapters in layers. Give it LoRA, or another method that adapts modules of layers."
        )


def refuse_full(selection: Any) -> None:
    """Refuse `"full"` beside adapters."""
    raise SelectionError(
        f"selection={str(selection)!r} trains every parameter, and adapters were to train in their "
        'place: select "all" for adapters in every layer, or leave out the adapters.'
    )


def refuse_announcing(trainer: str) -> None:
    """Refuse a trainer that announces to vLLM what requires gradients: the adapters."""
    raise TrainerError(
        f"{trainer} announces to vLLM the names of what trains, and adapters have none there. Use "
        "a trainer that generates between its steps (GRPO, RLOO), or train the layers themselves."
    )


def config_for(config: Any, described: Any, selection: Any) -> Any:
    """A `peft_config` that adapts what a selection trains, and nothing else.

    PEFT itself says what the given one would adapt, in a model without weights; of that stays what
    lies in the selected layers, modules and parts.

    Args:
        config: As the trainer was given it. Not changed.
        described: The model's config.
        selection: What trains.

    Returns:
        A copy that names modules and parameters one by one.

    Raises:
        SelectionError: If its method does not belong to layers, if it trains something outside the
            selection, or if it adapts nothing in a selected layer or part.
    """
    import peft

    if not isinstance(config, peft.PeftConfig):
        return config  # the trainer says what it expects
    if not isinstance(selection, LayerSelection):
        raise SelectionError(
            "the config of the model could not be read, which peft_config needs to be restricted "
            "to the selection: pass the loaded model"
        )
    _refuse(config, selection)
    skeleton = meta_model(described)
    asked: Any = copy.deepcopy(config)
    if hasattr(asked, "init_lora_weights"):
        asked.init_lora_weights = True  # others look at weights, and here are none
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            adapted = peft.get_peft_model(skeleton, asked)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise SelectionError(f"PEFT refuses the peft_config for this model: {error}") from error
    places, chosen = adapter_tensors(adapted), selection.parameters(adapted)
    return _narrowed(config, adapted, selection, {places[name] for name in chosen})


def _refuse(config: Any, selection: LayerSelection) -> None:
    kind, problem = type(config).__name__, ""
    layers = getattr(config, "layers_to_transform", None)
    layers = [layers] if isinstance(layers, int) else layers or ()
    if not hasattr(config, "target_modules"):
        problem = f"{kind} adapts no modules of layers: take LoraConfig or its like"
    elif getattr(config, "bias", "none") != "none":
        problem = f"bias={config.bias!r} also trains biases outside the adapters: leave it out"
    elif getattr(config, "layer_replication", None):
        problem = "layer_replication makes layers that the selection does not know"
    elif getattr(config, "trainable_token_indices", None):
        problem = "trainable_token_indices trains embeddings beside the adapters: leave it out"
    elif outside := sorted({*layers} - {*selection.layers}):
        problem = (
            f"its layers_to_transform={list(layers)} names layers {outside} outside the "
            "selection: leave it out, or select them"
        )
    if problem:
        raise SelectionError(f"{selection} was given together with a peft_config: {problem}.")


def _narrowed(config: Any, adapted: nn.Module, selection: LayerSelection, weights: set[str]) -> Any:
    """A copy of a config that names, of all that it adapts, what holds some weights."""
    kept: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    saved: list[str] = []
    left_out: Counter[str] = Counter()
    parameters = getattr(adapted.base_model, "targeted_parameter_names", ())
    modules = {*getattr(adapted.base_model, "targeted_module_names", ())}
    for name in parameters:
        if name in weights:
            kept["target_parameters"].append(name)
        else:
            left_out[name.rpartition(".")[2]] += 1
    for path, module in adapted_modules(adapted).items():
        is_saved = hasattr(module, "modules_to_save")
        if path not in modules and not is_saved:
            continue
        if any(weight.startswith(f"{path}.") for weight in weights):
            (saved if is_saved else kept["target_modules"]).append(path)
        else:
            left_out[path.rpartition(".")[2]] += 1
    _refuse_outside(config, left_out, [*saved, *kept["target_modules"], *parameters], selection)
    narrowed = copy.deepcopy(config)
    for name, value in kept.items():
        if hasattr(narrowed, name):
            setattr(narrowed, name, value or (None if name == "target_parameters" else []))
    if hasattr(narrowed, "modules_to_save"):
        narrowed.modules_to_save = saved or None
    for name in ("layers_to_transform", "layers_pattern"):  # said by the names
        if hasattr(narrowed, name):
            setattr(narrowed, name, None)
    return narrowed


def _refuse_outside(
    config: Any, left_out: Counter[str], kept: list[str], selection: LayerSelection
) -> None:
    """What the caller named, and the selection has nowhere: silence would be a surprise."""
    inside = {path.rpartition(".")[2] for path in kept}
    for name in ("target_modules", "modules_to_save"):
        named = getattr(config, name, None)
        named = () if named is None or isinstance(named, str) else named
        lost = sorted(n for n in named if n.rpartition(".")[2] in {*left_out} - inside)
        if lost:
            raise SelectionError(
                f"{selection} was given together with a peft_config whose {name} has {lost[0]!r}, "
                "which lies outside: leave it out, or select it (a head or embeddings by also=)."
            )
