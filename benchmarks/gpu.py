"""What layerrl is worth on a GPU, within a time budget: the figures of docs/gpu.md.

    make gpu                                  # the tests that need a GPU, then this
    python benchmarks/gpu.py --budget 600     # seconds; continues where it was stopped
    python benchmarks/gpu.py --report --page docs/gpu.md
    python benchmarks/gpu.py --device cpu --tiny    # that every stage runs

Nothing is downloaded. Stages come in order of importance, each with a share of the budget; what
one leaves is the next one's. A measurement is a line of a journal as soon as it is made, and so is
one that failed: nothing is lost when the time is up. They run in another process, which is replaced
when one fails, leaves memory behind or takes too long. The page is written at the end, and when
this is interrupted. Failures other than those of memory are tried again by the next call.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_measure
from gpu_report import write_page
from train_step import ANY_DEPTH, ROOT, versions

from layerrl.errors import JournalError
from layerrl.journal import Journal

Stage = Generator[dict[str, Any], dict[str, Any], None]
LONGEST = 200  # seconds of one measurement, but for the sweep, which continues
LEFT = 2**28  # bytes that a measurement may leave behind
LEAST = {False: 120, True: 30}  # seconds of budget
RESERVE = 15  # seconds of it for the page
MAIN = {"shape": "Qwen3-1.7B"}
POINTS = [
    MAIN,
    {"shape": "Qwen3-8B"},
    MAIN | {"num_iterations": 4},
    MAIN | {"beta": 0.04},
    {"shape": "Qwen3-8B", "num_iterations": 4},
    MAIN | {"depth": 0.25},
    MAIN | {"depth": 0.75},
    MAIN | {"checkpointing": False},
    {"shape": "Qwen3-8B", "beta": 0.04},
    MAIN | {"beta": 0.04, "num_iterations": 4},
    {"shape": "Qwen3-0.6B"},
]
METHODS = ("masked", "full", "lora-all", "by-hand", "lora", "masked-4bit")
PROBES = (
    "gradient", "gradient norm", "position", "position:0.37", "published", "spectrum", "bypass",
    "weight change",
)  # fmt: skip
SUITE = {
    "name": "mixture-llama",
    "num_layers": 24,
    "hidden": 448,  # 48 million parameters
    "problems": 60_000,
    "pretraining_rate": 5e-4,
    "patience": 150,
    "steps": 16,
    "rows_evaluated": 2048,
}
TINY_SUITE = SUITE | {
    "num_layers": 4,
    "hidden": 16,
    "problems": 600,
    "evaluated": 32,
    "knows": 0.0,
    "steps": 1,
    "rows": 32,
}


class Worker:
    """The process that measures."""

    def __init__(self, output: Path) -> None:
        self.output, self.process = output, None

    def measure(self, case: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The case's figures, or why there are none; None if it takes too long."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            log = self.output / "worker.log"
            process = context.Process(target=gpu_measure.serve, args=(theirs, log))
            process.start()  # a signal may end this here: one that has not begun cannot be stopped
            self.process = process
            theirs.close()  # or its end would never be seen
        try:
            self.pipe.send(case | {"folder": str(self.output / "suite")})
            found = self.pipe.recv() if self.pipe.poll(seconds) else None
        except (EOFError, OSError):
            self.process.join()
            found = {"failed": f"the process ended, exit status {self.process.exitcode}"}
        if found is None or "failed" in found or found.pop("left_bytes") > LEFT:
            self.stop()
        return found

    def stop(self) -> None:
        """End it and what it has started."""
        if self.process is None:
            return
        self.pipe.close()  # which ends one that has nothing to do
        self.process.join(2)
        for kill in (os.killpg, os.kill):  # a group of its own once it has begun
            with suppress(ProcessLookupError):
                kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.process = None


def main(arguments: list[str] | None = None) -> None:
    """Measure until the time is up, then write the page."""
    options = parse(arguments)
    written = True
    if not options.report:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit("stopped; the same command continues"))
        worker = Worker(options.output)
        try:
            measure(options, worker)
        except JournalError as error:
            sys.exit(str(error))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            worker.stop()
            written = report(options, options.output / "gpu.md")
    if options.page:
        written &= report(options, options.page)
    if not written:
        sys.exit(1)


def report(options: argparse.Namespace, page: Path) -> bool:
    """Write the page, or say why not: whether it is written. The journal is whole either way."""
    try:
        write_page(options.output / "journal.jsonl", page)
    except (OSError, ValueError) as error:
        print(f"{page} was not written: {error}. --report writes it from the journal")
        return False
    return True


def measure(options: argparse.Namespace, worker: Worker) -> None:
    """All stages, as far as the budget goes."""
    started = time.monotonic()
    machine = worker.measure({"kind": "machine", "device": options.device}, LONGEST)
    if machine is None or "failed" in machine:
        why = "it does not answer" if machine is None else machine["failed"]
        sys.exit(f"{options.device} cannot be used: {why}")
    # By name, for the sentence that tells what has changed.
    there = dict(one.rsplit(maxsplit=1) for one in versions().split(", "))
    settings = {"machine": machine, "tiny": options.tiny, "versions": there}
    with Journal(options.output, settings) as journal:
        options.room, options.old = machine["bytes"], len(journal.entries)
        shares = [STAGES[name][1] for name in options.stages]
        for number, name in enumerate(options.stages, 1):
            share = sum(shares[:number]) / sum(shares)
            ends = started + share * (options.budget - RESERVE)
            run(name, options, worker, journal, ends)


def run(
    name: str, options: argparse.Namespace, worker: Worker, journal: Journal, ends: float
) -> None:
    """One stage until its time is up. Nothing that happens in it ends the others."""
    found = None
    steps = STAGES[name][0](options)
    try:
        while True:
            case = steps.send(found)
            case |= {"device": options.device, "tiny": options.tiny}
            if (found := known(case, journal, options.old)) is None:
                begun = time.monotonic()
                if begun >= ends:
                    print(f"{name}: its time is up", flush=True)
                    return
                left = max(ends - begun, 5)
                limit = left if case["kind"] == "truth" else min(left, LONGEST)
                found = worker.measure(case, limit)
                if found is None and limit == left:
                    print(f"{name}: its time is up in the middle of {told(case)}", flush=True)
                    return
                found = found or {"failed": f"took more than {limit:.0f} s"}
                seconds = time.monotonic() - begun
                entry = {"stage": name, "case": case, "found": found, "seconds": seconds}
                journal.append(entry)
                print(f"{name}: {told(case)}: {seconds:.0f} s", found.get("failed", ""), flush=True)
    except StopIteration:
        return
    except JournalError:
        raise
    except Exception as error:
        print(f"{name} failed: {error!r}", flush=True)
        journal.append({"stage": name, "case": None, "found": {"failed": repr(error)}})


def told(case: dict[str, Any]) -> str:
    """What tells a case from the others of its stage."""
    names = ("kind", "probe", "seeds", "method", "shape", "layers", "rows", "depth", "beta")
    names += ("num_iterations", "checkpointing", "continuous")
    return ", ".join(f"{name} {case[name]}" for name in names if name in case)


def known(case: dict[str, Any], journal: Journal, old: int) -> dict[str, Any] | None:
    """The journal's figures for a case; what an earlier call failed to measure is not known."""
    for number, entry in reversed([*enumerate(journal.entries)]):
        if entry["case"] == case:
            return entry["found"] if "failed" not in entry["found"] or number >= old else None
    return None


def step(options: argparse.Namespace, method: str, **changes: Any) -> dict[str, Any]:
    """One method's training steps in the default setting, but for the changes."""
    sizes = {"rows": 8, "prompt": 512, "length": 1024, "cycles": 4}
    if options.tiny:
        sizes = {"rows": 4, "prompt": 6, "length": 4, "cycles": 1}
    setting = {"depth": 0.5, "beta": 0.0, "num_iterations": 1, "checkpointing": True}
    case = {"kind": "step", "method": method, "generate": False} | MAIN | sizes | setting | changes
    if case["num_iterations"] > 1:
        case["cycles"] = -(-case["cycles"] // 2)
    return case | ({"depth": None} if method in ANY_DEPTH else {})


def important(options: argparse.Namespace) -> Stage:
    """The settings that matter most."""
    for point in POINTS[: 1 if options.tiny else None]:
        yield from at_point(options, point)


def grid(options: argparse.Namespace) -> Stage:
    """All the others."""
    names = ("checkpointing", "shape", "beta", "num_iterations", "depth")
    axes = ((True, False), [*gpu_measure.SHAPES][:3], (0.0, 0.04), (1, 4), (0.5, 0.25, 0.75))
    if options.tiny:
        axes = ((False,), ["Qwen3-0.6B"], (0.04,), (4,), (0.25,))
    for values in itertools.product(*axes):
        yield from at_point(options, dict(zip(names, values, strict=True)))


def at_point(options: argparse.Namespace, point: dict[str, Any]) -> Stage:
    """Every method in one setting."""
    for method in METHODS:
        if method != "masked-4bit" or find_spec("bitsandbytes"):
            yield step(options, method, **point)


def whole(options: argparse.Namespace) -> Stage:
    """Steps with generation."""
    for continuous in (False, True):
        for method in ("masked", "full", "lora-all")[: 1 if options.tiny and continuous else None]:
            yield step(options, method, **generated(options), generate=True, continuous=continuous)


def generated(options: argparse.Namespace) -> dict[str, Any]:
    """What a whole step is of: completions generated at once, trained on in micro-batches."""
    if options.tiny:
        return {"cycles": 1, "accumulate": 2}
    return {"length": 256, "cycles": 1, "accumulate": 8}


def largest(options: argparse.Namespace) -> Stage:
    """The largest batch beside LoRA's and full training's, the largest model."""
    most = 6 if options.tiny else 10**4
    yield from largest_batches(options, "Qwen3-8B", most)

    def layers(number: int) -> dict[str, Any]:
        return step(options, "masked", shape="Qwen3-32B", layers=number, rows=4, cycles=0)

    totals = []
    for number in (4, 8):
        found = yield layers(number) | {"kind": "planned"}
        totals.append(found["planned_bytes"])
    per_layer = (totals[1] - totals[0]) / 4
    guess = int((0.95 * options.room - totals[0]) / per_layer) + 4
    yield from bisected(layers, 0, max(guess, 1), 1, most)
    if not options.tiny:
        yield from largest_batches(options, "Qwen3-1.7B", most)


def largest_batches(options: argparse.Namespace, shape: str, most: int) -> Stage:
    """The largest batch of one model by every method."""
    for method in ("masked", "lora-all", "full"):

        def rows(number: int, method: str = method) -> dict[str, Any]:
            return step(options, method, shape=shape, rows=number, cycles=0)

        found = yield rows(4)
        if fits(found):
            per_row = max((found["peak_bytes"] - found["held_bytes"]) / 4, 1)
            guess = int((options.room - found["held_bytes"]) / per_row) // 2 * 2
            yield from bisected(rows, 4, max(guess, 6), 2, most)


def fits(found: dict[str, Any]) -> bool:
    """Whether a step was made."""
    return "peak_bytes" in found


def bisected(
    case: Callable[[int], dict[str, Any]], fitting: int, guess: int, unit: int, most: int
) -> Stage:
    """Measure cases around the largest number that fits, to within a sixteenth."""
    number, too_much, stride = min(guess, most), most + unit, max(guess // 4, unit)
    while too_much - fitting > max(unit, fitting // 16):
        found = yield case(number)
        if fits(found):
            fitting = number
        else:
            too_much = number
        middle = (fitting + too_much) // 2
        if too_much > most:  # none was too much yet
            middle = min(fitting + stride, most)
            stride *= 2
        number = max(middle // unit * unit, fitting + unit)


def serving(options: argparse.Namespace) -> Stage:
    """Tokens per second, bytes to sync."""
    for shape in [*gpu_measure.SHAPES][:3]:
        yield {"kind": "sync", "shape": shape}
    sizes = {"rows": 16, "prompt": 128, "length": 128, "cycles": 3}
    if options.tiny:
        sizes = {"rows": 2, "prompt": 6, "length": 4, "cycles": 1}
    for engine in ("generate", "generate_vllm"):
        for method in ("masked", "lora-all", "lora"):
            if engine == "generate" or find_spec("vllm"):
                yield {"kind": engine, "method": method} | MAIN | sizes


def evidence(options: argparse.Namespace) -> Stage:
    """The exact sweep of a suite made on the spot, and every probe against it."""
    suite = TINY_SUITE if options.tiny else SUITE
    for seeds in ([0], [0, 1]):  # the first alone is worth something if there is no more time
        found = yield {"kind": "truth", "suite": suite, "seeds": seeds}
        for probe in PROBES if "failed" not in found else ():
            yield {"kind": "probe", "suite": suite, "seeds": seeds, "probe": probe}


def probing(options: argparse.Namespace) -> Stage:
    """The gradient probe on as many completions as a whole step has."""
    case = step(options, "full", **generated(options)) | {"kind": "probe_cost"}
    budget = 8 if options.tiny else 2 * case["accumulate"]
    yield case | {"budget": budget}


# In order of importance, with its share of the budget.
STAGES: dict[str, tuple[Callable[[argparse.Namespace], Stage], int]] = {
    "step": (important, 34),
    "whole": (whole, 10),
    "largest": (largest, 12),
    "serving": (serving, 6),
    "evidence": (evidence, 30),
    "probe": (probing, 4),
    "grid": (grid, 4),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with everything that can be wrong found before anything is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [options]"
    )
    add = parser.add_argument
    add("--budget", type=float, default=1300, help="seconds for everything (%(default)d)")
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    add("--device", default="cuda", choices=["cpu", "cuda"])
    add("--tiny", action="store_true", help="tiny models: that every stage runs, no figures")
    add("--output", type=Path, default=ROOT / "runs" / "gpu", help="journal, page and pictures")
    add("--page", type=Path, help="write the page and its pictures here, too")
    add("--report", action="store_true", help="write the page of what is there; measure nothing")
    options = parser.parse_args(arguments)
    try:
        for folder in (options.page and options.page.parent, options.output):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot use {error.filename}: {error.strerror}")
    if options.page and options.page.is_dir():
        parser.error(f"--page is {options.page}, a folder: expected a file, such as gpu.md in it")
    if options.report:
        return options
    if not LEAST[options.tiny] <= options.budget < math.inf:
        parser.error(
            f"--budget is {options.budget:g}, expected a number of seconds, at least "
            f"{LEAST[options.tiny]}: no stage can be measured in less"
        )
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device is cuda, but torch finds no GPU on this machine")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or transformers would spread over all
    return options


if __name__ == "__main__":
    main()
