"""TRL's distillation trainer with the mixin in front of it. The oldest TRL has none."""

from importlib.metadata import version

from layerrl.errors import FrameworkError
from layerrl.trainer.mixin import LayerMaskedMixin

try:
    from trl import DistillationTrainer
except ImportError as error:
    raise FrameworkError(
        f"LayerMaskedDistillationTrainer needs trl's DistillationTrainer, which trl "
        f"{version('trl')} does not have. trl 1.10 does: pip install 'trl>=1.10'"
    ) from error


class LayerMaskedDistillationTrainer(LayerMaskedMixin, DistillationTrainer):
    """TRL's `DistillationTrainer`, training only the student's layers of a selection."""
