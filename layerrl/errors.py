"""The errors layerrl raises. Each message says what was given, what was expected and what to do."""


class LayerRLError(Exception):
    """Root of every error that layerrl raises on purpose."""


class ModelError(LayerRLError, TypeError):
    """The model has no decoder layers that can be told apart from everything else in it."""


class SelectionError(LayerRLError, ValueError):
    """A selection that does not fit the model, or that says something impossible."""


class TrainerError(LayerRLError, TypeError):
    """A class that layers cannot be masked in, or that was given what no trainer of it takes."""


class LauncherError(LayerRLError, RuntimeError):
    """A launcher that cannot train chosen layers, or processes that do not want the same."""


class FrozenTensorError(LayerRLError, RuntimeError):
    """A tensor outside the selection changed, although nothing was allowed to train it."""


class DeltaError(LayerRLError, ValueError):
    """A delta that cannot be written, or that does not fit what it is applied to."""


class ReportError(LayerRLError, ValueError):
    """A report that does not hold what is asked of it, or that was never a report."""


class JournalError(LayerRLError, RuntimeError):
    """A journal of finished runs that cannot be read, written, or continued with these settings."""


class ProbeError(LayerRLError, ValueError):
    """A probe that was given something it cannot measure."""


class EpisodeError(LayerRLError, ValueError):
    """Episodes that cannot be played or learned from, or settings for them that make no sense."""


class FrameworkError(LayerRLError, ImportError):
    """A framework is not installed, too old, or has renamed or changed what layerrl needs of it."""
