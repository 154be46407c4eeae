"""`method="train"`: each layer's contribution, measured by training it alone.

Not in `scores/`, which stands below the sweep: the sweep's runs generate and evaluate with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from layerrl.checks import check_choice, check_path, check_switch
from layerrl.errors import ProbeError
from layerrl.report import ContributionReport
from layerrl.scores.checks import check_arguments, check_held_out
from layerrl.scores.evaluation import random_state_kept
from layerrl.scores.identity import digest, digest_of_rows, settings_of
from layerrl.scores.method import ROLLOUTS, Method, Request
from layerrl.scores.runs import Runs
from layerrl.selection import LayerSelection
from layerrl.sweep import Sweep
from layerrl.sweep.executors import EXECUTORS, check_resources
from layerrl.sweep.harness import Harness


def measured(
    selection: LayerSelection,
    request: Request,
    *,
    choose: Callable[[dict[str, Any]], Sequence[int]] | None = None,
    stop: int | None = None,
) -> ContributionReport:
    """Return the report of layers that are trained alone and scored.

    `choose` is given the journal's settings, when all is checked, and says which to train; `stop`
    is as `Sweep` takes it.
    """
    greedy = check_switch("greedy", request.greedy, ProbeError)
    halving = check_switch("halving", request.halving, ProbeError)
    folder = check_path("output_dir", request.output_dir, ProbeError)
    check_choice("executor", request.executor, EXECUTORS, ProbeError)
    resources = None if request.resources is None else check_resources(request.resources)
    runs, args = Runs.of(selection, request), request.args
    with random_state_kept():
        eval_dataset = check_held_out(request.eval_dataset, request.train_dataset)
        full_args = args if request.full_args is None else request.full_args
        check_arguments(args, full_args, greedy=greedy, halving=halving)
        settings = {
            **runs.settings,
            "full_args": settings_of(full_args, "full_args"),
            "greedy": greedy,
            "eval_dataset": digest_of_rows(eval_dataset),
        }
        harness = Harness(
            runs.models,
            runs.make_trainer,
            args=args,
            full_args=full_args,
            eval_dataset=eval_dataset,
            greedy=greedy,
            modules=selection.modules,
            # Checkpoints of other settings may lie where a journal cannot see them: on other
            # machines.
            folder=folder / "runs" / digest(settings),
        )
        settings = {"base": harness.base, **settings}
        sweep = Sweep(
            harness,
            num_layers=selection.num_layers,
            layers=selection.layers if choose is None else choose(settings),
            seeds=runs.seeds,
            args=args,
            settings=settings,
            halving=halving,
            stop=stop,
            folder=folder,
        )
        one = {"num_gpus": 1} if args.device.type == "cuda" else {"num_cpus": 1}
        return sweep.run(request.executor, one if resources is None else resources)


METHOD = Method(score=measured, needs=(*ROLLOUTS, "eval_dataset", "output_dir"))
