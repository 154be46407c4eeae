"""The tensors of a model that a selection means, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from layerrl.adapters import adapter_tensors
from layerrl.blocks import Blocks, plain_name
from layerrl.errors import SelectionError
from layerrl.quantisation import is_quantised
from layerrl.selection.parsing import counted, matches, ranges
from layerrl.selection.parts import names_in_parts
from layerrl.selection.rates import learning_rate_factors

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection


def trained_tensors(selection: LayerSelection, base: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors behind `LayerSelection.parameters`, which documents them."""
    blocks = selection.blocks(base)
    selection.check_num_layers(len(blocks.modules), described(base, blocks, selection.stack))
    trained = {plain_name(name): parameter for name, parameter in base.named_parameters()}
    if not selection.full:
        adapted = adapter_tensors(base)
        outside = names_in_parts(selection, base, blocks, adapted).values()
        names = names_in_layers(selection, base, blocks, adapted).union(*outside)
        chosen = {
            id(parameter)
            for name, parameter in base.named_parameters(remove_duplicate=False)
            if plain_name(name) in names
        }
        check_not_shared(selection, base, names, chosen)
        trained = {name: p for name, p in trained.items() if id(p) in chosen}
    packed = [f"{name} ({p.dtype})" for name, p in trained.items() if is_quantised(p)]
    if packed:
        raise SelectionError(
            f"{len(packed)} selected tensors are quantised and cannot be trained, the first is "
            f"{packed[0]}. Leave the selected layers out of the quantisation: "
            "quantization_skip_modules of a selection names them."
        )
    if selection.boosts or selection.is_boosted:
        learning_rate_factors(selection, base, trained)
    return trained


def names_in_layers(
    selection: LayerSelection, base: nn.Module, blocks: Blocks, adapted: Mapping[str, str]
) -> set[str]:
    """Return the names of the tensors that a selection trains inside the layers.

    Where there are adapters, they train, and globs mean what they adapt.

    Raises:
        SelectionError: If a glob matches nothing, or nothing of some layer.
    """
    chosen: set[str] = set()
    matched: set[str] = set()
    without: list[int] = []
    for layer in selection.layers:
        before, path = len(chosen), f"{blocks.path}.{layer}."
        for name, _ in blocks.named_parameters(layer):
            if adapted and path + name not in adapted:
                continue
            known_as = {name, adapted.get(path + name, name).removeprefix(path)}
            globs = selection.modules or ("*",)
            hits = {glob for glob in globs if any(matches(n, glob) for n in known_as)}
            matched |= hits
            if hits:
                chosen.add(path + name)
        if len(chosen) == before:
            without.append(layer)
    if adapted and selection.layers and without == [*selection.layers]:
        raise SelectionError(
            "where a model has adapters, they train in place of its own tensors, and none that is "
            f"active in layers {without} is selected: {len(adapted)} tensors elsewhere, such as "
            f"{next(iter(adapted))!r}. Select layers and modules that have some."
        )
    for glob in selection.modules or ():
        if glob not in matched:
            raise SelectionError(_explain_unmatched(selection, glob, base, blocks))
    if without:
        modules = list(selection.modules or "*")
        raise SelectionError(
            f"layers {without} hold no {'adapter' if adapted else 'tensor'} that {modules=} match: "
            f"they would not train. Layer {without[0]} holds {_inner_names(blocks, without[0])}"
        )
    return chosen


def _explain_unmatched(
    selection: LayerSelection, glob: str, base: nn.Module, blocks: Blocks
) -> str:
    names = [plain_name(name) for name, _ in base.named_parameters()]
    inside = blocks.path + "."
    outside = [n for n in names if not n.startswith(inside) and matches(n, glob)]
    text = f"modules glob {glob!r} matches no tensor inside layers {ranges(selection.layers)}"
    if outside:
        text += f"; outside the blocks it matches {outside[0]!r}, which also={outside[0]!r} trains"
    elif glob.startswith(inside) or any(matches(n, glob) for n in names):
        text += "; globs are relative to the block, leave out the path to it"
    elif "expert" in glob:
        has = "experts" in _inner_names(blocks, selection.first)
        text += (
            "; all experts of a layer are in one tensor" if has else "; its layers have no experts"
        )
    return f"{text}. Layer {selection.first} holds {_inner_names(blocks, selection.first)}"


def check_not_shared(
    selection: LayerSelection, base: nn.Module, names: set[str], chosen: set[int]
) -> None:
    """Refuse, by a `SelectionError`, to train a tensor that is also something frozen."""
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in chosen and plain_name(name) not in names:
            raise SelectionError(
                f"a tensor of {selection} is shared with {plain_name(name)!r}, which is frozen: "
                "training one trains the other. Select both"
                + (' (also=("embeddings", "head")).' if selection.also else ', or "full".')
            )


def _inner_names(blocks: Blocks, layer: int) -> str:
    return ", ".join(name for name, _ in blocks.named_parameters(layer))


def described(base: nn.Module, blocks: Blocks, stack: str) -> str:
    """How many layers a model has of a stack, and where."""
    return f"{type(base).__name__} has {counted(len(blocks.modules), stack)} under {blocks.path!r}"
