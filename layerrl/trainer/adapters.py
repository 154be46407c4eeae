"""LoRA and its like on chosen layers: PEFT makes the adapters, of what the selection trains."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerrl.adapters import adapted_modules, adapter_tensors, described_adapters
from layerrl.blocks import is_peft, meta_model
from layerrl.checks import check_kind
from layerrl.costs import linear_weights
from layerrl.errors import SelectionError, TrainerError
from layerrl.schema import fitted
from layerrl.selection import LayerSelection
from layerrl.stored import bytes_of, decoded, refused_as, tensors_in
from layerrl.trainer.whole_models import CheckpointError
from layerrl.warning import warn

ADAPTED = "adapted_base.json"
"""Beside the adapters of a checkpoint: the digest of all that they leave as it is."""
_SCALES = ("lora_alpha", "use_rslora", "use_dora", "alpha_pattern")


def has_adapters(model: object, peft_config: object = None) -> bool:
    """Whether adapters train, not the model's own tensors; refuse those that PEFT did not wrap."""
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


def check_adapters(model: nn.Module) -> None:
    """Refuse a PEFT model whose adapters are not in layers, switched off, or several at once."""
    if not is_peft(model):
        return
    configs: Any = getattr(model, "peft_config", {})
    problem = ""
    modules = [*adapted_modules(model).values()]
    active = {name for module in modules for name in module.active_adapters}
    if not adapter_tensors(model):
        kinds = ", ".join(type(config).__name__ for config in configs.values())
        problem = (
            f"of {kinds}, which has no active adapters in layers. Give it LoRA, or another method "
            "that adapts modules of layers"
        )
    elif any(getattr(module, "disable_adapters", False) for module in modules):
        problem = "whose adapters are switched off: call its enable_adapter_layers"
    elif len(active) > 1:
        problem = (
            f"with {len(active)} active adapters, {sorted(active)}, of which TRL trains one: call "
            "its set_adapter with that one"
        )
    if problem:
        raise SelectionError(f"a selection was given together with a PEFT model {problem}.")


@contextmanager
def reference_of_default(model: Any) -> Iterator[None]:
    """Inside, TRL makes the reference of a PEFT model: a copy of the adapter "default"."""
    try:
        yield
    except KeyError as error:
        names = [*model.peft_config] if is_peft(model) else ["default"]
        if error.args != ("default",) or "default" in names:
            raise
        raise SelectionError(
            f"a PEFT model with the adapters {sorted(names)} was given to a trainer with a "
            "reference, which TRL makes of the adapter 'default': load it under that name "
            "(adapter_name='default', as PEFT does by itself), or set beta=0 where there is a beta."
        ) from error


def note_base(folder: Path, digest: str | None) -> None:
    """Write beside adapters what base they were trained on."""
    if digest is not None:
        (folder / ADAPTED).write_text(json.dumps({"frozen": digest}) + "\n", encoding="utf-8")


def active_in(model: nn.Module, checkpoint: Path) -> tuple[str, Path]:
    """The adapter that trains, and where PEFT writes it: one that is not "default" further down."""
    [active] = {name for m in adapted_modules(model).values() for name in m.active_adapters}
    return active, checkpoint if active == "default" else checkpoint / active


def check_checkpoint(model: nn.Module, folder: Path, digest: str | None) -> None:
    """Refuse to go on with adapters of another run: PEFT loads what fits, and says nothing."""
    import peft

    active, place = active_in(model, folder)
    file, known = place / "adapter_model.safetensors", place / "adapter_config.json"
    said = f"{folder} holds no readable adapters, and here adapters train"
    advice = "Resume it as the run that wrote it was made, or start a new run from its weights."
    with refused_as(CheckpointError, said, advice):
        with tensors_in(file) as stored:
            found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        then = fitted(dict[str, Any], decoded(bytes_of(known)))
    own = peft.get_peft_model_state_dict(model, adapter_name=active)  # pyright: ignore[reportArgumentType]
    expected = {name: tuple(value.shape) for name, value in own.items()}
    now = model.peft_config[active].to_dict()  # pyright: ignore[reportIndexIssue, reportCallIssue, reportAttributeAccessIssue, reportArgumentType]
    wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
    wrong += [f"{n}={then.get(n)!r}" for n in _SCALES if n in now and then.get(n) != now[n]]
    if wrong:
        raise CheckpointError(
            f"{folder} holds other adapters than this run trains: {wrong[0]} and {len(wrong) - 1} "
            "more differ. Nothing was loaded. Resume with the selection and peft_config that "
            "wrote it."
        )
    base = folder / ADAPTED  # a checkpoint of plain TRL has none
    noted = ""
    if base.exists():
        with refused_as(CheckpointError, f"{base} is damaged"):
            noted = fitted(dict[str, str], decoded(bytes_of(base))).get("frozen", "")
    if noted and digest and noted != digest:
        raise CheckpointError(
            f"the adapters in {folder} were trained on another base: the frozen tensors of this "
            "run have other bits. Nothing was loaded. Resume with the model, revision and dtype "
            "that the run began with."
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
    """Return a `peft_config` that adapts what a selection trains and nothing else, by full names.

    PEFT itself says what the given one would adapt, in a model without weights; of that stays what
    lies in the selected layers, modules and parts.

    Raises:
        SelectionError: If its method does not belong to layers, if it trains something outside the
            selection, or if it adapts nothing in a selected layer or part.
    """
    import peft

    check_kind(
        "peft_config", config, peft.PeftConfig, "PEFT's, such as a LoraConfig", SelectionError
    )
    if not isinstance(selection, LayerSelection):
        raise SelectionError(
            "the config of the model could not be read, which peft_config needs to be restricted "
            "to the selection: pass the loaded model"
        )
    _refuse(config, selection)
    skeleton = meta_model(described)
    blocks = selection.blocks(skeleton)
    names = [name for layer in selection.layers for name in linear_weights(blocks, layer)]
    linear = [*dict.fromkeys(name.removesuffix(".weight") for name in names)]
    asked: Any = copy.deepcopy(config)
    if hasattr(asked, "init_lora_weights"):
        asked.init_lora_weights = True  # others look at weights, and here are none
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            adapted = peft.get_peft_model(skeleton, asked)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise SelectionError(f"PEFT refuses the peft_config for this model: {error}") from error
    places = adapter_tensors(adapted)
    try:
        chosen = selection.parameters(adapted)
    except SelectionError as error:
        raise SelectionError(f"{selection} and the peft_config do not meet: {error}") from error
    return _narrowed(config, adapted, selection, {places[name] for name in chosen}, linear)


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


def _narrowed(
    config: Any, adapted: Any, selection: LayerSelection, weights: set[str], linear: list[str]
) -> Any:
    """A copy of a config that names, of all that it adapts, what holds some weights."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    kept: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    kept["modules_to_save"] = []
    left_out: list[str] = []
    parameters = getattr(adapted.base_model, "targeted_parameter_names", ())
    modules = {*getattr(adapted.base_model, "targeted_module_names", ())}
    for name in parameters:
        (kept["target_parameters"] if name in weights else left_out).append(name)
    for path, module in adapted_modules(adapted).items():
        is_saved = hasattr(module, "modules_to_save")
        if path in modules or is_saved:
            here = kept["modules_to_save" if is_saved else "target_modules"]
            holds = any(weight.startswith(f"{path}.") for weight in weights)
            (here if holds else left_out).append(path)
    inside = [name for names in kept.values() for name in names]
    _refuse_outside(config, left_out, inside, selection)
    [asked] = adapted.peft_config.values()  # without the names that PEFT knows under others
    _warn_of_nothing(asked, [*inside, *left_out], linear)
    narrowed = copy.deepcopy(config)
    nothing = {"target_modules": [] if kept["target_parameters"] else DUMMY_TARGET_MODULES}
    for name, value in kept.items():
        if hasattr(narrowed, name):
            setattr(narrowed, name, value or nothing.get(name))
    for name in ("layers_to_transform", "layers_pattern"):  # said by the names
        if hasattr(narrowed, name):
            setattr(narrowed, name, None)
    return narrowed


def _refuse_outside(
    config: Any, left_out: list[str], kept: list[str], selection: LayerSelection
) -> None:
    """What the caller named, and the selection has nowhere: silence would be a surprise."""
    for name, given in _named(config):
        if _in(left_out, given) and not _in(kept, given):
            raise SelectionError(
                f"{selection} was given together with a peft_config whose {name} has {given!r}, "
                "which lies outside: leave it out, or select it (a head or embeddings by also=)."
            )


def _warn_of_nothing(config: Any, places: list[str], linear: list[str]) -> None:
    """Name what matches nothing beside names that do: PEFT passes over it."""
    idle = [f"{name} has {given!r}" for name, given in _named(config) if not _in(places, given)]
    if idle:
        warn(
            f"of the peft_config, {', '.join(idle)}, which matches nothing in the model: it adapts "
            f"nothing. The selected layers have {', '.join(linear)}."
        )


def _named(config: Any) -> list[tuple[str, str]]:
    """The names that a config lists, each with what lists it."""
    listed = []
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        given = getattr(config, name, None)
        listed += [(name, each) for each in sorted(given)] if isinstance(given, list | set) else []
    return listed


def _in(names: list[str], given: str) -> bool:
    return any(name == given or name.endswith(f".{given}") for name in names)
