"""Reinforcement learning on chosen transformer layers: select, train, save and merge them.

Names are loaded on first use, so that `import layerrl` costs nothing and `trl` is imported only
by who asks for a trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "ContributionReport",
    "LayerMaskedGRPOTrainer",
    "LayerMaskedMixin",
    "LayerRLError",
    "LayerSelection",
    "contribution_probe",
    "load_delta",
    "merge_delta",
    "published_contributions",
    "save_delta",
    "select_layers",
]

if TYPE_CHECKING:
    from layerrl.delta import load_delta, save_delta
    from layerrl.delta.merging import merge_delta
    from layerrl.errors import LayerRLError
    from layerrl.probe import contribution_probe
    from layerrl.report import ContributionReport
    from layerrl.scores.published import published_contributions
    from layerrl.selection import LayerSelection, select_layers
    from layerrl.trainer import LayerMaskedGRPOTrainer, LayerMaskedMixin
else:
    _MODULE = {
        "ContributionReport": "report",
        "LayerMaskedGRPOTrainer": "trainer",
        "LayerMaskedMixin": "trainer",
        "LayerRLError": "errors",
        "LayerSelection": "selection",
        "contribution_probe": "probe",
        "load_delta": "delta",
        "merge_delta": "delta.merging",
        "published_contributions": "scores.published",
        "save_delta": "delta",
        "select_layers": "selection",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULE:
            raise AttributeError(f"module 'layerrl' has no attribute {name!r}; it has {__all__}")
        value = getattr(import_module(f"layerrl.{_MODULE[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
