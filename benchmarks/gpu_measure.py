"""What `gpu.py` measures: a case in, figures out, in a process that serves one after the other.

Models have real shapes and random weights: speed and memory do not ask what weights say.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
import traceback
from contextlib import nullcontext
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from train_step import (
    adapter,
    arguments_of,
    elapsed,
    hardware,
    mark,
    peak_bytes,
    plan_of,
    reset_peak,
    train,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# hidden size, that of the MLP, layers, heads, key-value heads, tied embeddings
SHAPES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, False),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, False),
}
TINY = (32, 64, 4, 4, 2, True)


def serve(pipe: Connection, log: Path) -> None:
    """Measure what comes through the pipe. What libraries print goes to the log."""
    os.setsid()  # what a measurement starts ends with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stream = log.open("a", buffering=1, encoding="utf-8")
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        print(f"\n=== {case}", flush=True)
        try:
            found = globals()[case["kind"]](case)
            found["left_bytes"] = _clean(case["device"])
        except BaseException as error:  # a library may exit: a result as well
            traceback.print_exc()
            found = {"failed": _last_line(error)}
        pipe.send(found)


def _end_with_parent() -> None:
    parent_process().join()
    os.killpg(0, 9)


def _last_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = traceback.format_exception_only(error)
    return f"{' '.join(lines[-1].split())[:400]} ({Path(frame.filename).name}:{frame.lineno})"


def _clean(device: str) -> int:
    """Bytes that a measurement left behind."""
    import torch

    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def machine(case: dict[str, Any]) -> dict[str, Any]:
    """The device's name and memory."""
    import torch

    return {"name": hardware(torch.device(case["device"])), "bytes": memory(case["device"])}


def memory(device: str) -> int:
    """Bytes of the GPU, or of the machine."""
    import psutil
    import torch

    if device == "cpu":
        return psutil.virtual_memory().total
    return torch.cuda.get_device_properties(0).total_memory


def config_of(case: dict[str, Any]) -> Any:
    """A case's model as a config, with another number of layers where it says one."""
    from transformers import Qwen3Config

    hidden, inner, layers, heads, shared, tied = TINY if case["tiny"] else SHAPES[case["shape"]]
    return Qwen3Config(
        vocab_size=64 if case["tiny"] else 151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=case.get("layers") or layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=8 if case["tiny"] else 128,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
    )


def dtype_of(case: dict[str, Any]) -> Any:
    """bfloat16, which few CPUs are fast in."""
    import torch

    return torch.float32 if case["device"] == "cpu" else torch.bfloat16


def made(case: dict[str, Any]) -> Any:
    """A case's model, made where it trains; the same weights each time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(case["device"]):
        return AutoModelForCausalLM.from_config(config_of(case), dtype=dtype_of(case))


def in_four_bits(case: dict[str, Any], quantised: Any) -> Any:
    """The same, its frozen layers quantised as they are loaded."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        made(case).save_pretrained(folder)
        _clean(case["device"])
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype_of(case),
            quantization_config=quantised,
            device_map={"": case["device"]},
        )


def tokenizer_of(case: dict[str, Any]) -> Any:
    """A word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, config_of(case).vocab_size)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def prompt_of(case: dict[str, Any]) -> str:
    """As many tokens as the case says."""
    return " ".join(f"t{2 + i % 50}" for i in range(case["prompt"]))


def planned(case: dict[str, Any]) -> dict[str, Any]:
    """What the cost model says a method holds, without activations, and the cost of its step."""
    from transformers import BitsAndBytesConfig

    from layerrl import select_layers

    config, quantised = config_of(case), None
    layer = int((case["depth"] or 0) * config.num_hidden_layers)
    selection = select_layers(config, "full" if case["method"] == "full" else layer)
    if case["method"] == "masked-4bit":
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype_of(case),
            llm_int8_skip_modules=selection.quantization_skip_modules(config),
        )
    options = {"quantization_config": quantised} if quantised else {}
    plan = plan_of(case, config, selection, dtype=dtype_of(case), **options)
    total = plan.total
    if case["method"] == "by-hand":  # no master copies, and a second model as in full training
        total = plan.weights + 3 * plan.gradients + plan.full.reference
    return {"planned_bytes": total, "planned_step": plan.step, "quantised": quantised}


def step(case: dict[str, Any]) -> dict[str, Any]:
    """Training steps of one method, unless its weights alone are too much for the GPU."""
    import torch

    plan = planned(case)
    quantised = plan.pop("quantised")
    if plan["planned_bytes"] > memory(case["device"]):
        return plan | {"skipped": True}
    settings = {"gradient_checkpointing": case["checkpointing"]}
    settings["gradient_accumulation_steps"] = case.get("accumulate", 1)
    if case.get("continuous"):
        settings["use_transformers_continuous_batching"] = True
        # Room for every completion twice, in blocks of 256 tokens: left alone, it takes nearly all
        # of the memory that is free and leaves none to train in.
        blocks = (
            2 * case["rows"] * case["accumulate"] * -(-(case["prompt"] + case["length"]) // 256)
        )
        config = {"num_blocks": blocks, "max_batch_tokens": 8 * (case["prompt"] + case["length"])}
        settings["transformers_continuous_batching_config"] = config
    # TRL loads its reference by the model's name, and this one has none.
    loader = "trl.trainer.grpo_trainer.create_model_from_path"
    try:
        model = in_four_bits(case, quantised) if quantised else made(case)
        second = case["method"] in ("full", "by-hand") and case["beta"]
        with patch(loader, lambda *_, **__: made(case)) if second else nullcontext():
            found = train(case, model, tokenizer_of(case), prompt=prompt_of(case), **settings)
    except torch.OutOfMemoryError:
        return plan | {"out_of_memory": True}
    return found | plan | {"model_step": plan["planned_step"]}


def generate(case: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of a model as it is served: with merged weights, or an adapter apart."""
    import torch

    device, model = torch.device(case["device"]), made(case).eval()
    middle = model.config.num_hidden_layers // 2
    if case["method"] != "masked":
        from peft import get_peft_model

        model = get_peft_model(model, adapter(case["method"], middle))
    shape = (case["rows"], case["prompt"])
    ids = torch.randint(2, model.config.vocab_size, shape, device=device)
    rates = []
    for _ in range(1 + case["cycles"]):
        begin = mark(device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case["length"],
            min_new_tokens=case["length"],
            do_sample=False,
        )
        rates.append(output[:, case["prompt"] :].numel() / elapsed(begin, mark(device)))
    return {"tokens_per_second": rates[1:], "peak_bytes": peak_bytes(device)}


def generate_vllm(case: dict[str, Any]) -> dict[str, Any]:
    """The same with vLLM."""
    from peft import get_peft_model
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    apart = case["method"] != "masked"
    with tempfile.TemporaryDirectory() as folder:
        model = made(case)
        model.save_pretrained(f"{folder}/model")
        tokenizer_of(case).save_pretrained(f"{folder}/model")
        if apart:
            lora = adapter(case["method"], model.config.num_hidden_layers // 2)
            get_peft_model(model, lora).save_pretrained(f"{folder}/adapter")
        del model
        _clean(case["device"])
        length = case["prompt"] + case["length"]
        options = {"enable_lora": True, "max_lora_rank": 16} if apart else {}
        engine = LLM(f"{folder}/model", max_model_len=length, gpu_memory_utilization=0.6, **options)
        prompts = [{"prompt_token_ids": [*range(2, 2 + case["prompt"])]}] * case["rows"]
        sampling = SamplingParams(max_tokens=case["length"], ignore_eos=True)
        request = LoRARequest("adapter", 1, f"{folder}/adapter") if apart else None
        rates = []
        for _ in range(1 + case["cycles"]):
            started = time.perf_counter()
            engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
            rates.append(case["rows"] * case["length"] / (time.perf_counter() - started))
    return {"tokens_per_second": rates[1:]}


def sync(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes sent to an engine after a step."""
    from layerrl import select_layers

    config = config_of(case)
    plan = select_layers(config, config.num_hidden_layers // 2).plan(config, dtype=dtype_of(case))
    return {"synced_bytes": {one.name: one.sync for one in (plan, plan.lora, plan.full)}}


def suite_of(case: dict[str, Any]) -> Any:
    """The suite that is made on the spot."""
    from suites import Suite

    return Suite(**case["suite"] | {"folder": Path(case["folder"]), "device": case["device"]})


def truth(case: dict[str, Any]) -> dict[str, Any]:
    """The exact sweep of the suite; its own journal continues what was cut off."""
    from fidelity import ceiling
    from probe_fidelity import sweep

    suite = suite_of(case)
    known = suite.accuracy(suite.model().to(case["device"]))
    started = time.perf_counter()
    report = sweep(suite, case["seeds"], Path(case["folder"]) / "sweep")
    (Path(case["folder"]) / "truth.json").write_text(report.to_json(), encoding="utf-8")
    return {
        "known": known,
        "base": report.base.score,
        "full": report.full.score,
        "scores": list(report.scores.values()),
        "noise_ceiling": ceiling(report),
        "sweep_seconds": time.perf_counter() - started,
    }


def probe(case: dict[str, Any]) -> dict[str, Any]:
    """How well a cheaper score of the suite's layers agrees with the sweep's."""
    import probe_fidelity
    from fidelity import fidelity

    from layerrl import ContributionReport, LayerRLError

    if case["tiny"]:
        probe_fidelity.NUM_PROMPTS = 32
    folder = Path(case["folder"])
    kept, started = folder / f"{case['probe']}.json", time.perf_counter()
    if not kept.exists():  # of fewer seeds of the sweep
        try:
            report = probe_fidelity.PROBES[case["probe"]](suite_of(case))
        except LayerRLError as error:
            return {"refused": str(error)}
        kept.write_text(report.to_json(), encoding="utf-8")
        kept.with_suffix(".seconds").write_text(
            str(time.perf_counter() - started), encoding="utf-8"
        )
    seconds = float(kept.with_suffix(".seconds").read_text(encoding="utf-8"))
    exact, report = (
        ContributionReport.from_json(path.read_text(encoding="utf-8"))
        for path in (folder / "truth.json", kept)
    )
    found = fidelity(exact, report)
    figures = ("spearman", "kendall", "beyond_depth", "regret", "top3")
    return {
        "scores": list(report.scores.values()),
        "probe_seconds": seconds,
        "fraction": report.cost.fraction if report.cost else None,
    } | {name: getattr(found, name) for name in figures}


def probe_cost(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory of the gradient probe."""
    import torch
    from datasets import Dataset

    from layerrl import LayerRLError, contribution_probe

    device, model = torch.device(case["device"]), made(case)
    reset_peak(device)
    refused, begin = None, mark(device)
    with tempfile.TemporaryDirectory() as folder:
        accumulate = {"gradient_accumulation_steps": case["accumulate"]}
        try:
            contribution_probe(
                model,
                reward_funcs=odd_tokens,
                train_dataset=Dataset.from_dict({"prompt": [prompt_of(case)] * 64}),
                processing_class=tokenizer_of(case),
                args=arguments_of(case, folder, **accumulate),
                budget=case["budget"],
            )
        except LayerRLError as error:  # random weights may show no signal, at the same cost
            refused = str(error)
    seconds = elapsed(begin, mark(device))
    return {"probe_seconds": seconds, "peak_bytes": peak_bytes(device), "refused": refused}


def odd_tokens(completions: list[str], **_: Any) -> list[float]:
    """Share of tokens with odd numbers: what even random weights can learn."""
    numbers = [[int(word[1:]) for word in text.split() if word[0] == "t"] for text in completions]
    return [sum(n % 2 for n in row) / max(len(row), 1) for row in numbers]
