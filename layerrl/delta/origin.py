"""Which commit of a hub repository a model in memory was loaded from, without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from layerrl.delta.checkpoint import Checkpoint, compared, described_model, stored_names
from layerrl.delta.settings import computing_settings, differing_settings
from layerrl.errors import DeltaError

if TYPE_CHECKING:
    from layerrl.delta.record import DeltaBase

_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(base: DeltaBase) -> str | None:
    """The commit in the hub's cache whose files a recorded model is.

    Transformers does not keep it. The cache may hold several commits, and get others at any time:
    where their weights or configs differ, the one that holds the recorded tensors is meant.

    Returns:
        The commit; None for a folder, a model that is not in the cache, and where several commits
        are there and none, or more than one, holds these tensors.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    assert base.name is not None
    try:
        validate_repo_id(base.name)
    except HFValidationError:  # a folder that is gone, say
        return None
    if Path(base.name).exists():
        return None
    repo = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=base.name, repo_type="model")
    commits = [
        folder
        for folder in sorted((repo / "snapshots").glob("*"))
        if _COMMIT.fullmatch(folder.name) and (folder / "config.json").is_file()
    ]
    with_weights = [folder for folder in commits if any(folder.glob("*.safetensors"))]
    alike: dict[frozenset[tuple[str, Path]], list[str]] = {}
    for folder in with_weights or commits:
        files = [*folder.glob("*.safetensors*"), folder / "config.json"]
        blobs = frozenset((file.name, file.resolve()) for file in files)
        alike.setdefault(blobs, []).append(folder.name)
    groups = [*alike.values()]
    if len(groups) > 1:
        groups = [group for group in groups if _holds(repo / "snapshots" / group[0], base)]
    if len(groups) != 1:
        return None
    main = repo / "refs" / "main"
    current = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    return current if current in groups[0] else groups[0][-1]


def _holds(folder: Path, base: DeltaBase) -> bool:
    try:
        checkpoint = Checkpoint(folder)
        model = described_model(folder)
        found = compared(checkpoint, base, stored_names(checkpoint, base, model), {})
    except DeltaError:
        return False
    other = {}
    if model is not None and base.config is not None:
        other = differing_settings(computing_settings(model.config), base.config)
    complete = {*base.fingerprints} == found.names
    return complete and not (found.shapes or found.values or other)
