"""The README of a folder with a delta in it: a model card that says how to load it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from layerrl.delta.run_section import RunSummary
from layerrl.files import written_whole
from layerrl.selection import LayerSelection

CARD = "README.md"
Beside = Literal["nothing", "same", "older"]
_BEGIN, _END = "<!-- layerrl: begin -->", "<!-- layerrl: end -->"
_RUN_BEGIN, _RUN_END = "<!-- layerrl run: begin -->", "<!-- layerrl run: end -->"
_EMPTY = "---\n{}\n---\n"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WHOLE = {
    "nothing": (
        "This is no whole model: plain transformers, vLLM and other tools cannot load this folder. "
        'Give them the merged one, or train with `checkpoint_format="full"`.'
    ),
    "same": (
        "The whole model lies beside it, with the same layers in it: transformers, vLLM and other "
        "tools load this folder as any model's."
    ),
    "older": (
        "This is no whole model: plain transformers, vLLM and other tools cannot load it. Give "
        'them the merged one, or train with `checkpoint_format="full"`. Whole weights beside the '
        "delta (`model*.safetensors`), where there are any, are of an **earlier** state."
    ),
}
_OTHERS_TEXT = "\nWhat follows was written for a whole model: it works with the merged one.\n"


def write_card(
    folder: Path,
    meta: Mapping[str, Any],
    *,
    beside: Beside = "nothing",
    hub_id: str | None = None,
    run: RunSummary | None = None,
) -> None:
    """Write a folder's README, or put the delta's part into the one that is there.

    `meta` is the delta's description, as in `delta.json`; `beside` says what whole model is in the
    folder: none, one of the same state, or maybe of an earlier one; `hub_id` is the repository that
    it is pushed to. Without `run`, what the README says of the run stays.
    """
    file = folder / CARD
    found = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    text = card_of(found, meta, beside=beside, hub_id=hub_id, run=run)
    with written_whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def card_of(
    found: str,
    meta: Mapping[str, Any],
    *,
    beside: Beside = "nothing",
    hub_id: str | None = None,
    run: RunSummary | None = None,
) -> str:
    """Return a README with the delta's part in it, and metadata that the hub's pages understand.

    `found` is the README that is there, empty where none is; the rest is as in `write_card`.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # huggingface_hub reads cards with it

    found = found or _EMPTY
    try:
        card = ModelCard(found, ignore_metadata_errors=True)
    except (ValueError, YAMLError):  # no YAML between the dashes: it is text
        card = ModelCard(_EMPTY + found)
    others, section = _taken_out(card.text, _RUN_BEGIN, _RUN_END)
    others = _taken_out(others, _BEGIN, _END)[0].strip()
    if run is not None:
        section = "\n".join([_RUN_BEGIN, run.section(), _RUN_END])
    _set_metadata(card.data, meta, beside=beside, run=run)
    own = [_text(meta, hub_id) + _WHOLE[beside]]
    own += ["", section] if section else []
    own += [_OTHERS_TEXT.rstrip()] if others and beside != "same" else []
    parts = ["", _BEGIN, *own, _END, *(["", others] if others else [])]
    card.text = "\n".join([*parts, ""])
    return str(card)


def _taken_out(text: str, begin: str, end: str) -> tuple[str, str]:
    """A text without what stands between two marks, and that, with its marks."""
    found = re.search(f"{begin}.*?{end}", text, flags=re.DOTALL)
    return re.sub(f"{begin}.*?{end}\n*", "", text, flags=re.DOTALL), found[0] if found else ""


def _set_metadata(
    data: Any, meta: Mapping[str, Any], *, beside: Beside, run: RunSummary | None
) -> None:
    base = meta.get("base_model")
    # A folder named from where training ran looks like a repository from anywhere else: what has a
    # commit is known to be the hub's.
    if base and meta.get("base_revision") and _HUB_ID.fullmatch(base) and not os.path.isdir(base):
        data.base_model = base
        # Of the hub's four relations. Like an adapter, a delta is nothing without its base, which
        # is loaded first; a finetune is a model that pages offer to load alone.
        data.base_model_relation = "finetune" if beside == "same" else "adapter"
    if beside != "same":
        data.library_name = "layerrl"
    elif data.library_name == "layerrl":
        data.library_name = "transformers"
    tags = [*(data.tags or []), *(run.tags if run else ())]
    data.tags = [*(tag for i, tag in enumerate(tags) if tag != "layerrl" and tag not in tags[:i])]
    data.tags.append("layerrl")
    if run is not None and run.dataset and not data.datasets:
        data.datasets = [run.dataset]


def _text(meta: Mapping[str, Any], hub_id: str | None) -> str:
    selection = LayerSelection.from_json(json.dumps(meta["selection"]))
    base = json.dumps(meta.get("base_model") or "path/to/the/base")
    delta = json.dumps(hub_id or "path/to/this/folder")
    at = f", at revision `{meta['base_revision']}`" if meta.get("base_revision") else ""
    return f"""# Delta: {selection}

`delta.safetensors` holds what training changed in `{json.loads(base)}`{at}: the
{len(meta["tensors"])} tensors of {selection}, and nothing else{_share(meta)}. `delta.json` knows
that base. Load it with [layerrl](https://pypi.org/project/layerrl/):

```python
import layerrl, transformers

{_loading(meta, base)}
layerrl.load_delta(model, {delta})
```

Or write a whole model: `layerrl.merge_delta({base}, {delta}, "merged")`.
{_of_rows(meta, selection)}
"""


def _of_rows(meta: Mapping[str, Any], selection: LayerSelection) -> str:
    """Say which base new tokens need: usually one resized after it was published."""
    if not selection.token_rows:
        return ""
    return f"""
The base is the model with resized embeddings ({meta["base"]["vocabulary"]:,} rows) and the new
tokens' rows as they were before training: one without them, or with others, is refused.
"""


def _loading(meta: Mapping[str, Any], base: str) -> str:
    """The line that loads the base, as wide as the delta, so that nothing is rounded."""
    record = meta.get("base") or {}
    images = "vision_config" in (record.get("config") or {})
    options = [base]
    if meta.get("base_revision"):
        options.append(f'revision="{meta["base_revision"]}"')
    dtypes = {tensor.get("dtype") for tensor in meta["tensors"].values()}
    if len(dtypes) == 1 and None not in dtypes and not record.get("quantised"):
        options.append(f'dtype="{dtypes.pop()}"')
    kind = "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"
    return f"model = transformers.{kind}.from_pretrained({', '.join(options)})"


def _share(meta: Mapping[str, Any]) -> str:
    """How much of the model was trained, where its frozen tensors are recorded."""
    frozen = (meta.get("base") or {}).get("frozen")
    if not frozen:
        return ""
    trained, others = (
        sum(
            math.prod(tensor["shape"][1:]) * (tensor.get("rows") or math.prod(tensor["shape"][:1]))
            for tensor in tensors.values()
        )
        for tensors in (meta["tensors"], frozen)
    )
    return f" ({trained:,} of {trained + others:,} parameters, {trained / (trained + others):.1%})"
