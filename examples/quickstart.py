"""Train one layer of SmolLM2-135M with RL, save it, merge it, and measure at every stage.

    python examples/quickstart.py                       # SmolLM2-135M, one layer
    python examples/quickstart.py --layers middle:5 --steps 30 --seed 1
    python examples/quickstart.py --model Qwen/Qwen3-0.6B --layers 10

Writes to `runs/quickstart`: the delta, the merged model, `summary.json` and `reward.png`.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from chain_sum import evaluate
from training import arguments, layers, parser, start, train, write_json

from layerrl import merge_delta, select_layers


def main() -> None:
    """Measure, train, measure, save, merge, measure."""
    options = parse()
    started = time.time()
    out: Path = options.output
    for made in ("delta", "merged"):
        shutil.rmtree(out / made, ignore_errors=True)
    setup = start(options)
    tokenizer, data = setup.tokenizer, setup.data
    model = setup.model()
    selection = select_layers(model, options.layers)
    print(f"{options.model}: {selection}, {options.steps} steps, seed {options.seed}")
    before = evaluate(model, tokenizer, data.held_out, options.tokens)

    trainer = train(setup, model, selection, arguments(options), "training")
    after = evaluate(model, tokenizer, data.held_out, options.tokens)

    delta = trainer.save_delta(out / "delta")
    merge_delta(setup.base, delta, out / "merged")
    merged_model = setup._replace(base=str(out / "merged")).model()
    merged = evaluate(merged_model, tokenizer, data.held_out, options.tokens)
    if merged.completions != after.completions:
        raise SystemExit("the merged model answers differently from the trained one")

    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    summary = {
        "base_accuracy": before.accuracy,
        "trained_accuracy": after.accuracy,
        "merged_accuracy": merged.accuracy,
        "base_interval": before.interval,
        "trained_interval": after.interval,
        "layer": selection.layers[0] if len(selection.layers) == 1 else list(selection.layers),
        "trained_parameters": sum(p.numel() for p in selection.parameters(model).values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "delta_bytes": sum(file.stat().st_size for file in delta.glob("delta.*")),
        "seconds": round(time.time() - started, 1),
        "seed": options.seed,
        "model": options.model,
        "selection": json.loads(selection.to_json()),
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "held_out_problems": len(data.held_out),
        "held_out_distinct": len(after.completions),
        "rewards": rewards,
    }
    write_json(out / "summary.json", summary)
    plot(rewards, summary, out / "reward.png")
    report(summary, out)


def plot(rewards: list[float], summary: dict[str, Any], path: Path) -> None:
    """Mean training reward by step, between the held-out accuracies before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(rewards) + 1), rewards, marker=".", label="training reward (sampled)")
    for stage, style in (("base", ":"), ("trained", "--")):
        accuracy = summary[f"{stage}_accuracy"]
        axes.axhline(accuracy, color="black", linestyle=style, linewidth=1)
        axes.text(1, accuracy + 0.01, f"held out, {stage}: {accuracy:.2f}", fontsize=8)
    axes.set(xlabel="step", ylabel="fraction right", ylim=(0, 1))
    axes.set_title(
        f"{summary['model']}, layer {summary['layer']}, seed {summary['seed']}", fontsize=10
    )
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(summary: dict[str, Any], out: Path) -> None:
    """Print what was measured."""
    share = summary["trained_parameters"] / summary["total_parameters"]
    print(
        f"\nHeld-out accuracy, greedy, {summary['held_out_problems']} problems "
        f"({summary['held_out_distinct']} distinct), 95 % interval"
    )
    for stage in ("base", "trained"):
        low, high = summary[f"{stage}_interval"]
        print(f"  {stage:8} {summary[f'{stage}_accuracy']:.3f}  [{low:.3f}, {high:.3f}]")
    print(f"  {'merged':8} {summary['merged_accuracy']:.3f}  same completions as trained")
    print(
        f"Trained {summary['trained_parameters']:,} of {summary['total_parameters']:,} parameters "
        f"({share:.1%}), delta {summary['delta_bytes'] / 1e6:.1f} MB, {summary['seconds']:.0f} s"
    )
    print(f"Wrote {out}/: delta, merged, summary.json, reward.png")


def parse() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0], "runs/quickstart")
    options.add_argument("--layers", type=layers, default=10, help="10, 10,12, middle:5, all, ...")
    return options.parse_args()


if __name__ == "__main__":
    main()
