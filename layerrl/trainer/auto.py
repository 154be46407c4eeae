"""`selection="auto"`: layers that the trainer's own first batches speak for."""

from __future__ import annotations

import logging
import random
import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers.trainer_utils import get_last_checkpoint

from layerrl.errors import ProbeError, SelectionError
from layerrl.report import ContributionReport
from layerrl.trainer.evaluation import random_state_kept
from layerrl.trainer.probing import check_trainer, gradient_report
from layerrl.trainer.rollouts import Rollouts

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

logger = logging.getLogger(__name__)

NUM_PROMPTS = 64
"""Generation batches are taken until they have as many."""
_REPORT = "contributions.json"


class AutoSelection:
    """The choice of `selection="auto:K"`, made at train start.

    Args:
        num_chosen: How many layers to choose.
    """

    def __init__(self, num_chosen: int) -> None:
        self.num_chosen = num_chosen
        self.report: ContributionReport | None = None
        """What was chosen by; None before."""
        self._batches: list[_Batch] = []

    @classmethod
    def of(cls, selection: object) -> AutoSelection | None:
        """What a selection asks for, if it asks for this.

        Args:
            selection: As the trainer is given it.

        Returns:
            None for any other selection.

        Raises:
            SelectionError: If it does not say how many.
        """
        if not isinstance(selection, str) or selection.partition(":")[0] != "auto":
            return None
        found = re.fullmatch(r"auto(?::(\d+))?", selection)
        if found is None or found[1] == "0":
            raise SelectionError(
                f'{selection!r} does not say how many layers to choose: expected "auto" (one) or '
                '"auto:K", as "auto:3"'
            )
        return cls(int(found[1] or 1))

    def check(self, trainer: Any) -> None:  # noqa: ANN401
        """Refuse, when a trainer is made, what could not be chosen when it trains.

        Args:
            trainer: The trainer, masked to all of its layers.

        Raises:
            ProbeError: If it cannot be probed.
            SelectionError: If it has fewer layers.
        """
        check_trainer(trainer, 'selection="auto"')
        if self.num_chosen > trainer.selection.num_layers:
            raise SelectionError(
                f'"auto:{self.num_chosen}" asks for {self.num_chosen} layers, and the model has '
                f"{trainer.selection.num_layers}"
            )
        if trainer.optimizer is not None:
            raise SelectionError(
                f'selection="auto" decides at train start what the optimizer updates, and a '
                f"{type(trainer.optimizer).__name__} was passed in. Let the trainer make it from "
                "its args."
            )

    def choose(self, trainer: Any, resume_from_checkpoint: str | bool | None) -> LayerSelection:  # noqa: ANN401
        """Score the layers, or read in a checkpoint how they were scored.

        Args:
            trainer: The trainer, masked to all of its layers.
            resume_from_checkpoint: As `train` takes it.

        Returns:
            The best layers.

        Raises:
            ProbeError: If there is nothing to choose by.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(trainer.args.output_dir)
        report = self._read(Path(folder)) if folder else self._probed(trainer)
        with warnings.catch_warnings(record=True) as unresolved:
            warnings.simplefilter("always")
            selection = report.top(self.num_chosen)
        scores, chosen = report.scores, {*selection.layers}
        best, rest = (
            [scores[k] for k in scores if (k in chosen) is side] for side in (True, False)
        )
        margin = f"; the best other layer has {max(rest):.2f}" if rest else ""
        logger.warning(
            'selection="auto" trains %s, with %.2f times the average layer\'s score%s. %s',
            selection,
            min(best),
            margin,
            "; ".join(str(warning.message) for warning in unresolved)
            or "The choice is resolved on these prompts.",
        )
        self.report = report
        return selection

    def kept(self, trainer: Any, rows: list[Any]) -> dict[str, Any] | None:  # noqa: ANN401
        """The batch that the probe has made of these rows, with random state as it was then.

        Args:
            trainer: The trainer.
            rows: What the data loader gives.

        Returns:
            The batch, once; None where there is none.

        Raises:
            ProbeError: If the rows are others than the probe was given.
        """
        if not self._batches:
            return None
        batch = self._batches.pop(0)
        if [row["prompt"] for row in rows] != [row["prompt"] for row in batch.rows]:
            raise ProbeError(
                'selection="auto" has answered the prompts that the data loader gave first, and '
                "now it gives others: nothing would be generated once. Make the loader repeat its "
                "order, or probe with contribution_probe and pass the report's selection."
            )
        trainer.state.num_input_tokens_seen += batch.num_tokens  # the training began at 0
        for name, values in batch.metrics.items():
            trainer._metrics["train"][name] += values
        _set_random_state(batch.random_state)
        return batch.inputs

    def clear(self) -> None:
        """Forget batches that were not asked for."""
        self._batches = []

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what was chosen by.

        Args:
            folder: The checkpoint's.
        """
        if self.report is not None:
            (folder / _REPORT).write_text(self.report.to_json() + "\n")

    def _read(self, folder: Path) -> ContributionReport:
        try:
            return ContributionReport.from_json((folder / _REPORT).read_text())
        except OSError as error:
            raise ProbeError(
                f'the checkpoint {folder} has no {_REPORT}: it is of a run without selection="auto"'
                f" ({error}). Pass the selection that it was trained with."
            ) from error

    def _probed(self, trainer: Any) -> ContributionReport:  # noqa: ANN401
        started, args = time.perf_counter(), trainer.args
        per_batch = args.generation_batch_size // trainer.num_generations
        num_batches = -(-NUM_PROMPTS // per_batch)
        if args.max_steps > 0:  # no more than the run will take
            per_step = args.steps_per_generation * trainer.num_iterations
            num_batches = min(
                num_batches, -(-args.max_steps * args.gradient_accumulation_steps // per_step)
            )
        kept: list[_Batch] = []
        metrics: dict[str, list[float]] = trainer._metrics["train"]

        def keep(rows: list[Any], inputs: dict[str, Any]) -> None:
            before = sum(batch.num_tokens for batch in kept)
            num_tokens = trainer.state.num_input_tokens_seen - before
            kept.append(_Batch(rows, inputs, num_tokens, dict(metrics), _random_state()))
            metrics.clear()

        rollouts = Rollouts(trainer, num_batches * per_batch, keep)
        try:
            with random_state_kept():
                report = gradient_report(
                    rollouts, trainer.selection, args, {"seed": args.seed}, started
                )
        finally:
            metrics.clear()  # a training's are not the probe's
            for parameter in trainer.model.parameters():
                parameter.grad = None
        self._batches = kept
        return report


class _Batch(NamedTuple):
    """What one generation was given, made, counted and left behind."""

    rows: list[Any]
    inputs: dict[str, Any]
    num_tokens: float
    metrics: dict[str, list[float]]
    random_state: Any


def _random_state() -> Any:  # noqa: ANN401
    devices = torch.accelerator.is_available() and torch.get_device_module().get_rng_state_all()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _set_random_state(state: Any) -> None:  # noqa: ANN401
    python, array, cpu, devices = state
    random.setstate(python)
    np.random.set_state(array)
    torch.set_rng_state(cpu)
    if devices:
        torch.get_device_module().set_rng_state_all(devices)
