"""Memory of the gradient probe, against one backward through all parameters.

    python benchmarks/probe_cost.py

On SmolLM2-135M adding and subtracting. Both see micro-batches of the completions of one prompt, and
both have generated before; each measurement runs in a process of its own, in turns. *Backward* is a
plain `loss.backward()` that leaves every parameter its gradient.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

KINDS = ("backward", "gradient")


def main() -> None:
    """Measure in turns, report the ratios of each round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64, help="that the probe generates for")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.prompts)))
        return
    ratios, seconds, cost = [], [], ""
    for number in range(options.rounds):
        found = {}
        for kind in KINDS[:: 1 - 2 * (number % 2)]:
            command = [sys.executable, __file__, "--worker", kind, "--prompts", options.prompts]
            ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
            found[kind] = json.loads(ended.stdout.splitlines()[-1])
        ratios.append(found["gradient"]["peak"] / found["backward"]["peak"])
        seconds.append(found["gradient"]["seconds"])
        cost = found["gradient"]["cost"]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"Peak memory of the probe over that of a backward: {middle:.2f} [{low:.2f}, {high:.2f}]")
    print(f"Seconds of the probe: {statistics.median(seconds):.0f}; {cost}")


def measure(kind: str, num_prompts: int) -> dict[str, float | str]:
    """In this process."""
    import torch
    from baselines import trainer_for
    from probe_fidelity import scored
    from suites import SUITES
    from train_step import peak_bytes

    from layerrl.scores.rollouts import Rollouts

    suite = SUITES["smollm2-chain_sum"]
    started, cost = time.perf_counter(), ""
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
