"""Train one layer of a real model with RL, save it, merge it, and measure at every stage.

    python examples/quickstart.py                       # SmolLM2-135M, one layer
    python examples/quickstart.py --layers middle:5 --steps 30 --seed 1
    python examples/quickstart.py --model Qwen/Qwen3-0.6B --layers 10

Writes to `runs/quickstart`: the delta, the merged model, `summary.json` and `reward.png`.
"""

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from chain_sum import BUNDLED, MAX_NEW_TOKENS, base_checkpoint, evaluate, problems, reward
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig

from layerrl import LayerMaskedGRPOTrainer, merge_delta, select_layers


def main() -> None:
    """Measure, train, measure, save, merge, measure."""
    options = parse()
    started = time.time()
    warnings.filterwarnings("ignore", module="(trl|transformers|torch)")
    logging.disable_progress_bar()
    out: Path = options.output
    for made in ("delta", "merged"):
        shutil.rmtree(out / made, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)

    base = base_checkpoint(options.model, out.parent)
    tokenizer = AutoTokenizer.from_pretrained(base)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    selection = select_layers(model, options.layers)
    data = problems(options.seed, chat=tokenizer.chat_template is not None)
    print(f"{options.model}: {selection}, {options.steps} steps, seed {options.seed}")
    before = evaluate(model, tokenizer, data.held_out)

    trainer = LayerMaskedGRPOTrainer(
        model,
        reward,
        args=GRPOConfig(
            output_dir=str(out / "trainer"),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=0.7,
            seed=options.seed,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        ),
        train_dataset=data.train,
        processing_class=tokenizer,
        selection=selection,
        callbacks=[RewardBar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = evaluate(trained, tokenizer, data.held_out)

    delta = trainer.save_delta(out / "delta")
    merge_delta(base, delta, out / "merged")
    merged_model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    merged = evaluate(merged_model.to(device), tokenizer, data.held_out)
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
        "delta_bytes": sum(file.stat().st_size for file in delta.iterdir()),
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
    partial = out / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.replace(out / "summary.json")
    plot(rewards, summary, out / "reward.png")
    report(summary, out)


class RewardBar(TrainerCallback):
    """One progress bar over the steps, with the mean reward of the last one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: object) -> None:
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: object) -> None:
        if logs and "reward" in logs:
            self.bar.set_postfix(reward=f"{logs['reward']:.2f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        self.bar.close()


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


def layers(text: str) -> int | list[int] | str:
    """`10`, `10,12` or a word that select_layers knows."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else numbers


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BUNDLED, help="hub id or path (default: %(default)s)")
    parser.add_argument("--layers", type=layers, default=10, help="10, 10,12, middle:5, all, ...")
    parser.add_argument("--steps", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
