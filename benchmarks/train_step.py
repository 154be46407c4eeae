"""What a training step costs: plain TRL, TRL frozen by hand, PEFT and layerrl on the same rollouts.

    make bench                                          # middle layer, beta 0.04, a short run
    python benchmarks/train_step.py --depth 0.25 0.5 0.75 --beta 0 0.04 --num-iterations 1 4

Every measurement runs in a process of its own, so that its peak memory is its own, and the methods
take turns, so that a slow minute of the machine hits all of them. Completions are given, not
generated: what is timed is the reference pass, the old log-probabilities and the policy passes with
their optimizer steps, in TRL's own loop with its default settings. Finished measurements are lines
of a journal; the same command continues where it was stopped.

Ratios are against the masked trainer of the same round; their spread is over rounds.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = {
    "full": "TRL, full parameters",
    "masked-full": 'layerrl, selection="full"',
    "by-hand": "TRL, requires_grad by hand",
    "lora": "PEFT LoRA r16 on the layer",
    "modules-to-save": "PEFT modules_to_save the layer",
    "masked": "layerrl",
}
PROMPT = "What is 12 plus 30, and why? " * 4
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure what the journal does not hold yet, then report."""
    options = parse()
    if options.worker:
        print(json.dumps(measure(json.loads(options.worker))))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    journal = options.output / "train_step.jsonl"
    done = (
        [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    )
    cases = [
        {
            "method": method,
            "depth": depth,
            "beta": beta,
            "num_iterations": num_iterations,
            "round": turn,
            "cycles": options.cycles,
            "device": options.device,
            "model": base(options.model),
        }
        for turn, depth, beta, num_iterations, method in itertools.product(
            range(options.rounds),
            options.depth,
            options.beta,
            options.num_iterations,
            options.methods,
        )
    ]
    finished = [{key: entry[key] for key in cases[0]} for entry in done]
    for number, case in enumerate(cases, 1):
        if case in finished:
            continue
        print(f"{number}/{len(cases)}", {k: case[k] for k in list(case)[:5]}, flush=True)
        command = [sys.executable, __file__, "--worker", json.dumps(case)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{case} failed:\n{ended.stderr}")
        entry = case | json.loads(ended.stdout.splitlines()[-1])
        done.append(entry)
        with journal.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
    report(done, options.output)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One method in this process: seconds per step, peak memory, bytes of a checkpoint."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from layerrl import LayerMaskedGRPOTrainer, select_layers

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    device = torch.device(case["device"])
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).to(device)
    num_layers = model.config.get_text_config().num_hidden_layers
    layer = int(case["depth"] * num_layers)
    method = case["method"]
    num_rows, length = 16, 32

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(trainer.state.global_step)
        ids = torch.randint(1000, 20000, (len(prompts), length), generator=draws)
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids.tolist(),
            "logprobs": None,
        }

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    class Clock(TrainerCallback):
        steps: list[float]

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.steps = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = now(device)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(now(device) - self.started)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "args": GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=num_rows,
                num_generations=num_rows // 2,
                max_completion_length=length,
                beta=case["beta"],
                num_iterations=case["num_iterations"],
                max_steps=(1 + case["cycles"]) * case["num_iterations"],
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device.type == "cpu",
            ),
            "train_dataset": Dataset.from_dict(
                {"prompt": ["What is 12 plus 30, and why? " * 4] * 64}
            ),
            "processing_class": tokenizer,
            "rollout_func": rollouts,
            "callbacks": [clock],
        }
        selection = select_layers(model, "full" if method == "masked-full" else layer)
        if method.startswith("masked"):
            trainer = LayerMaskedGRPOTrainer(model, reward, selection=selection, **arguments)
        else:
            if method == "by-hand":
                trained = {id(p) for p in selection.parameters(model).values()}
                for parameter in model.parameters():
                    parameter.requires_grad_(id(parameter) in trained)
            if method in ("lora", "modules-to-save"):
                arguments["peft_config"] = adapter(method, layer)
            trainer = GRPOTrainer(model, reward, **arguments)
        trainer.train()
        peak = peak_bytes(device)
        trainer._save_checkpoint(trainer.model, None)
        [checkpoint] = Path(folder).glob("checkpoint-*")
        saved = {f.name: f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()}
    per_cycle = case["num_iterations"]
    timed = clock.steps[per_cycle:]  # the first cycle warms up
    return {
        "seconds": sum(timed) / len(timed),
        "peak_bytes": peak,
        "checkpoint_bytes": sum(
            size
            for name, size in saved.items()
            if name.endswith(".safetensors") or name == "optimizer.pt"
        ),
        "trained_bytes": sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad),
    }


def adapter(method: str, layer: int) -> Any:
    """LoRA on one layer, or one layer trained whole by way of PEFT."""
    from peft import LoraConfig

    if method == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return LoraConfig(
            r=16, target_modules=names, layers_to_transform=[layer], layers_pattern="layers"
        )
    return LoraConfig(
        r=1,
        target_modules=["q_proj"],
        layers_to_transform=[0],
        layers_pattern="layers",
        modules_to_save=[f"layers.{layer}"],
    )


def now(device: Any) -> float:
    """Seconds, after everything queued on the device has run."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: Any) -> int:
    """Most memory held so far: the allocator's on a GPU, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(done: list[dict[str, Any]], output: Path) -> None:
    """Print ratios with their spread, and write them as JSON and as a picture."""
    keys = ("depth", "beta", "num_iterations")
    table = []
    for setting in sorted({tuple(entry[key] for key in keys) for entry in done}):
        of_setting = [e for e in done if tuple(e[key] for key in keys) == setting]
        ours = {e["round"]: e for e in of_setting if e["method"] == "masked"}
        for method, label in METHODS.items():
            entries = [e for e in of_setting if e["method"] == method and e["round"] in ours]
            if entries:
                slower = [e["seconds"] / ours[e["round"]]["seconds"] for e in entries]
                larger = [e["peak_bytes"] / ours[e["round"]]["peak_bytes"] for e in entries]
                table.append(
                    dict(zip(keys, setting, strict=True))
                    | {
                        "method": label,
                        "rounds": len(entries),
                        "seconds": statistics.median(e["seconds"] for e in entries),
                        "time_ratio": statistics.median(slower),
                        "time_ratio_range": [min(slower), max(slower)],
                        "peak_bytes": statistics.median(e["peak_bytes"] for e in entries),
                        "peak_ratio": statistics.median(larger),
                        "checkpoint_bytes": entries[0]["checkpoint_bytes"],
                        "trained_bytes": entries[0]["trained_bytes"],
                    }
                )
    for row in table:
        low, high = row["time_ratio_range"]
        print(
            f"depth {row['depth']:.2f} beta {row['beta']:<5} num_iterations "
            f"{row['num_iterations']}  {row['method']:32} {row['seconds']:6.2f} s  "
            f"{row['time_ratio']:.2f}x [{low:.2f}, {high:.2f}]  peak "
            f"{row['peak_bytes'] / 1e9:.2f} GB ({row['peak_ratio']:.2f}x)  checkpoint "
            f"{row['checkpoint_bytes'] / 1e6:.0f} MB"
        )
    (output / "train_step.json").write_text(json.dumps(table, indent=1) + "\n")
    plot(table, output / "train_step.png")


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Seconds of a step by method, one panel a setting, with the range over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = sorted({(r["depth"], r["beta"], r["num_iterations"]) for r in table})
    figure, panels = plt.subplots(
        1, len(settings), figsize=(3.2 * len(settings) + 2, 2.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, setting in zip(panels[0], settings, strict=True):
        rows = [r for r in table if (r["depth"], r["beta"], r["num_iterations"]) == setting]
        names = [row["method"] for row in rows]
        ratios = [row["time_ratio"] for row in rows]
        low = [row["time_ratio"] - row["time_ratio_range"][0] for row in rows]
        high = [row["time_ratio_range"][1] - row["time_ratio"] for row in rows]
        axes.barh(names, ratios, xerr=[low, high], color="tab:blue", height=0.6)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis() if axes is panels[0][0] else None
        depth, beta, num_iterations = setting
        axes.set_title(f"depth {depth}, beta {beta}, {num_iterations} iterations", fontsize=9)
        axes.set_xlabel("time of a step, layerrl = 1")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def base(model: str) -> str:
    """The bundled model's folder, or whatever id or path was given."""
    sys.path.insert(0, str(ROOT / "examples"))
    from chain_sum import base_checkpoint

    return base_checkpoint(model, ROOT / "runs")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="hub id or path")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--depth", nargs="+", type=float, default=[0.5])
    parser.add_argument("--beta", nargs="+", type=float, default=[0.04])
    parser.add_argument("--num-iterations", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=2, help="timed generation batches a process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
