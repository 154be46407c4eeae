"""Data, rewards and a factory of trainers, checked: for the methods that make trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from layerrl.checks import check_kind, shown
from layerrl.errors import ProbeError
from layerrl.scores.checks import check_length, check_prompts, check_rewards, check_seeds, checked
from layerrl.scores.identity import (
    digest_of_rows,
    identity_of,
    identity_of_tokens,
    settings_of,
)
from layerrl.scores.method import Request
from layerrl.selection import LayerSelection


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Models, and trainers of them that differ in arguments and selection only."""

    models: list[nn.Module]
    """The base, and models that reward: a trainer puts hooks and casts on these, too."""
    make_trainer: Callable[..., Any]
    """Makes a masked trainer from `model`, `args` and `selection`."""
    seeds: list[int]
    """Of the runs; a method without runs takes the first."""
    settings: dict[str, Any]
    """What tells these runs from others. JSON values, for reports and journals."""

    @classmethod
    def of(cls, selection: LayerSelection, request: Request) -> Runs:
        """Check what every run needs; a `ProbeError` if an argument is not as it should be."""
        check_kind("model", request.model, nn.Module, "a loaded model", ProbeError)
        functions = check_rewards(request.reward_funcs)
        train_dataset = check_prompts("train_dataset", request.train_dataset)
        if request.processing_class is not None:
            kinds, expected = (PreTrainedTokenizerBase, ProcessorMixin), "a tokenizer or processor"
            check_kind("processing_class", request.processing_class, kinds, expected, ProbeError)
        check_length("args", request.args)
        seeds = check_seeds(request.seeds)
        return cls(
            seeds=seeds,
            models=[request.model, *(f for f in functions if isinstance(f, nn.Module))],
            make_trainer=partial(
                request.trainer_class,
                reward_funcs=[checked(function) for function in functions],
                train_dataset=train_dataset,
                processing_class=request.processing_class,
            ),
            settings={
                "args": settings_of(request.args),
                "modules": None if selection.modules is None else list(selection.modules),
                "train_dataset": digest_of_rows(train_dataset),
                "rewards": [identity_of(function) for function in functions],
                "processing_class": identity_of_tokens(request.processing_class),
                "trainer": identity_of(request.trainer_class),
            },
        )


def made(make_trainer: Callable[..., Any], **arguments: Any) -> Any:
    """A masked trainer; a `ProbeError` for any other, which would train everything unnoticed."""
    trainer = make_trainer(**arguments)
    if not hasattr(trainer, "masked_run"):
        raise ProbeError(
            f"trainer_class made {shown(trainer)}, expected a masked trainer, such as "
            "LayerMaskedGRPOTrainer"
        )
    return trainer


def only_training(args: Any) -> Any:
    """A copy of a trainer's arguments that saves, evaluates, pushes and shows nothing by itself."""
    args = copy.deepcopy(args)
    args.save_strategy = args.eval_strategy = "no"
    args.load_best_model_at_end = args.save_only_model = args.eval_on_start = False
    args.push_to_hub = args.ignore_data_skip = False
    args.save_total_limit = None
    args.disable_tqdm = True
    return args
