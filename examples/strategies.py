"""Compare five strategies for choosing layers from a report, with the same number of steps.

    python examples/sweep_layers.py && python examples/strategies.py
    python examples/strategies.py --report published:Qwen3-1.7B-Base --model Qwen/Qwen3-1.7B-Base

- full: every parameter
- only: the best K layers
- boost: every parameter, the best K layers at twice the learning rate
- middle: K layers around the middle, without a report
- worst: the worst K layers of the report, as a control

Writes `runs/strategies/strategies.json`. Finished strategies are not run again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from chain_sum import answers, distinct, reward
from training import arguments, check_settings, parser, show, start, train, write_json

from layerrl import ContributionReport, published_contributions, select_layers


def main() -> None:
    """Train with each strategy, evaluate, compare with full."""
    options = parse()
    report = read(options.report)
    trainings = strategies(report, options)
    setup = start(options)
    path = options.output / "strategies.json"
    check_settings(options, chosen=[words for _, words, _ in trainings])
    found: dict[str, list[float]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    )
    held_out = distinct(setup.data.held_out)
    for name, words, rate in trainings:
        if name in found:
            continue
        model = setup.model()
        if words is not None:
            args = arguments(options, learning_rate=rate)
            train(setup, model, select_layers(model, **words), args, name)
        texts = answers(model, setup.tokenizer, held_out, options.tokens)
        found[name] = reward(texts, held_out["answer"])
        write_json(path, found)
    show(found, against="full")


def strategies(
    report: ContributionReport, options: argparse.Namespace
) -> list[tuple[str, dict[str, Any] | None, float]]:
    """Name, arguments of `select_layers` and learning rate of each; None trains nothing."""
    k = options.k
    values = report.scores or report.contributions
    unfinished = report.partial and report.method == "train"
    dropped = any(entry.status == "dropped" for entry in report.layers)
    if unfinished or dropped or len(values) < 2 * k:
        raise SystemExit(
            f"the report has values of {len(values)} layers to choose the best and worst {k} from"
            f"{', and its sweep is not finished' if unfinished or dropped else ''}: finish it "
            "(without --halving), or take a smaller --k"
        )
    best = report.top(k)
    worst = sorted(values, key=values.__getitem__)[:k]
    boost = dict.fromkeys(best.layers, 2.0)
    layer, full = options.learning_rate, options.full_learning_rate
    return [
        ("base", None, 0.0),
        ("full", {"layers": "full"}, full),
        (f"only {k}", {"layers": best}, layer),
        (f"boost {k}", {"layers": "full", "boost": boost}, full),
        (f"middle {k}", {"layers": f"middle:{k}"}, layer),
        (f"worst {k}", {"layers": worst}, layer),
    ]


def read(where: str) -> ContributionReport:
    """Read a report from a file, or one of the paper's."""
    if where.startswith("published:"):
        return published_contributions(where.removeprefix("published:"))
    try:
        return ContributionReport.from_json(Path(where).read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(
            f"{where}: {error.strerror}. examples/sweep_layers.py writes it"
        ) from error


def parse() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0], "runs/strategies")
    add = options.add_argument
    add("--report", default="runs/sweep/report.json", help="default: %(default)s")
    add("--k", type=int, default=5, help="how many layers (default: %(default)s)")
    add("--full-learning-rate", type=float, default=3e-5, help="default: %(default)s")
    return options.parse_args()


if __name__ == "__main__":
    main()
