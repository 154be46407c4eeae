"""The one door to every way of scoring layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from layerrl.errors import ProbeError
from layerrl.probe.checks import (
    check_arguments,
    check_held_out,
    check_prompts,
    checked,
    identity_of,
    identity_of_tokens,
    name_of,
)
from layerrl.probe.gradient import gradient_probe
from layerrl.probe.priors import position_report, published_report
from layerrl.selection import select_layers
from layerrl.sweep import Sweep, digest, digest_of_rows, settings_of
from layerrl.sweep.executors import EXECUTORS
from layerrl.sweep.harness import Harness
from layerrl.trainer import LayerMaskedGRPOTrainer
from layerrl.trainer.arguments import refuse_removed
from layerrl.trainer.evaluation import random_state_kept

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from datasets import Dataset

    from layerrl.report import ContributionReport

_PRIORS = {"position": position_report, "published": published_report}
_ROLLOUTS = ("reward_funcs", "train_dataset", "args")
_NEEDS = {
    "train": (*_ROLLOUTS, "eval_dataset", "output_dir"),
    "gradient": _ROLLOUTS,
    **dict.fromkeys(_PRIORS, ()),
}
"""Methods, and the arguments that each cannot do without."""


def contribution_probe(
    model: nn.Module,
    *,
    method: str = "gradient",
    reward_funcs: Any = None,  # what the trainer takes
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    processing_class: Any = None,
    args: Any = None,
    full_args: Any = None,
    layers: int | Iterable[int] | slice | str = "all",
    modules: Sequence[str] | None = None,
    budget: int = 64,
    seeds: Sequence[int] = (0,),
    greedy: bool = True,
    halving: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    trainer_class: type = LayerMaskedGRPOTrainer,
    executor: str = "serial",
    resources: Mapping[str, float] | None = None,
) -> ContributionReport:
    """Score each layer: by its contribution, measured exactly, or by something cheaper.

    | method | what it does | what it needs |
    |---|---|---|
    | `"train"` | measures C(k), each layer's share of the full-parameter gain | everything |
    | `"gradient"` | what a step in the layer alone would gain on other prompts | rollouts |
    | `"published"` | C(k) of the paper's Qwen3-1.7B at the same relative depth | nothing |
    | `"position"` | how near the layer is to the middle | nothing |

    `"train"`: one isolated run per layer and seed from the same base, on the same data in the same
    order, one full-parameter run per seed, and one evaluation of the base (arXiv:2607.01232, eq.
    4). Finished runs are kept in `output_dir`: the same call continues after a kill, more layers or
    seeds add to what is there, and the report has all of it. `report.json` in it is up to date
    after each run, for `ContributionReport.from_json`.

    `"gradient"`: the base answers `budget` prompts, as at the beginning of a training, and each
    prompt's gradient is compared with the optimizer's step from the prompts before it. One backward
    pass serves all layers. `"published:NAME"` takes another of the paper's models, and
    `"position:0.37"` another centre than the middle. A method takes no notice of what it does not
    need.

    Scores of `"gradient"` change with the seed, which draws prompts and completions; their
    intervals are over the prompts of one seed. On five suites its median rank correlation with C(k)
    was 0.56 to 0.90 over five seeds (two of the suites: one seed), and that of another seed's sweep
    0.84. Measure what a decision rests on with `"train"`.

    Args:
        model: The base; it is as it was found when this returns or raises, and so are the global
            random number generators.
        method: How to score, see above.
        reward_funcs: As the trainer takes them; the evaluation uses them too.
        train_dataset: Prompts to train on.
        eval_dataset: Other prompts, each once, to score every run on. For `"train"`.
        processing_class: As the trainer takes it.
        args: The trainer's arguments for every run. With `eval_strategy="steps"`, scores along the
            way are kept every `eval_steps`. `seed` and folders are set for each run.
        full_args: Other arguments for the full-parameter run of `"train"`, whose best learning rate
            is smaller than a single layer's. What they say of generation and rewards must be the
            same. None: `args`.
        layers: Layers to score, as `select_layers` takes them.
        modules: Globs inside the block: score only this part of each layer.
        budget: Prompts that `"gradient"` generates for, `num_generations` completions each.
        seeds: Seeds of the runs. Methods without runs take the first: to see how far a probe
            depends on its seed, probe again with another one.
        greedy: Evaluate greedily, one completion a prompt, instead of sampling as in training.
        halving: After an eighth, a quarter and a half of `args.max_steps`, drop the layers that are
            worse than the last one of the better half, where the 95 % interval of the difference
            is below zero, once that one has half of the full gain. The others go on from where they
            were, as if nothing had happened. Dropped layers have no contribution. Being behind
            early is no proof of being behind at the end.
        output_dir: Folder of the journal, the report and the checkpoints of unfinished runs of
            `"train"`. With Ray on several machines, one that they share.
        trainer_class: A masked trainer class, or a factory with its arguments.
        executor: `"serial"`, or `"ray"` for a Ray cluster: the one that `ray.init` connected to,
            or else this machine. The results are the same.
        resources: What one run takes of a Ray cluster, as `num_cpus`, `num_gpus` and `memory`.
            None: one GPU where the trainer would use one, otherwise one CPU.

    Returns:
        The report.

    Raises:
        ProbeError: If something cannot be measured as it was given.
        JournalError: If `output_dir` holds other runs, or cannot be written.
        ReportError: If the paper has no such model.
        SelectionError: If the layers do not fit the model.
    """
    kind, _, of = method.partition(":") if isinstance(method, str) else ("", "", "")
    refuse_removed([f"method={method!r}"], ProbeError)
    if kind not in _NEEDS or (of and kind not in ("position", "published")):
        raise ProbeError(
            f"method is {method!r}, expected one of {', '.join(map(repr, _NEEDS))}, "
            '"position:DEPTH" or "published:MODEL"'
        )
    given = locals()
    missing = [name for name in _NEEDS[kind] if given[name] is None]
    if missing:
        raise ProbeError(f"method={method!r} needs {', '.join(missing)}, which was not given")
    chosen = select_layers(model, layers, modules=modules)
    if set(chosen.learning_rate_scale) != {1.0}:
        raise ProbeError(f"{chosen}: layers are scored alike. Select them without boost.")
    if kind in _PRIORS:
        return _PRIORS[kind](chosen, of)
    train_dataset = check_prompts("train_dataset", train_dataset)
    if isinstance(seeds, int) or len({*seeds}) != len(seeds) or not seeds or not _ints(seeds):
        raise ProbeError(f"seeds is {seeds!r}, expected different ints, at least one")
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    settings = {
        "args": settings_of(args),
        "modules": None if chosen.modules is None else list(chosen.modules),
        "train_dataset": digest_of_rows(train_dataset),
        "rewards": [identity_of(function) for function in functions],
        "processing_class": identity_of_tokens(processing_class),
        "trainer": name_of(trainer_class),
    }
    make_trainer = partial(
        trainer_class,
        reward_funcs=[checked(function) for function in functions],
        train_dataset=train_dataset,
        processing_class=processing_class,
    )
    # A trainer also puts hooks and casts on reward models.
    models = [model, *(found for found in functions if isinstance(found, nn.Module))]
    with random_state_kept():
        if kind == "gradient":
            return gradient_probe(
                models,
                make_trainer,
                chosen,
                args=args,
                num_prompts=budget,
                seed=seeds[0],
                settings=settings,
            )
        assert output_dir is not None  # or it would be missing
        eval_dataset = check_held_out(eval_dataset, train_dataset)
        if executor not in EXECUTORS:
            raise ProbeError(f"executor is {executor!r}, expected one of {', '.join(EXECUTORS)}")
        full_args = args if full_args is None else full_args
        check_arguments(args, full_args, greedy=greedy, halving=halving)
        settings |= {
            "full_args": settings_of(full_args),
            "greedy": greedy,
            "eval_dataset": digest_of_rows(eval_dataset),
        }
        folder = Path(output_dir)
        harness = Harness(
            models,
            make_trainer,
            args=args,
            full_args=full_args,
            eval_dataset=eval_dataset,
            greedy=greedy,
            modules=chosen.modules,
            # Checkpoints of other settings may lie where a journal cannot see them: on other
            # machines.
            folder=folder / "runs" / digest(settings),
        )
        sweep = Sweep(
            harness,
            num_layers=chosen.num_layers,
            layers=chosen.layers,
            seeds=seeds,
            args=args,
            settings={"base": harness.base, **settings},
            halving=halving,
            folder=folder,
        )
        one = {"num_gpus": 1} if args.device.type == "cuda" else {"num_cpus": 1}
        return sweep.run(executor, one if resources is None else resources)


def _ints(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
