"""Score every layer before training, train the best one, and check whether the score was right.

    python examples/probe_then_train.py                      # SmolLM2, ten minutes of one core
    python examples/probe_then_train.py --method position

It trains the probe's best layer, the middle layer (which needs no probe) and the probe's worst
layer for the same number of steps. Writes `runs/probe/report.json` and `scores.json`, and reads
them if they exist. The score depends on the seed: another `--seed` may choose another layer. If
you only want to train the best layer, `selection="auto"` does it without generating twice.
"""

import argparse
import json

from chain_sum import answers, distinct, reward
from training import arguments, check_settings, parser, show, start, train, write_json

from layerrl import ContributionReport, contribution_probe, select_layers


def main() -> None:
    """Probe, train three layers, compare."""
    options = parse()
    setup = start(options)
    check_settings(options)
    kept = options.output / "report.json"
    if kept.exists():
        report = ContributionReport.from_json(kept.read_text(encoding="utf-8"))
    else:
        report = contribution_probe(
            setup.model(),
            method=options.method,
            reward_funcs=reward,
            train_dataset=setup.data.train,
            processing_class=setup.tokenizer,
            args=arguments(options),
            budget=options.budget,
            seeds=[options.seed],
        )
        write_json(kept, json.loads(report.to_json()))
    print(report)
    best = report.top(1)
    worst = min(report.scores, key=report.scores.__getitem__)
    held_out = distinct(setup.data.held_out)
    path = options.output / "scores.json"
    found: dict[str, list[float]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    )
    for name, layers in (("base", None), ("best", best), ("middle", "middle"), ("worst", worst)):
        if name in found:
            continue
        model = setup.model()
        if layers is not None:
            selection = select_layers(model, layers)
            train(setup, model, selection, arguments(options), f"{name} ({selection})")
        texts = answers(model, setup.tokenizer, held_out, options.tokens)
        found[name] = reward(texts, held_out["answer"])
        write_json(path, found)
    show(found, against="best")


def parse() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0], "runs/probe")
    add = options.add_argument
    add("--method", default="gradient", help="of contribution_probe (default: %(default)s)")
    add("--budget", type=int, default=64, help="prompts of the probe (default: %(default)s)")
    return options.parse_args()


if __name__ == "__main__":
    main()
