"""Where the time of a training step goes: layers, head, softmax, optimizer, Python.

    python benchmarks/step_parts.py                    # beta 0, num_iterations 1, middle layer
    python benchmarks/step_parts.py --beta 0.04 --num-iterations 4

The step of `train_step.py` on a CPU, under PyTorch's profiler. An operator counts by what it is and
by what calls it: TRL's function of head and softmax, attention, the optimizer's step. The rest
of the wall time is Python: TRL's, transformers' and layerrl's together. Methods take turns.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from train_step import base, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from layerrl import select_layers

METHODS = {"full": "full", "by-hand": "by hand", "masked": "layerrl"}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
PARTS = (
    "layers' products",
    "attention",
    "head's products",
    "softmax",
    "optimizer",
    "other torch",
)
PROMPT = "What is 12 plus 30, and why? " * 4


def main() -> None:
    """Measure each method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--num-iterations", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = base("SmolLM2-135M-Instruct")
    case = {"beta": options.beta, "num_iterations": options.num_iterations, "device": "cpu"}
    case |= {"rows": 16, "length": 32, "cycles": 1}
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method in METHODS:
            found[method].append(parts(case | {"method": method}, model))
    print(f"Seconds of a step, median of {options.rounds} rounds:\n")
    print("| part | " + " | ".join(METHODS.values()) + " |\n|" + "---|" * 4)
    for part in (*PARTS, "Python", "step"):
        medians = [statistics.median(one[part] for one in rounds) for rounds in found.values()]
        print(f"| {part} | " + " | ".join(f"{seconds:.2f}" for seconds in medians) + " |")


def parts(case: dict[str, Any], folder: str) -> dict[str, float]:
    """Seconds of a step by part, the mean of the optimizer steps on one generation batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = model.config.num_hidden_layers // 2
    selection = select_layers(model, "full" if case["method"] == "full" else layer)
    size = case["num_iterations"]

    class Profiled(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == size:  # the first batch warms up
                self.profile = profile(activities=[ProfilerActivity.CPU])
                self.profile.__enter__()
                self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 * size:
                self.seconds = time.perf_counter() - self.begin
                self.profile.__exit__(None, None, None)

    clock = Profiled()
    with tempfile.TemporaryDirectory() as output:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        arguments = {"tokenizer": tokenizer, "prompt": PROMPT, "settings": {}}
        arguments |= {"callbacks": [clock], "output_dir": output}
        make_trainer(case, model, selection, **arguments).train()
    taken: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for event in clock.profile.events():
        taken[part_of(event)] += event.self_cpu_time_total / 1e6
    taken["Python"] = clock.seconds - sum(taken.values())
    taken["step"] = clock.seconds
    return {part: seconds / size for part, seconds in taken.items()}


def part_of(event: Any) -> str:
    """The part that an operator's own time belongs to, by itself and by what called it."""
    callers, caller = [], event
    while caller is not None:
        callers.append(caller.name)
        caller = caller.cpu_parent
    if any(name.startswith("Optimizer.step") for name in callers):
        return "optimizer"
    if any("attention" in name for name in callers):
        return "attention"
    of_head = any("ChunkedLogProb" in name for name in callers)
    if event.name in PRODUCTS:
        return "head's products" if of_head else "layers' products"
    return "softmax" if of_head else "other torch"


if __name__ == "__main__":
    main()
