"""The one door to every way of scoring layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from layerrl.checks import check_kind, shown
from layerrl.errors import ProbeError
from layerrl.report import ContributionReport
from layerrl.scores.identity import known_afterwards
from layerrl.scores.method import Method, Request
from layerrl.selection import select_layers
from layerrl.selection.masked import check_can_change, check_gradients_on
from layerrl.trainer import LayerMaskedGRPOTrainer, LayerMaskedMixin
from layerrl.trainer.arguments import check_args, names, refuse_removed

METHODS = {
    "train": "layerrl.sweep.exact",
    "gradient": "layerrl.scores.gradient",
    "step": "layerrl.scores.step",
    "race": "layerrl.sweep.race",
    "position": "layerrl.scores.position",
    "published": "layerrl.scores.published",
}
"""Methods, and the module whose `METHOD` each is. A new one is a file and a line here."""


# Over 60 lines: it is the one door, whose arguments and their documentation are all that is long.
def contribution_probe(
    model: nn.Module,
    *,
    method: str = "gradient",
    reward_funcs: Any = None,  # what the trainer takes
    train_dataset: Dataset | None = None,
    processing_class: Any = None,
    args: Any = None,
    layers: int | Iterable[int] | slice | str = "all",
    modules: Sequence[str] | None = None,
    budget: int = 256,
    seeds: Sequence[int] = (0,),
    trainer_class: type = LayerMaskedGRPOTrainer,
    # Of methods that train, "train" and "race":
    eval_dataset: Dataset | None = None,
    full_args: Any = None,
    greedy: bool = True,
    halving: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    executor: str = "serial",
    resources: Mapping[str, float] | None = None,
) -> ContributionReport:
    """Score each layer: by its contribution, measured exactly, or by something cheaper.

    | method | what it does | what it needs |
    |---|---|---|
    | `"train"` | measures C(k), each layer's share of the full-parameter gain | everything |
    | `"gradient"` | what a step in the layer alone would gain on other prompts | rollouts |
    | `"step"` | the same, measured after a step, layer by layer | rollouts |
    | `"race"` | half a run of the three layers that `"gradient"` ranks first | everything |
    | `"published"` | C(k) of the paper's Qwen3-1.7B at the same relative depth | nothing |
    | `"position"` | how near the layer is to the middle | nothing |

    `"train"`: one isolated run per layer and seed from the same base, on the same data in the same
    order, one full-parameter run per seed, and one evaluation of the base (arXiv:2607.01232, eq.
    4). Finished runs are kept in `output_dir`: the same call continues after a kill, more layers or
    seeds add to what is there, and the report has all of it. `report.json` in it is up to date
    after each run, for `ContributionReport.from_json`.

    `"gradient"`: the base answers `budget` prompts, as at the beginning of a training, and each
    prompt's gradient is compared with the optimizer's step from the prompts before it. One backward
    pass serves all layers. `"step"` takes a step of three learning rates in each layer, from half
    of the prompts, and measures on the other half by how much the trainer's loss falls, taken as
    linear in log-probabilities; then the halves change places. That is a forward pass for each
    layer, from this layer on, and ranks layers better. `"published:NAME"` takes another of the
    paper's models, and `"position:0.37"` another centre than the middle. A method takes no notice
    of what it does not need.

    `"race"`, or `"race:5"` for five candidates: `"gradient"` on all layers, then the runs of
    `"train"` for its best, stopped after half of `args.max_steps`. Scores are those of then; the
    other layers are `"dropped"`. Both stages are kept in `output_dir`, where `"train"` goes on.

    Scores of `"gradient"` and `"step"` change with the seed, which draws prompts and completions;
    their intervals are over the prompts of one seed. (As prompts of `"step"` depend on each other,
    its report has their scores 1.5 times as far from the layer's mean as measured.) On sixteen
    small suites `"gradient"` found the layer that gains most in 50 of 80 probes and loses 0.26 of
    that gain on average; `"step"` found it in 61 of 80 and loses 0.03, as another exact sweep does;
    on the nine that the step's length was not chosen on, 0.45 and 0.04.

    Args:
        model: The base; it is as it was found when this returns or raises, and so are the global
            random number generators.
        method: How to score, see above.
        reward_funcs: As the trainer takes them; the evaluation uses them too.
        train_dataset: Prompts to train on.
        processing_class: As the trainer takes it.
        args: The trainer's arguments for every run. With `eval_strategy="steps"`, scores along the
            way are kept every `eval_steps`. `seed` and folders are set for each run.
        layers: Layers to score, as `select_layers` takes them.
        modules: Globs inside the block: score only this part of each layer.
        budget: Prompts that `"gradient"` and `"step"` generate for, `num_generations` completions
            each.
        seeds: Seeds of the runs. Methods without runs take the first: to see how far a probe
            depends on its seed, probe again with another one.
        trainer_class: A masked trainer class, or a factory with its arguments.
        eval_dataset: Other prompts, each once, to score every run on. This and what follows is for
            methods that train.
        full_args: Other arguments for the full-parameter run of `"train"`, whose best learning rate
            is smaller than a single layer's. What they say of generation and rewards must be the
            same. None: `args`.
        greedy: Evaluate greedily, one completion a prompt, instead of sampling as in training.
        halving: After an eighth, a quarter and a half of `args.max_steps`, drop the layers that are
            worse than the last one of the better half, where the 95 % interval of the difference
            is below zero, once that one has half of the full gain. The others go on from where they
            were, as if nothing had happened. Dropped layers have no contribution. Being behind
            early is no proof of being behind at the end.
        output_dir: Folder of the journal, the report and the checkpoints of unfinished runs.
            With Ray on several machines, one that they share.
        executor: `"serial"`, or `"ray"` for a Ray cluster: the one that `ray.init` connected to,
            or else this machine. The results are the same.
        resources: What one run takes of a Ray cluster, as `num_cpus`, `num_gpus` and `memory`.
            None: one GPU where the trainer would use one, otherwise one CPU.

    Returns:
        The report.

    Raises:
        ProbeError: If something cannot be measured as it was given.
        TrainerError: If `args` or `full_args` are not those of the trainer class.
        JournalError: If `output_dir` holds other runs, or cannot be written.
        ReportError: If the paper has no such model.
        SelectionError: If the layers do not fit the model.
        ModelError: If torch can train none of it, as it was made inside `torch.inference_mode()`.
    """
    entry, variant = method_of(method)
    request = Request(
        model=model,
        variant=variant,
        reward_funcs=reward_funcs,
        train_dataset=train_dataset,
        processing_class=processing_class,
        args=args,
        budget=budget,
        # A generator gives them once, and some methods ask twice.
        seeds=[*seeds] if isinstance(seeds, Iterator) else seeds,
        trainer_class=trainer_class,
        eval_dataset=eval_dataset,
        full_args=full_args,
        greedy=greedy,
        halving=halving,
        output_dir=output_dir,
        executor=executor,
        resources=resources,
    )
    missing = [name for name in entry.needs if getattr(request, name) is None]
    if missing:
        raise ProbeError(f"method={method!r} needs {', '.join(missing)}, which was not given")
    if "args" in entry.needs:  # it trains, or computes gradients
        check_gradients_on(f"method={method!r}", ProbeError)
        _check_trainer_class(trainer_class, args, full_args)
    selection = select_layers(model, layers, modules=modules)
    if "args" in entry.needs and isinstance(model, nn.Module):
        check_can_change(model)
    if selection.stack != "text":
        raise ProbeError(f"{selection}: the layers of the text are scored. Leave out stack.")
    if selection.also:
        raise ProbeError(f"{selection}: layers alone are scored. Select them without also.")
    if selection.is_boosted:
        raise ProbeError(f"{selection}: layers are scored alike. Select them without boost.")
    if entry.reads_weights and all(parameter.is_meta for parameter in model.parameters()):
        raise ProbeError(
            f"method={method!r} reads weights, and this {type(model).__name__} is on the meta "
            "device, without any: load it with from_pretrained"
        )
    functions = reward_funcs if isinstance(reward_funcs, list | tuple) else (reward_funcs,)
    with known_afterwards((*functions, trainer_class) if "reward_funcs" in entry.needs else ()):
        return entry.score(selection, request)


def _check_trainer_class(trainer_class: Any, args: Any, full_args: Any) -> None:
    """Refuse what makes no masked trainer with rewards, and arguments of another trainer."""
    made_by: Any = trainer_class
    while isinstance(made_by, partial):
        made_by = made_by.func
    is_class = isinstance(made_by, type)
    if not callable(made_by) or (is_class and not issubclass(made_by, LayerMaskedMixin)):
        raise ProbeError(
            f"trainer_class is {shown(trainer_class)}, expected a masked trainer class, such as "
            "LayerMaskedGRPOTrainer, or a function that makes such a trainer"
        )
    if is_class and "reward_funcs" not in names(made_by, LayerMaskedMixin):
        raise ProbeError(
            f"trainer_class is {made_by.__name__}, expected one that generates and rewards, such "
            "as LayerMaskedGRPOTrainer"
        )
    for name, given in (("args", args), ("full_args", full_args)):
        if is_class:
            check_args(made_by, LayerMaskedMixin, given, name)
        elif given is not None:
            check_kind(name, given, TrainingArguments, "the trainer's arguments", ProbeError)


def method_of(method: object) -> tuple[Method, str]:
    """The method of a name, as `contribution_probe` takes it, and its variant after the colon."""
    name, _, variant = method.partition(":") if isinstance(method, str) else ("", "", "")
    refuse_removed([f"method={shown(method)}"], ProbeError)
    entry: Method | None = import_module(METHODS[name]).METHOD if name in METHODS else None
    if entry is None or (variant and not entry.has_variants):
        raise ProbeError(
            f"method is {shown(method)}, expected one of {', '.join(map(repr, METHODS))}, "
            '"position:DEPTH" or "published:MODEL"'
        )
    return entry, variant
