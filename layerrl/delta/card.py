"""The README of a folder with a delta in it: a model card that says how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from layerrl.files import written_whole
from layerrl.selection import LayerSelection

CARD = "README.md"
Beside = Literal["nothing", "same", "older"]
_BEGIN, _END = "<!-- layerrl: begin -->", "<!-- layerrl: end -->"
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
) -> None:
    """Write a folder's README, or put the delta's part into the one that is there.

    Args:
        folder: Where the delta lies.
        meta: The delta's description, as in `delta.json`.
        beside: A whole model in the same folder: none, the same state, or maybe an earlier one.
        hub_id: The repository that the folder is pushed to.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # huggingface_hub reads cards with it

    file, empty = folder / CARD, "---\n{}\n---\n"
    found = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else empty
    try:
        card = ModelCard(found, ignore_metadata_errors=True)
    except (ValueError, YAMLError):  # no YAML between the dashes: it is text
        card = ModelCard(empty + found)
    others = re.sub(f"{_BEGIN}.*?{_END}\n*", "", card.text, flags=re.DOTALL).strip()
    data: Any = card.data
    base = meta.get("base_model")
    if base and _HUB_ID.fullmatch(base) and not os.path.isdir(base):
        data.base_model = base
    if beside != "same":
        data.library_name = "layerrl"
    elif data.library_name == "layerrl":
        data.library_name = "transformers"
    data.tags = [*(tag for tag in data.tags or [] if tag != "layerrl"), "layerrl"]
    own = _text(meta, hub_id) + _WHOLE[beside] + "\n"
    if others and beside != "same":
        own += _OTHERS_TEXT
    card.text = "\n".join(["", _BEGIN, own.rstrip(), _END, *(["", others] if others else []), ""])
    with written_whole(file) as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def _text(meta: Mapping[str, Any], hub_id: str | None) -> str:
    selection = LayerSelection.from_json(json.dumps(meta["selection"]))
    base = meta.get("base_model") or "path/to/the/base"
    folder = '"path/to/this/folder"' if hub_id is None else f"snapshot_download({hub_id!r})"
    imports = "" if hub_id is None else "from huggingface_hub import snapshot_download\n"
    revision = f", at revision `{meta['base_revision']}`" if meta.get("base_revision") else ""
    return f"""# Delta: {selection}

`delta.safetensors` holds what training changed in `{base}`{revision}: the {len(meta["tensors"])}
tensors of {selection}, and nothing else. `delta.json` knows that base. Load it with layerrl:

```python
{imports}from layerrl import load_delta, merge_delta

folder = {folder}
load_delta(model, folder)  # into the base, a model in memory
merge_delta({json.dumps(base)}, folder, "merged")  # or a whole model in a new folder
```

"""
