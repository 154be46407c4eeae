"""Thousands of steps of a tiny model: what grows with them, and what stays behind.

    python benchmarks/soak.py                  # 2000 steps each of "auto" and of a schedule
    python benchmarks/soak.py --steps 500 --runs plain auto

Each run generates, replays, evaluates and saves, in a process of its own; `plain` is TRL's trainer
with the same settings. Memory is fitted over the last three quarters of the steps. Times are the
process's own seconds, which other programs on the machine change little. Linux only.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS = ("plain", "auto", "schedule")
PAGE = os.sysconf("SC_PAGE_SIZE")


def main(arguments: list[str] | None = None) -> None:
    """Measure the runs one after the other, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["auto", "schedule"])
    parser.add_argument("--worker", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(soaked(options.worker, options.steps)))
        return
    # One arena: what glibc keeps for threads that have ended is no leak of a training.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    for name in options.runs:
        command = [sys.executable, __file__, "--worker", name, "--steps", str(options.steps)]
        ended = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
        print(ended.stdout.decode().splitlines()[-1], flush=True)


def soaked(name: str, steps: int) -> dict[str, Any]:
    """One run's figures: growth a step, and what is left when it has ended."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from layerrl.trainer.schedule import LayerSchedule
    from tests.grpo import PROMPTS, make
    from tests.models import tiny
    from tests.runs import evaluation

    every = max(1, steps // 200)

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.samples: list[tuple[int, int, int, int, int]] = []
            self.times = [time.process_time()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.times.append(time.process_time())
            if state.global_step % every == 0:
                objects = len(gc.get_objects())
                self.samples.append(
                    (state.global_step, resident(), descriptors(), hooks(model), objects)
                )

    kinds = {
        "plain": {},
        "auto": {"selection": "auto:2"},
        "schedule": {
            "selection": [1, 2, 3],
            "arguments": {"callbacks": [LayerSchedule([1, 2, 3], every=7)]},
        },
    }
    kind, evaluated = kinds[name], evaluation(every=25)
    both = {
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS * 64}),
        **evaluated.pop("arguments"),
        **kind.pop("arguments", {}),
    }
    torch.manual_seed(0)
    model, watch = tiny("llama", 4), Watch()
    before = {"fds": descriptors(), "hooks": hooks(model)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(
            model, folder, **kind, **evaluated, arguments=both, max_steps=steps,
            beta=0.0 if name == "plain" else 0.04,  # plain TRL would load the reference by name
            num_iterations=2, learning_rate=1e-4, save_strategy="steps", save_steps=50,
            save_total_limit=2, logging_steps=100,
        )  # fmt: skip
        trainer.add_callback(watch)
        trainer.train()
    del trainer
    gc.collect()
    tail = [sample for sample in watch.samples if sample[0] > steps / 4]
    quarter = steps // 4
    # The first steps of a process load what later ones find.
    spans = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    start = sum(spans[quarter // 5 : quarter]) / (quarter - quarter // 5)
    end = sum(spans[-quarter:]) / quarter
    return {
        "run": name,
        "steps": len(spans),
        "rss_bytes_a_step": round(slope([(s[0], s[1]) for s in tail]), 1),
        "objects_a_step": round(slope([(s[0], s[4]) for s in tail]), 3),
        "fds_grown": tail[-1][2] - tail[0][2],
        "hooks_grown": tail[-1][3] - tail[0][3],
        "fds_left": descriptors() - before["fds"],
        "hooks_left": hooks(model) - before["hooks"],
        "last_to_first_quarter": round(end / start, 3),
        "ms_a_step": round(1000 * end, 1),
    }


def reward(completions: list[str], **_: Any) -> list[float]:
    """One that the first batches can tell layers by."""
    return [float(sum(letter < "P" for letter in text)) for text in completions]


def slope(points: list[tuple[int, int]]) -> float:
    """Of the straight line through them, by least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGE


def descriptors() -> int:
    """Open files."""
    return len(os.listdir("/proc/self/fd"))


def hooks(model: Any) -> int:
    """Hooks on all modules and parameters of a model."""
    kinds = [
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ]  # fmt: skip
    on_modules = sum(len(getattr(m, kind, ())) for m in model.modules() for kind in kinds)
    on_tensors = sum(len(p._backward_hooks or ()) for p in model.parameters())
    post = sum(
        len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters()
    )
    swapped = sum("forward" in vars(m) for m in model.modules())
    return on_modules + on_tensors + post + swapped


if __name__ == "__main__":
    main()
