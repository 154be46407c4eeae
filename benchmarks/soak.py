"""Thousands of steps of a tiny model: what grows with them, and what stays behind.

    python benchmarks/soak.py                  # 2000 steps each of "auto" and of a schedule
    python benchmarks/soak.py --steps 500 --runs plain auto

Each run generates, replays, evaluates and saves, in a process of its own; `plain` is TRL's trainer
with the same settings. Memory is fitted over the last three quarters of the steps, with a 95 %
interval by leaving out each tenth of them in turn. Times are the process's own seconds in each
third of the steps, which other programs on the machine change less than a clock's; `around` is what
a fixed piece of work took meanwhile, which shows how much they did. Linux only.
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
from statistics import mean, median
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
            self.spans: list[float] = []
            self.around: list[float] = []
            self.begun = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.spans.append(time.process_time() - self.begun)
            if state.global_step % every == 0:
                self.around.append(seconds_of_fixed_work())
                objects = len(gc.get_objects())
                self.samples.append(
                    (state.global_step, resident(), descriptors(), hooks(model), objects)
                )
            self.begun = time.process_time()  # what was measured here is no part of a step

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
    memory, objects = ([(sample[0], sample[of]) for sample in tail] for of in (1, 4))
    interval = leaving_out_tenths(memory)
    return {
        "run": name,
        "steps": len(watch.spans),
        "rss_bytes_a_step": round(slope(memory), 1),
        "rss_95": [round(end, 1) for end in interval],
        "rss_grown": memory[-1][1] - memory[0][1],
        "objects_a_step": round(slope(objects), 3),
        "fds_grown": tail[-1][2] - tail[0][2],
        "hooks_grown": tail[-1][3] - tail[0][3],
        "fds_left": descriptors() - before["fds"],
        "hooks_left": hooks(model) - before["hooks"],
        # The first steps of a process load what later ones find.
        "ms_a_step": [round(1000 * mean(third), 2) for third in thirds(watch.spans[steps // 20 :])],
        "ms_a_step_median": [
            round(1000 * median(third), 2) for third in thirds(watch.spans[steps // 20 :])
        ],
        "ms_around": [round(1000 * median(third), 2) for third in thirds(watch.around)],
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


def leaving_out_tenths(points: list[tuple[int, int]]) -> tuple[float, float]:
    """Interval of the slope: the jackknife's, over tenths, as memory grows in jumps."""
    size = len(points) // 10
    slopes = [slope(points[: i * size] + points[(i + 1) * size :]) for i in range(10)]
    error = (9 / 10 * sum((value - mean(slopes)) ** 2 for value in slopes)) ** 0.5
    return slope(points) - 2.26 * error, slope(points) + 2.26 * error  # Student's t of 9


def thirds(values: list[float]) -> list[list[float]]:
    """First, second and last of what came one after the other."""
    size = len(values) // 3
    return [values[:size], values[size : 2 * size], values[-size:]]


def seconds_of_fixed_work() -> float:
    """The process's own seconds for something that never changes."""
    begun = time.process_time()
    sum(number * number for number in range(20_000))
    return time.process_time() - begun


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
