"""Parts of a model outside its decoder layers, as `also=` names them: the head, the final norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from layerrl.blocks import Blocks, embedding_of, find_blocks, head_of, plain_name
from layerrl.errors import SelectionError
from layerrl.selection.parsing import PARTS, matches
from layerrl.selection.rows import check_rows, frozen_rows, names_rows, token_tensors
from layerrl.selection.towers import projectors

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

ABOVE = {
    "text": frozenset({"head", "final_norm"}),
    "vision": frozenset({"head", "final_norm", "projector"}),
}
"""Parts that come after the last layer of a stack: those below the first that trains stay frozen
below all that trains."""
_SHOWN = 12


def names_in_parts(
    selection: LayerSelection, base: nn.Module, blocks: Blocks, adapted: Mapping[str, str]
) -> dict[str, set[str]]:
    """Part to the plain names of its tensors, shared ones too, that train outside the layers."""
    outside = [
        name for name, _ in _named_parameters(base) if not name.startswith(f"{blocks.path}.")
    ]
    found: dict[str, set[str]] = {}
    for part in selection.also:
        if part == "head":
            names = _head(base, outside)
        elif part == "final_norm":
            names = _final_norm(base, find_blocks(base))
        elif part == "embeddings":
            names = _inside(base, [embedding_of(base)])
        elif part == "projector":
            names = _inside(base, projectors(base))
        elif names_rows(part) and adapted:
            raise SelectionError(
                f"also={part!r} trains rows of the model's own embedding, and the model has "
                "adapters, which train in place of its tensors: train the rows first, without "
                "adapters, or leave them out"
            )
        elif names_rows(part):
            has_rows = hasattr(embedding_of(base), "weight")
            names = token_tensors(base) if has_rows else set()
        else:
            known_as = {name: {name, adapted.get(name, name)} for name in outside}
            names = {n for n in outside if any(matches(name, part) for name in known_as[n])}
        if not names:
            raise SelectionError(_explain_missing(part, base, blocks, outside))
        found[part] = names & {*adapted} if adapted else names
        if not found[part]:
            raise SelectionError(
                f"also={part!r} names what has no adapter that trains, and the model has adapters "
                "elsewhere: name it in target_modules or modules_to_save of the peft_config"
            )
    if any(map(names_rows, found)):
        check_rows(selection, base, found)
    return found


def rows_kept(selection: LayerSelection, base: nn.Module) -> dict[str, list[slice]]:
    """Return the rows of trained tensors that do not train: of the tokens that were there before.

    By the plain name of each tensor that trains by rows, runs of its other rows; mostly none.
    """
    if not any(map(names_rows, selection.also)):
        return {}
    return frozen_rows(selection, base, names_in_parts(selection, base, selection.blocks(base), {}))


def _head(base: nn.Module, outside: list[str]) -> set[str]:
    """What makes tokens of hidden states, or a classifier's scores: all outside the base model."""
    names = _inside(base, [head_of(base)])
    prefix = getattr(base, "base_model_prefix", "")
    if names or not prefix or getattr(base, prefix, base) is base:
        return names
    return {name for name in outside if not name.startswith(f"{prefix}.")}


def _final_norm(base: nn.Module, blocks: Blocks) -> set[str]:
    """The norm beside the layers: of several, the first that is registered after them."""
    holder = base.get_submodule(blocks.path.rpartition(".")[0])
    children = list(holder.children())
    place = next(i for i, child in enumerate(children) if blocks.modules[0] in {*child.children()})
    norms = [i for i, child in enumerate(children) if _is_norm(child)]
    after = [i for i in norms if i > place] or (norms if len(norms) == 1 else [])
    return _inside(base, [children[i] for i in after[:1]])


def _is_norm(module: nn.Module) -> bool:
    own = getattr(module, "original_module", module)  # of one that PEFT saves
    return "norm" in type(own).__name__.lower()


def _inside(base: nn.Module, modules: Sequence[nn.Module | None]) -> set[str]:
    """Plain names of the tensors in some modules of a model: not where else shared ones are."""
    paths = [
        plain_name(f"{path}.")
        for path, module in base.named_modules(remove_duplicate=False)
        if any(module is each for each in modules)
    ]
    return {name for name, _ in _named_parameters(base) if name.startswith(tuple(paths))}


def _named_parameters(base: nn.Module) -> list[tuple[str, nn.Parameter]]:
    found = base.named_parameters(remove_duplicate=False)
    return [(plain_name(name), parameter) for name, parameter in found]


def _explain_missing(part: str, base: nn.Module, blocks: Blocks, outside: list[str]) -> str:
    text = f"{type(base).__name__} has nothing that also={part!r} names"
    if part not in PARTS and not names_rows(part):
        text = f"also={part!r} matches no tensor outside the layers"
        inside = [n for n, _ in _named_parameters(base) if n.startswith(f"{blocks.path}.")]
        if any(matches(name, part) for name in inside):
            text += ", only in them: choose those with layers and modules"
        text += f" (expected {', '.join(map(repr, PARTS))}, or a glob of full names)"
    others = f" and {len(outside) - _SHOWN} others" * (len(outside) > _SHOWN)
    shown = ", ".join(outside[:_SHOWN]) or "no tensor"
    return f"{text}. Outside its layers it has {shown}{others}"
