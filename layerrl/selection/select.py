"""`select_layers`: layers, as people name them, made a selection of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from layerrl.blocks import layers_described, meta_model, unwrap
from layerrl.checks import check_choice
from layerrl.errors import SelectionError
from layerrl.selection.layer_selection import LayerSelection
from layerrl.selection.parsing import counted, globs, parts, resolve
from layerrl.selection.rates import nameable_parts, read_boost
from layerrl.selection.rows import resolved
from layerrl.selection.tensors import described
from layerrl.selection.towers import STACKS, blocks_of

_INTEGERS = re.compile(r"\s*-?\d{1,18}\s*(?:,\s*-?\d{1,18}\s*)*")


# Over 60 lines: the docstring is the grammar of selections.
def select_layers(
    model: Any,  # a model or a config
    layers: int | Iterable[int] | slice | str | LayerSelection | None = None,
    *,
    modules: str | Iterable[str] | None = None,
    also: str | Iterable[str] | None = None,
    boost: Mapping[Any, float] | str | None = None,
    stack: str | None = None,
) -> LayerSelection:
    """Choose which decoder layers train, what else, and how fast.

    Mid-K of arXiv:2607.01232 is `"middle:K"`: of L layers, ⌊L/2 - K/2⌋ to ⌊L/2 + K/2⌋ - 1.
    Its Boost is `"full"` with `boost=`.

    Args:
        model: A transformers model (any device, `meta` included) or config. Not changed; no weight
            is read. With globs or `also` and a config, its names come from a model on `meta`.
        layers: A layer or several, negative ones counted from the end; a `range` or `slice`;
            `"all"` (every block), `"full"` (every parameter: embeddings, final norm and head too),
            `"middle"`, `"middle:K"`, `"first:K"`, `"last:K"`; `"LO%:HI%"`, the layers k with
            LO <= 100 k / L < HI, so that neighbouring ranges never share a layer; or a selection.
            None: no layer, only what `also` names.
        modules: Globs of tensors or modules inside the block: `"self_attn.*"`,
            `"mlp.down_proj.weight"`. Everything else in the block stays frozen.
        also: Parts outside the layers that train, too: `"head"` (a classifier's is one), the
            `"final_norm"`, the token `"embeddings"`, the `"projector"` of a vision-language model
            (all of them, where it has several), or globs of full names (`"model.norm.*"`).
            With the head alone all layers are frozen; above trained embeddings, a projector or a
            glob, nothing is taken for frozen, and the backward runs through every layer.
            `"new_tokens"`: the rows of the embedding, and of an untied head, that were added since
            the model was saved, and no other row; given a config, the trainer finds them, with its
            tokenizer's new tokens. Rows may be named, too: `"new_tokens:49152-49153,49160"`.
        boost: Learning-rate factors of chosen layers (`10`), of globs inside all of them
            (`"mlp.*"`), of pairs of both (`(10, "self_attn.*")`) and of parts of `also` (`"head"`;
            of `"full"`: `"head"`, `"final_norm"`, `"embeddings"`). Of the keys that name a tensor
            the most specific counts, alone: a pair before a glob or part, those before a layer.
            `"decay:D"` is layer-wise decay: D to the power of the distance in layers from the
            highest chosen one, embeddings that train lying one below layer 0; other parts have 1.
        stack: Whose layers are meant, and counted: `"text"`, the decoder's, or `"vision"`, those of
            a vision-language model's tower. None: those of the selection given as `layers`,
            otherwise `"text"`.

    Returns:
        The selection. Nothing outside the layers is in it, but for `also` and `"full"`.

    Raises:
        SelectionError: If a layer does not exist, is given twice or is no integer; if nothing is
            selected; if a glob matches nothing, or the model lacks a part, a row or new tokens; if
            what trains is shared with something frozen, as a tied head is with the embeddings; if a
            boost is not a positive finite number, names nothing that trains, or disagrees with
            another on a tensor, none of the two being more specific; if there is no such stack.
            Nothing is clipped or skipped.
        ModelError: If the model's layers cannot be found, or it has no vision tower.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=28)
        >>> select_layers(config, "middle:5").layers
        (11, 12, 13, 14, 15)
        >>> print(select_layers(config, [-1, 10], boost={10: 2.0}))
        layers 10, 27 of 28, learning rate scaled by {10: 2.0}
        >>> print(select_layers(config, "last:3", boost="decay:0.9"))
        layers 25-27 of 28, learning rate scaled by {25: 0.81, 26: 0.9}
    """
    stack = _stack(layers, stack)
    num_layers, text = _num_layers(model, stack)
    if isinstance(layers, LayerSelection):
        layers.check_num_layers(num_layers, text)
        chosen, full = layers.layers, layers.full
        modules = layers.modules if modules is None else modules
        also = layers.also if also is None else also
        scale, boosts = layers.learning_rate_scale, layers.boosts
    else:
        full = isinstance(layers, str) and layers == "full"
        also = parts(also, full=full)
        chosen = resolve(layers, num_layers, text, or_none=bool(also))
        scale, boosts = (), ()
    also = parts(also, full=full)
    if boost is not None:
        names = nameable_parts(also, full=full)
        scale, boosts = read_boost(boost, chosen, names, num_layers, text)
    selection = LayerSelection(
        num_layers=num_layers,
        layers=chosen,
        learning_rate_scale=scale,
        modules=globs(modules, full=full),
        full=full,
        also=also,
        boosts=boosts,
        stack=stack,
    )
    if isinstance(model, nn.Module):
        selection = resolved(selection, model)
        selection.parameters(model)
    elif modules is not None or also or boosts:
        selection.parameters(meta_model(model))
    return selection


def layers_in(text: str) -> LayerSelection | list[int] | str:
    """What `select_layers` takes, from a text: `"10,-1"`, one of its words, a selection's JSON."""
    if text.startswith("{"):
        return LayerSelection.from_json(text)
    if _INTEGERS.fullmatch(text):
        return [int(layer) for layer in text.split(",")]
    return text


def _stack(layers: object, stack: object) -> str:
    """Whose layers are meant: those of a selection that is given, unless others are named."""
    own = layers.stack if isinstance(layers, LayerSelection) else None
    given = own or "text" if stack is None else check_choice("stack", stack, STACKS, SelectionError)
    if own not in (None, given):
        raise SelectionError(
            f"stack is {stack!r}, but layers is {layers!s}: its numbers are those of the "
            f"{own} layers. Give numbers of the other stack."
        )
    return given


def _num_layers(model: Any, stack: str) -> tuple[int, str]:
    """How many layers a model or config has of a stack, and a clause that says so."""
    if not isinstance(model, nn.Module) and stack == "text":
        num_layers = layers_described(model)
        return num_layers, f"{type(model).__name__} has {counted(num_layers, stack)}"
    base = unwrap(model) if isinstance(model, nn.Module) else meta_model(model)
    blocks = blocks_of(base, stack)
    return len(blocks.modules), described(base, blocks, stack)
