"""PEFT's adapters in a model: which tensors are theirs, and what each of them adapts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from layerrl.blocks import is_peft, plain_name, unwrap
from layerrl.quantisation import is_quantised


def adapter_tensors(model: nn.Module) -> dict[str, str]:
    """The tensors of the active adapters in a model: of LoRA and its like, and modules to save.

    Returns:
        Plain name of an adapter's tensor, to that of the weight it adapts, by the name which that
        has without adapters. Empty for a model without.
    """
    found: dict[str, str] = {}
    for path, module in _adapted(unwrap(model)):
        weight = f"{without_wrappers(path)}.{getattr(module, 'parameter_name', 'weight')}"
        if hasattr(module, "modules_to_save"):
            own = [("modules_to_save", name) for name in module.active_adapters]
        else:
            frozen: Mapping[str, Any] = getattr(module, "frozen_peft_weight_names", {})
            own = [
                (kind, name)
                for name in module.active_adapters
                for kind in module.adapter_layer_names
                if kind not in frozen.get(name, ())
            ]
        for kind, adapter in own:
            for name in _parameters(getattr(module, kind, {}), adapter):
                last = f"{without_wrappers(path)}.{name}" if kind == "modules_to_save" else weight
                found[plain_name(".".join(filter(None, (path, kind, adapter, name))))] = last
    return found


def _parameters(held: Any, adapter: str) -> Iterator[str]:
    """Names, inside an adapter's part of a kind, of its tensors; `""` for one that is a tensor."""
    part = dict(held.items()).get(adapter)
    if isinstance(part, nn.Parameter):
        yield ""
    elif isinstance(part, nn.Module):
        yield from (name for name, _ in part.named_parameters())


def idle_adapters(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of tensors in adapters that are not active, so that no pass uses them.

    Returns:
        Plain prefixes, which end where an adapter's name does. Empty for a model without adapters.
        That of TRL's reference, `"ref"`, counts as part of the model: losses depend on it.
    """
    return tuple(
        f"{plain_name(path)}.{kind}.{adapter}."
        for path, module in _adapted(unwrap(model))
        for kind in module.adapter_layer_names
        for adapter in getattr(module, kind, {}).keys()  # noqa: SIM118
        if adapter not in (*module.active_adapters, "ref")
    )


def without_wrappers(name: str) -> str:
    """The name that a parameter or module had before anything was put around it."""
    return plain_name(name).replace(".base_layer", "")


def merged_weights(model: nn.Module) -> set[str]:
    """The weights that adapters are merged into, by the names that they had before."""
    return {
        f"{without_wrappers(path)}.{name}"
        for path, module in _adapted(unwrap(model))
        if not hasattr(module, "modules_to_save") and module.merged
        for name, _ in module.get_base_layer().named_parameters()
    }


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """Plain name without adapters to the module that PEFT put there, the outermost of several."""
    found: dict[str, Any] = {}
    for path, module in _adapted(unwrap(model)):
        found.setdefault(without_wrappers(path), module)
    return found


def described_adapters(model: nn.Module) -> str:
    """Adapters in a model that PEFT has not wrapped, in words; empty for any other."""
    if is_peft(model):
        return ""
    names = [name for name, _ in _adapted(unwrap(model))]
    if names:
        return f"a model with adapters, in {names[0]!r} and {len(names) - 1} other modules"
    if getattr(unwrap(model), "_hf_peft_config_loaded", False):  # set by model.add_adapter
        return "a model to which transformers has added adapters"
    return ""


def _adapted(base: nn.Module) -> Iterator[tuple[str, Any]]:
    # Nothing can be adapted before PEFT is imported, which is not done for this.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    others = sys.modules.get("peft.utils.other")
    if tuners is None or others is None:
        return
    kinds = (tuners.BaseTunerLayer, others.ModulesToSaveWrapper)
    yield from ((name, m) for name, m in base.named_modules() if isinstance(m, kinds))


def served_names(model: nn.Module) -> dict[str, str]:
    """Names that a model's weights have in an inference engine, once its adapters are merged.

    Returns:
        Plain name of a parameter that is no adapter's, to its name in a model without adapters; of
        a module to save, of the copy that trains.
    """
    base = unwrap(model)
    added: list[str] = []
    copies: dict[str, str] = {}
    for path, module in _adapted(base):
        if hasattr(module, "modules_to_save"):
            added += [f"{path}.original_module.", f"{path}.modules_to_save."]
            active = [f"{path}.modules_to_save.{name}." for name in module.active_adapters]
            copies |= dict.fromkeys(active, f"{path}.")
        else:
            added += [f"{path}.{kind}." for kind in module.adapter_layer_names]
    served: dict[str, str] = {}
    for full, _ in base.named_parameters():
        name = plain_name(full)
        copy = next((prefix for prefix in copies if name.startswith(prefix)), None)
        if copy is not None:
            served[name] = without_wrappers(copies[copy] + name.removeprefix(copy))
        elif not name.startswith(tuple(added)):
            served[name] = without_wrappers(name)
    return served


@contextmanager
def weights_as_they_were(model: nn.Module) -> Iterator[None]:
    """Inside, adapters may be merged into weights; afterwards these have the bits of before.

    PEFT adds the adapters and subtracts them again, which rounds. What is merged is unmerged also
    after an exception.
    """
    modules = [m for _, m in _adapted(unwrap(model)) if not hasattr(m, "modules_to_save")]
    before = [
        (layer, name, p, p.data if is_quantised(p) else p.detach().clone())
        for layer in {id(m.get_base_layer()): m.get_base_layer() for m in modules}.values()
        for name, p in layer.named_parameters(recurse=False)
    ]
    try:
        yield
    finally:
        for module in modules:
            if module.merged:
                module.unmerge()
        for layer, name, parameter, value in before:
            if layer._parameters[name] is not parameter:  # packed anew
                setattr(layer, name, parameter)
            elif value is not parameter.data:
                parameter.data.copy_(value)
