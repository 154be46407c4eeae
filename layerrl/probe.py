"""The one door to every way of scoring layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerrl.errors import ProbeError
from layerrl.selection import select_layers
from layerrl.sweep import Sweep, digest
from layerrl.trainer import LayerMaskedGRPOTrainer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from datasets import Dataset
    from torch import nn

    from layerrl.report import ContributionReport


def contribution_probe(
    model: nn.Module,
    *,
    reward_funcs: Any,  # noqa: ANN401 - what the trainer takes
    train_dataset: Dataset,
    eval_dataset: Dataset,
    processing_class: Any = None,  # noqa: ANN401
    args: Any,  # noqa: ANN401
    full_args: Any = None,  # noqa: ANN401
    method: str = "train",
    layers: int | Iterable[int] | slice | str = "all",
    modules: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    greedy: bool = True,
    output_dir: str | os.PathLike[str],
    trainer_class: type = LayerMaskedGRPOTrainer,
) -> ContributionReport:
    """Measure each layer's contribution C(k): its share of the full-parameter gain.

    One isolated run per layer and seed from the same base, on the same data in the same order, one
    full-parameter run per seed, and one evaluation of the base (arXiv:2607.01232, eq. 4). Finished
    runs are kept in `output_dir`: the same call continues after a kill, and more layers or seeds
    add to what is there.

    Args:
        model: The base; as it was found when this returns or raises.
        reward_funcs: As the trainer takes them; the evaluation uses them too.
        train_dataset: Prompts to train on.
        eval_dataset: Other prompts, to score every run on.
        processing_class: As the trainer takes it.
        args: The trainer's arguments for every run. With `eval_strategy="steps"`, scores along the
            way are kept every `eval_steps`. `seed` and folders are set for each run.
        full_args: Other arguments for the full-parameter run, whose best learning rate is smaller
            than a single layer's. None: `args`.
        method: `"train"`.
        layers: Layers to measure, as `select_layers` takes them.
        modules: Globs inside the block: measure only this part of each layer.
        seeds: Seeds of the runs.
        greedy: Evaluate greedily, one completion a prompt, instead of sampling as in training.
        output_dir: Folder of the journal.
        trainer_class: A masked trainer class, or a factory with its arguments.

    Returns:
        The report.

    Raises:
        ProbeError: If something cannot be measured as it was given.
        JournalError: If `output_dir` holds other runs, or cannot be written.
        SelectionError: If the layers do not fit the model.
    """
    if method != "train":
        raise ProbeError(f'method is {method!r}, expected "train"')
    chosen = select_layers(model, layers, modules=modules)
    seeds = tuple(seeds)
    if not seeds or len({*seeds}) != len(seeds) or not all(type(seed) is int for seed in seeds):
        raise ProbeError(f"seeds is {seeds!r}, expected different ints, at least one")
    _check_prompts(train_dataset, eval_dataset)

    def make_trainer(run_args: Any, selection: Any) -> Any:  # noqa: ANN401
        return trainer_class(
            model=model,
            reward_funcs=reward_funcs,
            args=run_args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            selection=selection,
        )

    functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    sweep = Sweep(
        model,
        make_trainer,
        args=args,
        full_args=args if full_args is None else full_args,
        eval_dataset=eval_dataset,
        greedy=greedy,
        modules=modules,
        output_dir=output_dir,
        settings={
            "train_dataset": digest(train_dataset),
            "rewards": [getattr(f, "__name__", str(f)) for f in functions],
            "trainer": getattr(trainer_class, "__name__", str(trainer_class)),
        },
    )
    return sweep.run(chosen.layers, seeds)


def _check_prompts(train_dataset: Dataset, eval_dataset: Dataset) -> None:
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if "prompt" not in (dataset.column_names or ()):
            raise ProbeError(f'{name} has the columns {dataset.column_names}, expected a "prompt"')
    evaluated = [str(prompt) for prompt in eval_dataset["prompt"]]
    if len({*evaluated}) < 2:
        raise ProbeError(
            f"eval_dataset has {len({*evaluated})} different prompts, expected at least 2: there "
            "is nothing to resample, so nothing could be said about how sure a score is"
        )
    shared = {*evaluated} & {str(prompt) for prompt in train_dataset["prompt"]}
    if shared:
        raise ProbeError(
            f"{len(shared)} of {len({*evaluated})} evaluation prompts are trained on, "
            f"{sorted(shared)[0]!r:.100} among them. Hold them out of train_dataset."
        )
