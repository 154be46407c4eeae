"""The exact measurement: one isolated run per layer from the same base, journalled."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from layerrl.blocks import find_blocks, unwrap
from layerrl.errors import ProbeError
from layerrl.journal import Journal
from layerrl.masking import fingerprints
from layerrl.report import ContributionReport, Score
from layerrl.selection import select_layers
from layerrl.trainer.evaluation import prompt_scores

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from datasets import Dataset

# What says where and how loudly a run happens, not what it computes.
_NOT_SETTINGS = (
    *("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "seed", "data_seed"),
    *("logging_steps", "logging_strategy", "save_strategy", "save_steps", "save_total_limit"),
    *("push_to_hub", "hub_model_id", "hub_token", "eval_strategy", "eval_steps"),
)


class Run(NamedTuple):
    """One training, or the evaluation of the base."""

    name: str
    """`"base"`, `"full"` or the layer's number."""
    seed: int | None
    """None for the base."""


class Sweep:
    """Runs over the layers of one model, one after the other.

    The model is loaded once: after each run, what was trained gets its old values back, and the
    fingerprint of everything is compared with what it was.

    Args:
        model: The base. Returned as it was, with every `requires_grad` and mode.
        make_trainer: Makes a trainer for `(args, selection)` on the model.
        args: Arguments of the single layers' runs.
        full_args: Those of the full-parameter run.
        eval_dataset: Prompts that are not trained on.
        greedy: Evaluate greedily.
        modules: Globs inside the block; None: whole layers.
        output_dir: Folder of the journal.
        settings: What else the runs have in common, for the journal.
    """

    def __init__(
        self,
        model: nn.Module,
        make_trainer: Callable[..., Any],
        *,
        args: Any,  # noqa: ANN401
        full_args: Any,  # noqa: ANN401
        eval_dataset: Dataset,
        greedy: bool,
        modules: Sequence[str] | None,
        output_dir: str | os.PathLike[str],
        settings: dict[str, Any],
    ) -> None:
        self._model, self._make_trainer = model, make_trainer
        self._args, self._full_args = args, full_args
        self._eval_dataset, self._greedy, self._modules = eval_dataset, greedy, modules
        self._folder = Path(output_dir)
        self._base = _tensors(model)
        self._fingerprint = fingerprints(self._base)
        self.settings = {
            "base": hashlib.sha256(json.dumps(self._fingerprint).encode()).hexdigest()[:16],
            "args": _settings(args),
            "full_args": _settings(full_args),
            "modules": None if modules is None else list(modules),
            "greedy": greedy,
            "eval_dataset": digest(eval_dataset),
            **settings,
        }

    def run(self, layers: Iterable[int], seeds: Sequence[int]) -> ContributionReport:
        """Do what the journal does not hold yet, and report.

        Args:
            layers: Layers to train, each alone.
            seeds: Seeds of each.

        Returns:
            The report.
        """
        todo = [Run("base", None)] + [
            Run(name, seed) for seed in seeds for name in ("full", *map(str, layers))
        ]
        with Journal(self._folder, self.settings) as journal:
            done = {(entry["name"], entry["seed"]) for entry in journal.entries}
            missing = [run for run in todo if run not in done]
            for run in tqdm(missing, desc="contribution", unit="run", disable=not missing):
                journal.append({"name": run.name, "seed": run.seed, **self._measure(run)})
            return self.report(journal.entries, seeds)

    def report(self, entries: list[dict[str, Any]], seeds: Sequence[int]) -> ContributionReport:
        """The report of what a journal holds.

        Args:
            entries: The journal's.
            seeds: Seeds to report on.

        Returns:
            The report; what is missing in it is `"missing"`.
        """

        def score(name: str) -> Score:
            wanted = [(name, seed) for seed in (None, *seeds)]
            of_run = [e for key in wanted for e in entries if (e["name"], e["seed"]) == key]
            if not of_run:
                return Score(status="missing")
            return Score(
                scores=tuple(tuple(e["scores"]) for e in of_run),
                seconds=sum(e["seconds"] for e in of_run),
                steps=sum(e["steps"] for e in of_run),
            )

        num_layers = len(find_blocks(self._model).modules)
        return ContributionReport(
            method="train",
            layers=tuple(score(str(layer)) for layer in range(num_layers)),
            base=score("base"),
            full=score("full"),
            settings={**self.settings, "seeds": list(seeds)},
        )

    def _measure(self, run: Run) -> dict[str, Any]:
        started = time.perf_counter()
        which = "full" if run.name in ("base", "full") else int(run.name)
        modules = None if which == "full" else self._modules
        selection = select_layers(self._model, which, modules=modules)
        args = copy.deepcopy(self._full_args if run.name == "full" else self._args)
        eval_steps = args.eval_steps if args.eval_strategy == "steps" else None
        args.output_dir = str(self._folder / "runs" / f"{run.name}-{run.seed}")
        args.save_strategy = args.eval_strategy = "no"
        args.seed = args.seed if run.seed is None else run.seed
        with _as_found(self._model):
            set_seed(args.seed)
            trainer = self._make_trainer(args, selection)
            curve: list[tuple[int, float]] = []
            try:
                if run.name != "base":
                    if eval_steps:
                        trainer.add_callback(_Curve(self._scores, trainer, int(eval_steps), curve))
                    trainer.train()
                scores = self._scores(trainer)
            finally:
                trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
                steps = trainer.state.global_step
                trainer.accelerator.free_memory()
                del trainer
                gc.collect()
                self._restore()
        return {
            "scores": list(scores),
            "steps": steps,
            "seconds": time.perf_counter() - started,
            "curve": curve,
        }

    def _scores(self, trainer: Any) -> tuple[float, ...]:  # noqa: ANN401
        return prompt_scores(trainer, self._eval_dataset, greedy=self._greedy)

    @torch.no_grad()
    def _restore(self) -> None:
        now = _tensors(self._model, copy_them=False)
        for name, tensor in now.items():
            if not torch.equal(tensor, self._base[name]):
                tensor.copy_(self._base[name])
        found = fingerprints(now)
        changed = sorted(
            n for n in {*found, *self._fingerprint} if found.get(n) != self._fingerprint.get(n)
        )
        if changed:
            raise ProbeError(
                f"after a run, {len(changed)} tensors of the model are not what they were, "
                f"{changed[0]!r} first. Runs after this one would start from another base."
            )


class _Curve(TrainerCallback):
    """Scores every few steps, without a trace in the training."""

    def __init__(
        self,
        scores: Callable[[Any], tuple[float, ...]],
        trainer: Any,  # noqa: ANN401
        every: int,
        curve: list[tuple[int, float]],
    ) -> None:
        self._scores, self._trainer, self._every, self._curve = scores, trainer, every, curve

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Evaluate where it is due, but not at the end, which is evaluated anyway."""
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            scores = self._scores(self._trainer)
            self._curve.append((state.global_step, sum(scores) / len(scores)))


def _tensors(model: nn.Module, *, copy_them: bool = True) -> dict[str, torch.Tensor]:
    base = unwrap(model)
    named = [*base.named_parameters(), *base.named_buffers()]
    return {name: t.detach().clone() if copy_them else t.detach() for name, t in named}


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Give a model's flags and modes back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def _settings(args: Any) -> dict[str, Any]:  # noqa: ANN401
    shown = args.to_dict()
    return {name: value for name, value in shown.items() if name not in _NOT_SETTINGS}


def digest(dataset: Dataset) -> str:
    """What tells a data set from another: its number of rows and a hash of them."""
    rows = hashlib.sha256()
    for row in dataset:
        rows.update(json.dumps(row, sort_keys=True, default=str).encode())
    return f"{len(dataset)} rows {rows.hexdigest()[:16]}"
