"""What a training step costs: plain TRL, TRL frozen by hand, PEFT and layerrl on the same rollouts.

    make bench                                          # middle layer, beta 0.04
    make bench ARGS="--depth 0.25 0.5 0.75 --beta 0 0.04 --generate --docs docs"

TRL's own loop with its default settings. Completions are given, the same to every method: what is
timed is the reference pass, the old log-probabilities and the policy passes with their optimizer
steps. With `--generate`, whole steps with real generation are timed after that. Every measurement
runs in a process of its own, so that its peak memory is its own, and the methods take turns in a
shuffled order, so that a slow minute of the machine hits all of them; an idle machine is better
still. Finished measurements are lines of a journal; the same command continues where it was
stopped, unless a library or layerrl itself has changed since.

Ratios compare measurements of the same round; their spread is over rounds. "To the cost
model" divides the time relative to full parameters by what `LayerSelection.plan` says of it.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step_report import BENCH, GAP, MODEL, describe, fill, tables, tabulate, write

MASKED = ("masked", "masked-lora", "masked-4bit")
WHOLE_MODEL = ("full", "masked-full")
ANY_DEPTH = (*WHOLE_MODEL, "lora-all")  # the same at every depth, so measured once a round
SCORED = "_generate_and_score_completions"
PROMPT = "What is 12 plus 30, and why? " * 4
ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> None:
    """Measure what the journal does not hold yet, then report."""
    options = parse(arguments)
    if options.worker:
        print(json.dumps(measure(json.loads(options.worker))))
        return
    entries = run_missing(list(cases(options)), options.output / "train_step.jsonl")
    rows = tabulate(entries)
    text = describe(options, entries) + "\n\n" + tables(rows)
    print("\n" + text)
    write(rows, options.output)
    if options.docs:
        write(rows, options.docs)
        fill(options.docs / "appendix.md", text)


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything to measure, in turns: each round of a setting has its own fixed order."""
    shared = {name: getattr(options, name) for name in ("rows", "length", "cycles", "generate")}
    shared |= {"device": options.device, "model": base(options.model), "versions": versions()}
    turns = itertools.product(range(options.rounds), options.beta, options.num_iterations)
    for turn, beta, num_iterations in turns:
        group = [(method, None) for method in options.methods if method in ANY_DEPTH]
        others = [method for method in options.methods if method not in ANY_DEPTH]
        group += itertools.product(others, options.depth)
        random.Random(f"{turn} {beta} {num_iterations}").shuffle(group)
        for method, depth in group:
            setting = {"beta": beta, "num_iterations": num_iterations, "round": turn}
            yield {"method": method, "depth": depth} | setting | shared


def versions() -> str:
    """What is measured: the libraries, and layerrl by its files."""
    files = sorted((ROOT / "layerrl").rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft")]
    return ", ".join([*libraries, f"layerrl sources {digest}"])


def run_missing(wanted: list[dict[str, Any]], journal: Path) -> list[dict[str, Any]]:
    """The journal's entry for each case, measured now where it has none."""
    done = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]

    def find(case: dict[str, Any]) -> dict[str, Any] | None:
        return next((entry for entry in done if case.items() <= entry.items()), None)

    one_gpu = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ  # or transformers would spread over all
    for number, case in enumerate(wanted, 1):
        if find(case):
            continue
        print(f"{number}/{len(wanted)}", {key: case[key] for key in list(case)[:5]}, flush=True)
        command = [sys.executable, __file__, "--worker", json.dumps(case)]
        started = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=one_gpu)
        if ended.returncode:
            raise SystemExit(f"{case} failed:\n{ended.stderr}")
        entry = case | json.loads(ended.stdout.splitlines()[-1])
        entry["process_seconds"] = time.perf_counter() - started
        done.append(entry)
        with journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
    return [entry for entry in map(find, wanted) if entry]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One method in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    found = train(case, model.to(case["device"]), AutoTokenizer.from_pretrained(case["model"]))
    return found | {"seconds": statistics.mean(found["cycle_seconds"])}


def train(
    case: dict[str, Any], model: Any, tokenizer: Any, *, prompt: str = PROMPT, **settings: Any
) -> dict[str, Any]:
    """Train by one method: seconds of steps, and bytes in memory, on disk and to sync.

    A model that is on no disk is told by `settings`, more of the trainer's arguments: nothing of
    it is saved. With `case["generate"]`, steps with real generation follow those with given
    completions; `case["cycles"]` of 0 is one step that no time is told of.
    """
    import torch
    from transformers import TrainerCallback

    from layerrl import select_layers
    from layerrl.blocks import find_blocks, plain_name, with_fused_siblings

    device = torch.device(case["device"])
    layer = int((case["depth"] or 0) * len(find_blocks(model).modules))
    selection = select_layers(model, "full" if case["method"] in WHOLE_MODEL else layer)
    synced = {plain_name(name): p.nbytes for name, p in model.named_parameters()}
    if case["method"] in MASKED:
        sent = with_fused_siblings(synced, selection.parameters(model))
        synced = {name: synced[name] for name in sent}
    model_step = plan_of(case, model, selection).step

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.steps: list[tuple[Any, Any]] = []
            self.parts: dict[str, list[tuple[Any, Any]]] = {"_generate": [], SCORED: []}

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = mark(device)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append((self.begin, mark(device)))

        def cycles(self) -> list[float]:
            """Seconds of a step, mean of each cycle; the first warms up."""
            size = case["num_iterations"]
            seconds = [elapsed(*step) for step in self.steps[size:]]
            return [statistics.mean(seconds[i : i + size]) for i in range(0, len(seconds), size)]

        def of_a_step(self, part: str) -> float | None:
            """Mean seconds of a part of a step; the first call warms up."""
            calls = [elapsed(*call) for call in self.parts[part][1:]]
            return sum(calls) / len(calls) / case["num_iterations"] if calls else None

        def watch(self, trainer: Any, part: str) -> None:
            function = getattr(trainer, part)

            def timed(*args: Any, **kwargs: Any) -> Any:
                begin = mark(device)
                returned = function(*args, **kwargs)
                self.parts[part].append((begin, mark(device)))
                return returned

            setattr(trainer, part, timed)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"tokenizer": tokenizer, "prompt": prompt, "settings": settings}
        arguments |= {"callbacks": [clock], "output_dir": folder}
        trainer = make_trainer(case, model, selection, **arguments)
        loading_peak, held = peak_bytes(device), held_bytes(device)
        reset_peak(device)
        trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
        found = {
            "cycle_seconds": clock.cycles(),
            "step_seconds": None,
            "model_step": model_step,
            "peak_bytes": peak_bytes(device),  # before saving, which is no part of training
            "loading_peak_bytes": loading_peak,
            "held_bytes": held,
            "synced_bytes": sum(synced.values()),
            "trained_bytes": trained,
            "checkpoint_bytes": None,
        }
        if not settings:
            trainer._save_checkpoint(trainer.model, None)
            [checkpoint] = Path(folder).glob("checkpoint-*")
            files = [*checkpoint.rglob("*.safetensors"), checkpoint / "optimizer.pt"]
            found["checkpoint_bytes"] = sum(file.stat().st_size for file in files)
        if case["generate"]:
            trainer.rollout_func = None
            for part in clock.parts:
                clock.watch(trainer, part)
            reset_peak(device)
            trainer.train()
            found["step_seconds"] = statistics.mean(clock.cycles())
            found["generation_seconds"] = clock.of_a_step("_generate")
            found["rollout_seconds"] = clock.of_a_step(SCORED)
            found["step_peak_bytes"] = peak_bytes(device)
    return found | {"hardware": hardware(device)}


def plan_of(case: dict[str, Any], model: Any, selection: Any, **options: Any) -> Any:
    """The plan of what a method trains, of a model or a config."""
    from layerrl import select_layers

    if case["method"] == "lora-all":
        selection = select_layers(model, "all")
    options |= {"beta": case["beta"], "num_iterations": case["num_iterations"]}
    plan = selection.plan(model, **options)
    if case["method"] == "masked-lora":
        return plan.lora_masked
    return plan.lora if case["method"].startswith("lora") else plan


def make_trainer(
    case: dict[str, Any],
    model: Any,
    selection: Any,
    *,
    tokenizer: Any,
    prompt: str,
    callbacks: list[Any],
    output_dir: str,
    settings: dict[str, Any],
) -> Any:
    """The method's trainer: TRL's defaults, and completions that are given."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from trl import GRPOTrainer

    from layerrl import LayerMaskedGRPOTrainer

    method, length = case["method"], case["length"]
    vocabulary = model.config.get_text_config().vocab_size

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(trainer.state.global_step)
        shape = (len(prompts), length)
        ids = torch.randint(vocabulary // 8, vocabulary, shape, generator=draws).tolist()
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    arguments: dict[str, Any] = {
        "args": arguments_of(case, output_dir, **settings),
        "train_dataset": Dataset.from_dict({"prompt": [prompt] * 64}),
        "processing_class": tokenizer,
        "rollout_func": rollouts,
        "callbacks": callbacks,
    }
    if method in ("lora", "lora-all", "masked-lora", "modules-to-save"):
        arguments["peft_config"] = adapter(method, selection.first)
    if method in ("masked-full", *MASKED):
        return LayerMaskedGRPOTrainer(model, reward, selection=selection, **arguments)
    if method == "by-hand":
        trained = {id(p) for p in selection.parameters(model).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    return GRPOTrainer(model, reward, **arguments)


def arguments_of(case: dict[str, Any], output_dir: str, **settings: Any) -> Any:
    """TRL's defaults, but for what the case says."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=case["rows"],
        num_generations=case["rows"] // 2,
        max_completion_length=case["length"],
        generation_kwargs={"min_new_tokens": case["length"]},
        beta=case["beta"],
        num_iterations=case["num_iterations"],
        max_steps=(1 + case["cycles"]) * case["num_iterations"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=case["device"] == "cpu",
        bf16=case["device"] != "cpu",  # TRL's default; few CPUs are faster in it
        **settings,
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """What differs between completions, and says nothing."""
    return [float(len(text) % 7) for text in completions]


def adapter(method: str, layer: int) -> Any:
    """LoRA on one layer or on all, or one layer trained whole by way of PEFT, with no LoRA."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    if method == "modules-to-save":
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=[f"layers.{layer}"])
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if method in ("lora-all", "masked-lora"):  # which the selection restricts
        return LoraConfig(r=16, target_modules=names)
    return LoraConfig(
        r=16, target_modules=names, layers_to_transform=[layer], layers_pattern="layers"
    )


def mark(device: Any) -> Any:
    """A point in time: an event in the GPU's queue, or the clock's seconds."""
    import torch

    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(begin: Any, end: Any) -> float:
    """Seconds between two marks."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def held_bytes(device: Any) -> int:
    """Memory held now: the allocator's on a GPU, resident on a CPU."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_bytes(device: Any) -> int:
    """Most memory held so far: the allocator's on a GPU, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: Any) -> None:
    """Let the peak begin anew; on a CPU it is the process's."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def hardware(device: Any) -> str:
    """What the steps ran on."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def base(model: str) -> str:
    """The bundled model's folder, or whatever id or path was given."""
    sys.path.insert(0, str(ROOT / "examples"))
    from chain_sum import base_checkpoint

    return base_checkpoint(model, ROOT / "runs")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with everything that can be wrong found before anything is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [options]"
    )
    add = parser.add_argument
    add("--model", default=MODEL, help="hub id or path, of a Llama or alike")
    add("--methods", nargs="+", default=BENCH, choices=BENCH)
    add("--depth", nargs="+", type=float, default=[0.5], help="of the layer, 0 to below 1")
    add("--beta", nargs="+", type=float, default=[0.04])
    add("--num-iterations", nargs="+", type=int, default=[1, 4])
    add("--rounds", type=int, default=3, help="measurements of everything")
    add("--cycles", type=int, default=1, help="timed generation batches, after one to warm up")
    add("--rows", type=int, default=16, help="completions of a batch, of two prompts")
    add("--length", type=int, default=32, help="tokens of a completion")
    add("--generate", action="store_true", help="time whole steps with real generation too")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--output", type=Path, default=ROOT / "runs" / "bench", help="journal and report")
    add("--docs", type=Path, help="folder whose appendix.md and pictures get the report too")
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, least in {"num_iterations": 1, "rounds": 1, "cycles": 1, "length": 1}.items():
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < least:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least {least}")
    if not all(0 <= depth < 1 for depth in options.depth):
        parser.error(f"--depth is {options.depth}, expected 0 (the lowest layer) to below 1")
    if not all(0 <= beta < math.inf for beta in options.beta):
        parser.error(f"--beta is {options.beta}, expected numbers from 0 up")
    if options.rows < 4 or options.rows % 2:
        parser.error(f"--rows is {options.rows}, expected an even number from 4 up")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device is cuda, but torch finds no GPU on this machine")
    if options.worker:
        return options
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "train_step.jsonl").touch()
        page = (
            (options.docs / "appendix.md").read_text(encoding="utf-8")
            if options.docs
            else "".join(GAP)
        )
    except OSError as error:
        parser.error(f"cannot use {error.filename}: {error.strerror}")
    if not all(part in page for part in GAP):
        parser.error(
            f"{options.docs / 'appendix.md'} has no place for the report: {' … '.join(GAP)}"
        )
    return options


if __name__ == "__main__":
    main()
