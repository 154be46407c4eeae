"""PEFT's adapters in a model: which tensors are theirs, and what each of them adapts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from layerrl.blocks import is_peft, plain_name, unwrap

if TYPE_CHECKING:
    from collections.abc import Iterator


def adapter_tensors(model: nn.Module) -> dict[str, str]:
    """The tensors of the active adapters in a model: of LoRA and its like, and modules to save.

    Args:
        model: Any model, wrapped or not.

    Returns:
        Plain name of an adapter's tensor, to that of the weight it adapts, by the name which that
        has without adapters. Empty for a model without.
    """
    found: dict[str, str] = {}
    for path, module in _adapted(unwrap(model)):
        weight = f"{_without_wrappers(path)}.{getattr(module, 'parameter_name', 'weight')}"
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
                last = f"{_without_wrappers(path)}.{name}" if kind == "modules_to_save" else weight
                found[plain_name(".".join(filter(None, (path, kind, adapter, name))))] = last
    return found


def _parameters(held: Any, adapter: str) -> Iterator[str]:
    """Names, inside an adapter's part of a kind, of its tensors; `""` for one that is a tensor."""
    part = dict(held.items()).get(adapter)
    if isinstance(part, nn.Parameter):
        yield ""
    elif isinstance(part, nn.Module):
        yield from (name for name, _ in part.named_parameters())


def _without_wrappers(name: str) -> str:
    return plain_name(name).replace(".base_layer", "")


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that PEFT has put in the place of others.

    Args:
        model: Any model, wrapped or not.

    Returns:
        Plain name, as it is without adapters, to module; of several around one, the outermost.
    """
    found: dict[str, Any] = {}
    for path, module in _adapted(unwrap(model)):
        found.setdefault(_without_wrappers(path), module)
    return found


def described_adapters(model: nn.Module) -> str:
    """Describe adapters in a model that PEFT has not wrapped.

    Args:
        model: Any model.

    Returns:
        A description; empty where there is nothing, and for a PEFT model.
    """
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
