"""Isolated runs on one model: train a layer, score it, put everything back."""

from __future__ import annotations

import copy
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from layerrl.blocks import unwrap
from layerrl.digests import json_digest
from layerrl.errors import ProbeError
from layerrl.frozen import fingerprints
from layerrl.scores.evaluation import (
    all_rewarded,
    prompt_scores,
    rewarded_differently,
    watched_rewards,
)
from layerrl.scores.restoring import as_found
from layerrl.scores.rollouts import in_its_precision
from layerrl.scores.runs import made, only_training
from layerrl.selection import select_layers

_PATIENCE = 8, 128
"""Generation batches and prompts without a difference between two rewards, before giving up."""


class Run(NamedTuple):
    """One training up to some step, or the evaluation of the base."""

    name: str
    """`"base"`, `"full"` or the layer's number."""
    seed: int | None = None
    """None for the base."""
    stop: int | None = None
    """Optimizer step to stop at, with a checkpoint to continue from; None: the end."""


class Harness:
    """One model and isolated runs on it, each from the same weights.

    The model is loaded once: after each run, what was trained gets its old values back, and the
    fingerprint of everything is compared with what it was. Can be pickled, for other processes.
    `models` are the base, and those that reward; in `folder`, runs that stopped on their way keep
    their checkpoints.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        make_trainer: Callable[..., Any],
        *,
        args: Any,
        full_args: Any,
        eval_dataset: Dataset,
        greedy: bool,
        modules: Sequence[str] | None,
        folder: str | os.PathLike[str],
    ) -> None:
        self._model, *self._reward_models = models
        self._make_trainer = make_trainer
        self._args, self._full_args = args, full_args
        self._greedy, self._modules = greedy, modules
        self._eval_dataset = eval_dataset.flatten_indices()  # or every evaluation would do it
        self._folder = Path(folder).absolute()
        self._base = _tensors(self._model)
        self._fingerprint = fingerprints(_tensors(self._model, copy_them=False))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the copy of the weights, which is made again, for any device."""
        state = self.__dict__ | {"_base": None}
        models = [self._model, *self._reward_models]
        moved = {id(model): model_on_cpu(model) for model in models}
        state["_model"], *state["_reward_models"] = [moved[id(model)] for model in models]
        make = self._make_trainer
        if isinstance(make, partial) and "reward_funcs" in make.keywords:  # the same models
            functions = make.keywords["reward_funcs"]
            rewards = [moved.get(id(function), function) for function in functions]
            keywords = {**make.keywords, "reward_funcs": rewards}
            state["_make_trainer"] = partial(make.func, *make.args, **keywords)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._base = _tensors(self._model)
        backends: Any = torch.backends
        for args in (self._args, self._full_args):
            args.__dict__.pop("_setup_devices", None)  # this process may see other devices
            _ = args.device  # looks now: it resets what an Accelerator made before would need
            if args.tf32 is not None:  # set when args are made, and not when they are unpickled
                backends.fp32_precision = "tf32" if args.tf32 else "ieee"

    @property
    def base(self) -> str:
        """What tells these weights from others."""
        return _digest(self._fingerprint)

    def measure(self, run: Run, since: int = 0) -> dict[str, Any]:
        """Train and score.

        Args:
            run: What to do.
            since: Step at which it stopped before. Its checkpoint is continued where it still
                exists; the result is the same.

        Returns:
            `scores` of each evaluation prompt; the `curve` of scores on the way, as pairs of step
            and scores; `steps` and `seconds` that it took, of which `harness_seconds` went
            neither into training nor evaluation. JSON values.
        """
        started = time.perf_counter()
        which = "full" if run.name in ("base", "full") else int(run.name)
        modules = None if which == "full" else self._modules
        selection = select_layers(self._model, which, modules=modules)
        curve: list[tuple[int, list[float]]] = []
        try:
            with as_found(self._model, *self._reward_models):
                args = self._args_of(run)
                set_seed(args.seed)
                trainer = made(
                    self._make_trainer, model=self._model, args=args, selection=selection
                )
                trainer.remove_callback(PrinterCallback)
                began = ended = time.perf_counter()
                try:
                    start = 0 if run.name == "base" else self._train(trainer, run, since, curve)
                    scores = self._scores(trainer)
                    ended = time.perf_counter()
                finally:
                    steps = trainer.state.global_step
                    trainer.accelerator.free_memory()
                    del trainer
                    gc.collect()
        finally:
            self._restore()
        seconds = time.perf_counter() - started
        return {
            "scores": scores,
            "curve": curve,
            "steps": steps - start,
            "seconds": seconds,
            "harness_seconds": seconds - (ended - began),
        }

    def discard(self, run: Run) -> None:
        """Delete the checkpoints of a run that is finished."""
        shutil.rmtree(self._run_folder(run), ignore_errors=True)

    def _run_folder(self, run: Run) -> Path:
        return self._folder / f"{run.name}-{run.seed}"

    def _args_of(self, run: Run) -> Any:
        args = only_training(self._full_args if run.name == "full" else self._args)
        args.output_dir = str(self._run_folder(run))
        if run.name == "base" and hasattr(args, "sync_ref_model"):
            args.beta, args.sync_ref_model = 0.0, False  # nothing is trained: no reference
        args.seed = args.seed if run.seed is None else run.seed
        return args

    def _train(
        self, trainer: Any, run: Run, since: int, curve: list[tuple[int, list[float]]]
    ) -> int:
        """Train up to the run's stop, and say from which step on."""
        asked = self._full_args if run.name == "full" else self._args
        every = asked.eval_steps if asked.eval_strategy == "steps" else None
        trainer.add_callback(_Along(run.stop, every, partial(self._scores, trainer), curve))
        shutil.rmtree(self._run_folder(run) / f"checkpoint-{run.stop}", ignore_errors=True)
        checkpoint = self._run_folder(run) / f"checkpoint-{since}"
        start = since if since and checkpoint.is_dir() else 0
        signal = _signal_expected(trainer) if run.name == "full" else nullcontext()
        with signal, all_rewarded(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if start else None)
        return start

    def _scores(self, trainer: Any) -> list[float]:
        with in_its_precision(trainer):  # the base has not trained
            return prompt_scores(trainer, self._eval_dataset, greedy=self._greedy)

    @torch.no_grad()
    def _restore(self) -> None:
        now = _tensors(self._model, copy_them=False)
        for name, tensor in now.items():
            base = self._base[name].to(tensor.device)  # one at a time: the copy stays on the CPU
            if not torch.equal(tensor, base):
                tensor.copy_(base)
        found = fingerprints(now)
        changed = sorted(
            n for n in {*found, *self._fingerprint} if found.get(n) != self._fingerprint.get(n)
        )
        if changed:
            raise ProbeError(
                f"after a run, {len(changed)} tensors of the model are not what they were, "
                f"{changed[0]!r} first. Runs after this one would start from another base."
            )


class _Along(TrainerCallback):
    """What happens between two steps: scores every few, without a trace in the training; a stop."""

    def __init__(
        self,
        stop: int | None,
        every: float | None,
        scores: Callable[[], list[float]],
        curve: list[tuple[int, list[float]]],
    ) -> None:
        self._stop, self._every, self._scores, self._curve = stop, every, scores, curve

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate where it is due, but not at the end, which is evaluated anyway."""
        step = state.global_step
        if step == self._stop:
            control.should_save = control.should_training_stop = True
            return
        every = self._every or state.max_steps
        if every < 1:  # a share of the run
            every = math.ceil(every * state.max_steps)
        if step % every == 0 and step < state.max_steps:
            self._curve.append((step, self._scores()))


@contextmanager
def _signal_expected(trainer: Any) -> Iterator[None]:
    """Give up on a training in which no two completions of a prompt are rewarded differently."""
    batches = prompts = 0
    differ = False

    def give_up(when: str) -> None:
        raise ProbeError(
            f"in {when}, all {trainer.num_generations} completions of every prompt got the same "
            "reward: group advantages are zero and nothing is trained. Try the reward function "
            f"({', '.join(trainer.reward_func_names)}) on a few completions, take prompts that the "
            "base sometimes gets right, or raise the temperature or num_generations."
        )

    def look(_: Any, rewards: list[float]) -> None:
        nonlocal batches, prompts, differ
        if differ or not trainer.model.training:
            return
        found = rewarded_differently(rewards, trainer.num_generations)
        differ, batches, prompts = any(found), batches + 1, prompts + len(found)
        if not differ and batches >= _PATIENCE[0] and prompts >= _PATIENCE[1]:
            give_up(f"the first {batches} generation batches ({prompts} prompts)")

    with watched_rewards(trainer, look):
        yield
    if not differ:
        give_up("the whole run")


def weights_digest(model: nn.Module) -> str:
    """What tells a model's weights from others, as `settings["base"]` of a report has it."""
    return _digest(fingerprints(_tensors(model, copy_them=False)))


def _digest(fingerprint: dict[str, str]) -> str:
    return json_digest(fingerprint, sort_keys=False)[:16]  # in the model's order, as stored ones


def _tensors(model: nn.Module, *, copy_them: bool = True) -> dict[str, torch.Tensor]:
    """All parameters and buffers; copies lie on the CPU, where a whole model has room."""
    base = unwrap(model)
    named = [*base.named_parameters(), *base.named_buffers()]
    return {name: t.detach().to("cpu", copy=True) if copy_them else t.detach() for name, t in named}


def model_on_cpu(model: nn.Module) -> nn.Module:
    """A model itself where it is on the CPU, otherwise a copy there, with none on its device."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return model
    # What is in the memo is not copied by deepcopy.
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().cpu(), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.detach().cpu()
        for tensor in tensors
    }
    return copy.deepcopy(model, memo)
