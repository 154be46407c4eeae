"""What a trainer knows of its run that a model card should say."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
import trl

from layerrl.delta.run_section import RunSummary
from layerrl.seams import installed_version

_ON_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+|[\w.-]+)@")


def summary_of(trainer: Any) -> RunSummary:
    """The method, data set (of `load_dataset("user/name")`), versions and log of a run."""
    return RunSummary(
        trainer=getattr(trainer, "_name", None),
        tags=tuple(getattr(trainer, "_tag_names", ())),
        dataset=dataset_of(getattr(trainer, "train_dataset", None)),
        steps=trainer.state.global_step,
        versions={
            "layerrl": installed_version("layerrl") or "of unknown version",
            "TRL": trl.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        history=trainer.state.log_history,
    )


def dataset_of(dataset: Any) -> str | None:
    """The hub's name of a data set whose files were downloaded; None of none or several."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    names = {match[1] for file in files if (match := _ON_HUB.match(str(file)))}
    return names.pop() if len(names) == 1 else None
