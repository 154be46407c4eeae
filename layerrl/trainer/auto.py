"""`selection="auto"`: choose layers at train start, by their scores on the first batches."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from layerrl.blocks import unwrap
from layerrl.checks import shown
from layerrl.errors import ProbeError, ReportError, SelectionError
from layerrl.randomness import random_state, set_random_state
from layerrl.report import ContributionReport, Cost
from layerrl.scores import step
from layerrl.scores.evaluation import random_state_kept
from layerrl.scores.gradient import (
    FIRST_ORDER,
    TooLittleSignalError,
    check_trainer,
    gradient_report,
)
from layerrl.scores.method import without_interval
from layerrl.scores.position import MIDDLE, position_scores
from layerrl.scores.rollouts import Rollouts
from layerrl.selection import LayerSelection
from layerrl.stored import bytes_of, refused_as
from layerrl.trainer.schedule import LayerSchedule
from layerrl.warning import warn

logger = logging.getLogger(__name__)

NUM_PROMPTS = 64
"""Generation batches are taken until they have as many."""
MOST_PROMPTS = 4 * NUM_PROMPTS
"""And while they say too little to choose by, until they have as many."""
GAINS = {gain.method: gain for gain in (FIRST_ORDER, step.GAIN)}
"""What the layers may be scored by."""
DEFAULT = FIRST_ORDER.method
REPORT = "contributions.json"


class AutoSelection:
    """The choice of `selection="auto:K:METHOD"`, made at train start."""

    def __init__(self, num_chosen: int, method: str = DEFAULT) -> None:
        self.num_chosen, self.method = num_chosen, method
        self._name = 'selection="auto"' if method == DEFAULT else f'selection="auto:{method}"'
        self.report: ContributionReport | None = None
        """What was chosen by; None before."""
        self._batches: list[_Batch] = []
        self._probing = False

    @classmethod
    def of(cls, selection: object) -> AutoSelection | None:
        """The choice that `selection` leaves to the trainer; None where it leaves none."""
        if not isinstance(selection, str) or selection.partition(":")[0] != "auto":
            return None
        found = re.fullmatch(rf"auto(?::(\d{{1,9}}))?(?::({'|'.join(GAINS)}))?", selection)
        if found is None or int(found[1] or 1) == 0:
            raise SelectionError(
                f"selection={shown(selection)} does not say how many layers to choose, or by what: "
                'expected "auto" (one) or "auto:K", as "auto:3", and last what they are scored by '
                f'if not by "{DEFAULT}": "auto:step", "auto:3:step"'
            )
        return cls(int(found[1] or 1), found[2] or DEFAULT)

    def __str__(self) -> str:
        return _spelled(self.num_chosen, self.method)

    def check_number(self, num_layers: int) -> None:
        """Refuse to choose more layers than the model has."""
        if self.num_chosen > num_layers:
            raise SelectionError(
                f'"{self}" asks for {self.num_chosen} layers, and the model has {num_layers}'
            )

    def check(self, trainer: Any, num_layers: int) -> None:
        """Refuse what could not be chosen, before anything is generated for it.

        Raises:
            ProbeError: If it cannot be probed.
            SelectionError: If it has fewer layers, or what depends on them is made already.
        """
        check_trainer(trainer, self._name)
        self.check_number(num_layers)
        if getattr(unwrap(trainer.model), "is_quantized", False):
            raise SelectionError(
                f"{self._name} needs gradients of every layer, and layers of this base are "
                "quantised. Probe the base in full precision with contribution_probe, and pass the "
                "report's selection."
            )
        if trainer.optimizer is not None:
            raise SelectionError(
                f"{self._name} decides at train start what the optimizer updates, and there is a "
                f"{type(trainer.optimizer).__name__} already. Let the training make it from the "
                "args."
            )
        if any(isinstance(c, LayerSchedule) for c in trainer.callback_handler.callbacks):
            raise SelectionError(
                f"{self._name} chooses the layers, and so does a LayerSchedule: take one of them"
            )

    def choose(
        self,
        trainer: Any,
        folder: Path | None,
    ) -> tuple[LayerSelection, ContributionReport]:
        """Score the layers, or read in a checkpoint how they were scored.

        Returns:
            The best layers, and what they were chosen by.

        Raises:
            ProbeError: If the trainer cannot be probed, or the checkpoint has no report.
            SelectionError: If the checkpoint's run chose another number of layers.
        """
        self.check(trainer, trainer.selection.num_layers)
        report = self._probed(trainer) if folder is None else self._read(folder)
        with warnings.catch_warnings(record=True) as unresolved:
            warnings.simplefilter("always")
            selection = report.top(self.num_chosen)
        known = report.settings.setdefault("chosen", [*selection.layers])
        if known != [*selection.layers]:
            raise SelectionError(
                f'"{self}" and the checkpoint {folder}, whose run trained the layers {known}: '
                f'resume with selection="{_spelled(len(known), report.method)}"'
            )
        if report.method == "position":
            logger.warning("%s trains %s, nearest to the middle", self._name, selection)
            return selection, report
        of_run = f', which its run chose by "{report.method}"'
        scores, chosen = report.scores, {*selection.layers}
        best, rest = (
            [scores[k] for k in scores if (k in chosen) is side] for side in (True, False)
        )
        margin = f"; the best other layer has {max(rest):.2f}" if rest else ""
        logger.warning(
            "%s trains %s%s, with %.2f times the average layer's score%s. %s",
            self._name,
            selection,
            "" if report.method == self.method else of_run,
            min(best),
            margin,
            "; ".join(str(warning.message) for warning in unresolved)
            or "The choice is resolved on these prompts; another seed draws others.",
        )
        return selection, report

    def batch(
        self,
        trainer: Any,
        rows: list[Any],
        answer: Callable[[list[Any]], dict[str, Any]],
    ) -> dict[str, Any]:
        """Answers to prompts: the probe's, where it was given the same ones first.

        Returns:
            What the trainer's loss takes.

        Raises:
            ProbeError: If the rows are others than the probe was given.
        """
        if self._probing:
            return self._recorded(trainer, rows, answer)
        if not self._batches or not trainer.model.training:
            return answer(rows)
        batch = self._batches.pop(0)
        if [row.get("prompt") for row in rows] != [row.get("prompt") for row in batch.rows]:
            raise ProbeError(
                f"{self._name} has answered the prompts that the data loader gave first, and now "
                "it gives others: nothing would be generated once. Make the loader repeat its "
                "order, or probe with contribution_probe and pass the report's selection."
            )
        trainer.state.num_input_tokens_seen += batch.num_tokens  # the training began at 0
        metrics = trainer._metrics["train"]
        for name, values in batch.metrics.items():
            metrics[name] += values
        metrics["num_tokens"] = [trainer.state.num_input_tokens_seen]
        for (name, *inside), values in batch.tables.items():
            held = trainer._logs[name]
            (held[inside[0]] if inside else held).extend(values)
        set_random_state(batch.random_state)
        return batch.inputs

    def _recorded(
        self,
        trainer: Any,
        rows: list[Any],
        answer: Callable[[list[Any]], dict[str, Any]],
    ) -> dict[str, Any]:
        metrics, before = trainer._metrics["train"], trainer.state.num_input_tokens_seen
        metrics.clear()  # of the probe's passes over the batch before
        _clear_tables(trainer)
        inputs = answer(rows)
        counted = trainer.state.num_input_tokens_seen - before
        state = random_state(trainer.accelerator.device)
        tables = {name: [*values] for name, values in _tables(trainer).items()}
        self._batches.append(_Batch(rows, dict(inputs), counted, dict(metrics), tables, state))
        return inputs

    def clear(self) -> None:
        """Forget batches that were not asked for."""
        self._batches = []

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what was chosen by."""
        if self.report is not None:
            (folder / REPORT).write_text(self.report.to_json() + "\n", encoding="utf-8")

    def _read(self, folder: Path) -> ContributionReport:
        said = f"the checkpoint {folder} has no readable {REPORT}"
        advice = (
            'A run without selection="auto" writes none: pass the selection that it was trained '
            "with."
        )
        with refused_as(ProbeError, said, advice):
            text = bytes_of(folder / REPORT)
        try:
            return ContributionReport.from_json(text)
        except ReportError as error:
            raise ReportError(f"{folder / REPORT}: {error}") from error

    def _probed(self, trainer: Any) -> ContributionReport:
        adapts = getattr(trainer, "use_adaptive_entropy", False)
        self.clear()
        self._probing = True
        try:
            trainer.use_adaptive_entropy = False  # its coefficient follows the training's passes
            with random_state_kept():
                return self._scored(trainer)
        except BaseException:
            self.clear()
            raise
        finally:
            self._probing = False
            trainer.use_adaptive_entropy = adapts
            trainer._metrics["train"].clear()  # a training's are not the probe's
            _clear_tables(trainer)
            for parameter in trainer.model.parameters():
                parameter.grad = None

    def _scored(self, trainer: Any) -> ContributionReport:
        """The report of as many prompts as it takes, or of none of them."""
        started, args = time.perf_counter(), trainer.args
        per_batch = args.generation_batch_size // trainer.num_generations
        num_prompts, most = (-(-n // per_batch) * per_batch for n in (NUM_PROMPTS, MOST_PROMPTS))
        if args.max_steps > 0:  # no more than the run will take
            per_step = args.steps_per_generation * trainer.num_iterations
            used = -(-args.max_steps * args.gradient_accumulation_steps // per_step)
            num_prompts, most = (min(n, used * per_batch) for n in (num_prompts, most))
        rollouts = Rollouts(trainer, num_prompts, old=True, twice=False)
        settings = {"seed": args.seed}
        gain, why = GAINS[self.method], "too few prompts said more"
        while True:
            try:
                return gradient_report(rollouts, trainer.selection, args, settings, started, gain)
            except ProbeError as problem:
                undecided = isinstance(problem, TooLittleSignalError)
                # Of the default, no number of prompts would help: what it finds is the training's.
                if not undecided and self.method == DEFAULT:
                    raise
                exhausted = len(rollouts.with_signal) < rollouts.num_prompts
                if not undecided or exhausted or rollouts.num_prompts >= most:
                    warn(f"{self._name} takes the middle of the model. {problem}")
                    why = why if undecided else f'"{self.method}" could not score the layers'
                    break
                rollouts.num_prompts = min(2 * rollouts.num_prompts, most)
        settings |= {"centre": MIDDLE, "budget": len(rollouts.with_signal)}
        settings["prompts_with_signal"] = sum(rollouts.with_signal)
        scores = position_scores(trainer.selection.num_layers, MIDDLE)
        return ContributionReport(
            method="position",
            layers=without_interval(trainer.selection, scores),
            settings=settings,
            source=f"Minus the distance in relative depth: {why}.",
            cost=Cost(
                seconds=time.perf_counter() - started,
                tokens=rollouts.num_tokens,
                forwards=None,
                backwards=None,
                fraction=None,
            ),
        )


class _Batch(NamedTuple):
    """What one generation was given, made, counted and left behind."""

    rows: list[Any]
    inputs: dict[str, Any]
    num_tokens: float
    metrics: dict[str, list[float]]
    tables: dict[tuple[str, ...], list[Any]]
    random_state: Any


def _spelled(num_chosen: int, method: str) -> str:
    """How a choice is asked for; what took the middle for want of signal names no method."""
    return f"auto:{num_chosen}" + (f":{method}" if method in {*GAINS} - {DEFAULT} else "")


def _tables(trainer: Any) -> dict[tuple[str, ...], Any]:
    """The columns of the last batch that TRL shows with `log_completions`, some in groups."""
    found: dict[tuple[str, ...], Any] = {}
    for name, held in trainer._logs.items():
        if not isinstance(held, dict):
            found[(name,)] = held
        else:
            found |= {(name, column): values for column, values in held.items()}
    return found


def _clear_tables(trainer: Any) -> None:
    for held in trainer._logs.values():
        held.clear()
