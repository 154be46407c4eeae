"""TRL's trainers, and GiGPO's, with the mixin in front of them."""

from typing import TYPE_CHECKING

import trl
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from layerrl.agents.gigpo import GiGPOTrainer
from layerrl.trainer.mixin import LayerMaskedMixin


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


class LayerMaskedRLOOTrainer(LayerMaskedMixin, RLOOTrainer):
    """TRL's `RLOOTrainer`, training only the layers of a selection."""


class LayerMaskedDPOTrainer(LayerMaskedMixin, DPOTrainer):
    """TRL's `DPOTrainer`, training only the layers of a selection.

    Without a `ref_model`, the reference is the model that was passed: no second one is loaded.
    """


class LayerMaskedKTOTrainer(LayerMaskedMixin, KTOTrainer):
    """TRL's `KTOTrainer`, training only the layers of a selection.

    Without a `ref_model`, the reference is the model that was passed: no second one is loaded.
    """


class LayerMaskedSFTTrainer(LayerMaskedMixin, SFTTrainer):
    """TRL's `SFTTrainer`, training only the layers of a selection."""


class LayerMaskedRewardTrainer(LayerMaskedMixin, RewardTrainer):
    """TRL's `RewardTrainer`, training only the layers of a selection.

    The score head lies outside the layers and trains under `"full"` alone. Of a reward model made
    from a language model it is random: give a model whose head has been trained. A warning says so.
    """


if TYPE_CHECKING or hasattr(trl, "DistillationTrainer"):  # the oldest TRL has none

    class LayerMaskedDistillationTrainer(LayerMaskedMixin, trl.DistillationTrainer):
        """TRL's `DistillationTrainer`, training only the student's layers of a selection."""
