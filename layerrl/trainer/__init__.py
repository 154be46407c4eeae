"""Layer-selective training in TRL's trainers: the only place that imports trl."""

from typing import TYPE_CHECKING

from layerrl.errors import FrameworkError
from layerrl.seams import imported, installed_version

with imported():
    from trl import GRPOTrainer

    from layerrl.trainer import ready
    from layerrl.trainer.environments import TextEnvironment, TextRollout
    from layerrl.trainer.episodes import Step
    from layerrl.trainer.gigpo import GiGPOConfig, GiGPOTrainer
    from layerrl.trainer.mixin import LayerMaskedMixin
    from layerrl.trainer.ready import (
        LayerMaskedDPOTrainer,
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


class LayerMaskedGRPOTrainer(LayerMaskedMixin, GRPOTrainer):
    """TRL's `GRPOTrainer`, training only the layers of a selection.

    Takes what `GRPOTrainer` takes and the keywords of `LayerMaskedMixin`, `selection` above all.

    Example:
        ```python
        trainer = LayerMaskedGRPOTrainer(
            model, reward, args=GRPOConfig(...), train_dataset=data, selection=10
        )
        trainer.train()
        trainer.save_delta("out/layer-10")
        ```
    """


class LayerMaskedGiGPOTrainer(LayerMaskedMixin, GiGPOTrainer):
    """`GiGPOTrainer`, training only the layers of a selection.

    Example:
        ```python
        trainer = LayerMaskedGiGPOTrainer(
            model,
            args=GiGPOConfig(...),
            train_dataset=tasks,
            rollout_func=TextRollout(environment=FrozenLake, max_turns=10),
            selection=10,
        )
        ```
    """


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
