"""Measure the contribution of each layer: train every layer alone, with intervals.

    python examples/sweep_layers.py --layers 5,10,25     # three of SmolLM2-135M's thirty
    python examples/sweep_layers.py                      # all of them: hours on a CPU
    python examples/sweep_layers.py --halving --executor ray

Writes to `runs/sweep`: the journal, `report.json` and `contributions.png`. If it is stopped, the
same command continues.
"""

import argparse

from chain_sum import distinct, reward
from training import arguments, layers, parser, start

from layerrl import ContributionReport, contribution_probe


def main() -> None:
    """Sweep, print, plot."""
    options = parse()
    setup = start(options)
    shared = {"eval_strategy": "steps", "eval_steps": max(options.steps // 4, 1)}
    report = contribution_probe(
        setup.model(),
        method="train",
        reward_funcs=reward,
        train_dataset=setup.data.train,
        eval_dataset=distinct(setup.data.held_out),
        processing_class=setup.tokenizer,
        args=arguments(options, **shared),
        full_args=arguments(options, **shared, learning_rate=options.full_learning_rate),
        layers=options.layers,
        seeds=options.seeds,
        halving=options.halving,
        executor=options.executor,
        output_dir=options.output,
    )
    print(report)
    plot(report, options)
    print(f"Wrote {options.output}/: journal.jsonl, report.json, contributions.png")


def plot(report: ContributionReport, options: argparse.Namespace) -> None:
    """Contributions, or scores where they are undefined, against depth."""
    import matplotlib

    matplotlib.use("Agg")
    ax = report.plot()
    ax.set_title(f"{options.model}, {options.steps} steps, seeds {options.seeds}", fontsize=10)
    ax.figure.savefig(options.output / "contributions.png", dpi=150)


def parse() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0], "runs/sweep")
    add = options.add_argument
    add("--layers", type=layers, default="all", help="10, 10,12, middle:5 (default: %(default)s)")
    add("--full-learning-rate", type=float, default=3e-5, help="default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default: 0)")
    add("--halving", action="store_true", help="drop layers that fall behind on the way")
    add("--executor", default="serial", choices=["serial", "ray"], help="default: %(default)s")
    return options.parse_args()


if __name__ == "__main__":
    main()
