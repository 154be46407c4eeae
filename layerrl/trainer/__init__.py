"""Layer-selective training in TRL's trainers: the only place that imports trl."""

from typing import TYPE_CHECKING

from layerrl.errors import FrameworkError
from layerrl.seams import imported, installed_version

with imported():
    from layerrl.agents.environments import TextEnvironment, TextRollout
    from layerrl.agents.episodes import Step
    from layerrl.agents.gigpo import GiGPOConfig, GiGPOTrainer
    from layerrl.trainer import ready
    from layerrl.trainer.mixin import LayerMaskedMixin
    from layerrl.trainer.ready import (
        LayerMaskedDPOTrainer,
        LayerMaskedGiGPOTrainer,
        LayerMaskedGRPOTrainer,
        LayerMaskedKTOTrainer,
        LayerMaskedRewardTrainer,
        LayerMaskedRLOOTrainer,
        LayerMaskedSFTTrainer,
    )
    from layerrl.trainer.schedule import LayerSchedule

if TYPE_CHECKING or hasattr(ready, "LayerMaskedDistillationTrainer"):
    from layerrl.trainer.ready import LayerMaskedDistillationTrainer
else:

    def __getattr__(name: str) -> object:
        if name != "LayerMaskedDistillationTrainer":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise FrameworkError(
            f"{name} needs trl's DistillationTrainer, which trl {installed_version('trl')} does "
            "not have. trl 1.10 does: pip install 'trl>=1.10'"
        )


__all__ = [
    "GiGPOConfig",
    "GiGPOTrainer",
    "LayerMaskedDPOTrainer",
    "LayerMaskedDistillationTrainer",
    "LayerMaskedGRPOTrainer",
    "LayerMaskedGiGPOTrainer",
    "LayerMaskedKTOTrainer",
    "LayerMaskedMixin",
    "LayerMaskedRLOOTrainer",
    "LayerMaskedRewardTrainer",
    "LayerMaskedSFTTrainer",
    "LayerSchedule",
    "Step",
    "TextEnvironment",
    "TextRollout",
]
