"""What probes cost: memory, time, passes.

    python benchmarks/probe_cost.py          # memory of "gradient", against one backward
    python benchmarks/probe_cost.py --price  # seconds: passes, as a share of a run
    python benchmarks/probe_cost.py --steps  # time of "step", against whole passes

Memory is that of SmolLM2-135M adding and subtracting. Both see micro-batches of the completions of
one prompt, and both have generated before; each measurement runs in a process of its own, in turns.
*Backward* is a plain `loss.backward()` that leaves every parameter its gradient.

`"step"` passes over completions from the layer that moved on. Compared is what takes from the first
pass at the base to the last after a step, without generating and without gradients.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

KINDS = ("backward", "gradient")
STEPS = ("short", "whole")
PROMPTS, RUN = (256, 64), 10_000
SIZES = {
    "a head that takes next to nothing": {"vocab_size": 2},
    "the shape of Qwen2.5-0.5B": {},
}


def main() -> None:
    """Measure in turns, report the ratios of each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64, help="that the probe generates for")
    parser.add_argument("--suite", default="smollm2-chain_sum", help="of --steps")
    parser.add_argument("--steps", action="store_true", help='compare passes of "step"')
    parser.add_argument("--price", action="store_true", help="count passes, measure nothing")
    parser.add_argument("--worker", choices=KINDS + STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.suite, options.prompts)))
    elif options.price:
        for num_prompts, (shape, changes) in itertools.product(PROMPTS, SIZES.items()):
            print(f"{num_prompts} prompts, of a run over {RUN}, 24 layers, {shape}:")
            for layers in ([], range(24), range(0, 24, 4)):
                name = f'"step" of {len(layers)} layers' if layers else '"gradient"'
                print(f"  {name}: {100 * price(num_prompts, layers, changes):.1f} %")
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """The probe and what it is compared with, in turns."""
    probe, other = STEPS if options.steps else KINDS[::-1]
    what = "seconds" if options.steps else "peak"
    ratios, seconds, cost = [], [], ""
    for number in range(options.rounds):
        found = {}
        for kind in (probe, other)[:: 2 * (number % 2) - 1]:
            command = [sys.executable, __file__, "--worker", kind, "--suite", options.suite]
            command += ["--prompts", str(options.prompts)]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            found[kind] = json.loads(ended.stdout.splitlines()[-1])
        ratios.append(found[probe][what] / found[other][what])
        seconds.append(found[probe]["seconds"])
        cost = found[probe]["cost"]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(
        'Time of the passes of "step" over that of whole ones'
        if options.steps
        else "Peak memory of the probe over that of a backward",
        f": {middle:.2f} [{low:.2f}, {high:.2f}]",
        sep="",
    )
    print(f"Seconds of the {'passes' if options.steps else 'probe'}: ", end="")
    print(f"{statistics.median(seconds):.0f}; {cost}")


def price(num_prompts: int, layers: Sequence[int], changes: dict[str, int]) -> float:
    """Passes of a probe over those of a run, where all prompts have signal; see `Cost.fraction`."""
    from transformers import AutoConfig

    from layerrl.blocks import find_blocks, meta_model
    from layerrl.scores.base_pass import shares_of_passes

    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}
    model = meta_model(AutoConfig.for_model("qwen2", tie_word_embeddings=True, **sizes | changes))
    shares = shares_of_passes(model, find_blocks(model).modules)
    generated, trained = 1, 3
    passes = generated + trained
    if layers:  # twice at the base, after each step, and the first micro-batch whole
        passes += 2 + sum(shares[k] for k in layers) + len(layers) / num_prompts
    return num_prompts * passes / (RUN * (generated + trained))


def measure(kind: str, name: str, num_prompts: int) -> dict[str, float | str]:
    """In this process."""
    import planted_scores
    import torch
    from baselines import trainer_for
    from probe_fidelity import scored
    from suites import SUITES
    from train_step import peak_bytes

    from layerrl.replacing import replaced
    from layerrl.scores import step
    from layerrl.scores.base_pass import ShortPasses
    from layerrl.scores.rollouts import Rollouts

    suite = (SUITES | planted_scores.SUITES)[name]
    started, cost = time.perf_counter(), ""
    if kind in STEPS:
        spent = []

        class Timed(ShortPasses):
            def values(self, *args, **kwargs):
                began = time.perf_counter()
                found = super().values(*args, **kwargs)
                spent.append(time.perf_counter() - began)
                return found

        with replaced(step, ShortPasses=partial(Timed, whole=kind == "whole")):
            cost = str(scored(suite, "step", num_prompts).cost)
        return {"seconds": sum(spent), "cost": cost}
    if kind == "gradient":
        cost = str(scored(suite, "gradient", num_prompts).cost)
    else:
        trainer = trainer_for(suite, suite.model(), "full")
        part = next(parts[0] for parts in Rollouts(trainer, num_prompts) if parts)
        trainer.compute_loss(trainer.model, part).backward()
    device = torch.device("cpu")
    return {"peak": peak_bytes(device), "seconds": time.perf_counter() - started, "cost": cost}


if __name__ == "__main__":
    main()
