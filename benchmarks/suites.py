"""What probes are judged on: a base, a task, the arguments of its trainings.

    python benchmarks/suites.py addition-llama     # say what its base knows

The small bases were trained here from scratch until they half-knew a task, a few minutes each, and
are kept in `benchmarks/bases`: another machine, or another number of threads, rounds differently
and ends with another base. The same call makes one where the folder is missing, for a truth of
its own.
"""

import argparse
import importlib
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from layerrl.blocks import find_blocks, replaced_forwards

BASES = Path(__file__).parent / "bases"
FOLDER = Path("runs/suites")
NUM_LAYERS, HIDDEN = 12, 64
_SPECIAL = ["<pad>", "<eos>"]
_CHARACTERS = "0123456789+=>"


def addition(draw: random.Random) -> tuple[str, str]:
    """Two numbers of three digits, and the sums of their digits without carrying."""
    a, b = ([draw.randrange(10) for _ in range(3)] for _ in range(2))
    total = ((x + y) % 10 for x, y in zip(a, b, strict=True))
    return "{}{}{}+{}{}{}=".format(*a, *b), "".join(map(str, total))


def sorting(draw: random.Random) -> tuple[str, str]:
    """Five digits, and the same in order."""
    digits = [draw.choice("0123456789") for _ in range(5)]
    return "".join(digits) + ">", "".join(sorted(digits))


def ordering(draw: random.Random) -> tuple[str, str]:
    """Four digits, and the same in order."""
    digits = [draw.choice("0123456789") for _ in range(4)]
    return "".join(digits) + ">", "".join(sorted(digits))


def descending(draw: random.Random) -> tuple[str, str]:
    """Four digits, and the same from the largest on."""
    prompt, answer = ordering(draw)
    return prompt, answer[::-1]


def mixture(draw: random.Random) -> tuple[str, str]:
    """One of the others."""
    return draw.choice([addition, sorting])(draw)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "addition": addition,
    "sorting": sorting,
    "ordering": ordering,
    "descending": descending,
    "mixture": mixture,
}


@dataclass(frozen=True)
class Suite:
    """One base and one task."""

    name: str
    greedy = False
    knows: float = 0.2
    """Share of right answers, sampled, at which pre-training ends."""
    steps: int = 40
    learning_rate: float = 3e-4
    full_learning_rate: float = 1e-4
    evaluated: int = 512
    layers = "all"
    num_layers: int = NUM_LAYERS
    hidden: int = HIDDEN
    problems: int = 4000
    """Distinct ones, those to evaluate on among them."""
    pretraining_rate: float = 1e-3
    patience: float = math.inf
    """Seconds of pre-training after which what the base knows must do."""
    layer_dropout: float = 0.0
    """Chance of each layer to be left out of a step of pre-training."""
    rows: int = 256
    """Completions of a step."""
    rows_evaluated: int = 256
    """Completions at once in evaluations."""
    folder: Path = BASES
    device: str = "cpu"

    @property
    def task(self) -> Callable[[random.Random], tuple[str, str]]:
        """Draws a problem and its answer."""
        return TASKS[self.name.partition("-")[0]]

    @cached_property
    def data(self) -> tuple[Dataset, Dataset]:
        """Problems to train on, and others to evaluate on."""
        draw, rows = random.Random(0), {}
        while len(rows) < self.problems:
            prompt, answer = self.task(draw)
            rows[prompt] = {"prompt": prompt, "answer": answer}
        listed = list(rows.values())
        held_out, train = listed[: self.evaluated], listed[self.evaluated :]
        return Dataset.from_list(train), Dataset.from_list(held_out)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character."""
        ids = {token: i for i, token in enumerate([*_SPECIAL, *_CHARACTERS])}
        made = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left"
        )

    def model(self) -> Any:
        """The base, pre-trained where it is not kept."""
        folder = self.folder / self.name
        if not folder.exists():
            model = self._pretrained().to(torch.bfloat16)  # half as large to keep
            unfinished = folder.with_name(folder.name + ".partial")
            model.save_pretrained(unfinished)
            unfinished.rename(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def args(self, *, full: bool = False) -> GRPOConfig:
        """Of a training."""
        return GRPOConfig(
            output_dir=str(FOLDER / "trainer"),
            max_steps=self.steps,
            learning_rate=self.full_learning_rate if full else self.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=self.rows,
            num_generations=8,
            num_generations_eval=4,
            max_completion_length=max(map(len, self.data[1]["answer"])) + 1,
            temperature=1.0,
            bf16=False,
            use_cpu=self.device == "cpu",
            gradient_checkpointing=False,
            eval_strategy="steps",
            eval_steps=max(self.steps // 4, 1),
            per_device_eval_batch_size=self.rows_evaluated,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def reward(self, completions: list[str], answer: list[str], **_: object) -> list[float]:
        """Share of the answer's characters that are right, in their places."""
        texts = (text.replace(" ", "") for text in completions)
        return [
            sum(a == b for a, b in zip(text, right, strict=False)) / max(len(text), len(right))
            for text, right in zip(texts, answer, strict=True)
        ]

    def _pretrained(self) -> Any:
        """Trained on its own problems, never the held-out ones, until it half-knows them."""
        architecture = self.name.split("-")[1]
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            architecture,
            vocab_size=len(_SPECIAL) + len(_CHARACTERS),
            hidden_size=self.hidden,
            num_hidden_layers=self.num_layers,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            **{
                "llama": {"intermediate_size": 2 * self.hidden, "num_key_value_heads": 4},
                "gpt_neox": {"intermediate_size": 4 * self.hidden},
                "mixtral": {
                    "intermediate_size": self.hidden // 2,
                    "num_key_value_heads": 4,
                    "num_local_experts": 4,
                },
            }[architecture],
        )
        model = AutoModelForCausalLM.from_config(config).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.pretraining_rate)
        train, _ = self.data
        prompts, answers = train["prompt"], train["answer"]
        # A token per character, and as many of them in each row: prompt, answer, end.
        texts = [prompt + answer + "<eos>" for prompt, answer in zip(prompts, answers, strict=True)]
        ids = self.tokenizer(texts, return_tensors="pt")["input_ids"].to(self.device)
        asked = torch.tensor([*map(len, prompts)], device=self.device)
        first = int(asked.min())
        labels = ids.masked_fill(
            torch.arange(ids.size(1), device=self.device) < asked[:, None], -100
        )
        draw, dropout = torch.Generator().manual_seed(0), random.Random(0)
        blocks = find_blocks(model).modules
        known, step, started = 0.0, 0, time.monotonic()
        while known < self.knows and time.monotonic() - started < self.patience:
            batch = torch.randint(len(ids), (256,), generator=draw)
            rate = self.pretraining_rate * min(1.0, (step + 1) / 100)
            optimizer.param_groups[0]["lr"] = rate
            left_out = [block for block in blocks if dropout.random() < self.layer_dropout]
            with replaced_forwards(left_out, lambda _, __: lambda hidden, *a, **k: hidden):
                logits = model(input_ids=ids[batch]).logits[:, first - 1 : -1]
            loss = cross_entropy(logits.mT, labels[batch, first:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0:
                known = self.accuracy(model)
                print(f"{self.name}: step {step}, loss {loss:.3f}, sampled accuracy {known:.3f}")
            if step == 10_000:
                raise SystemExit(f"{self.name}: {known:.3f} after {step} steps, not {self.knows}")
        return model

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """Share of right answers to 512 training problems, one sample each."""
        train, _ = self.data
        rows = train.select(range(min(512, len(train))))
        inputs = self.tokenizer(list(rows["prompt"]), return_tensors="pt", padding=True)
        inputs = inputs.to(model.device)
        length = self.args().max_completion_length
        model.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=length,
                do_sample=True,
                top_k=0,
            )
        model.train()
        texts = self.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        rewards = self.reward(texts, rows["answer"])
        return math.fsum(reward == 1 for reward in rewards) / len(rows)


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct adding and subtracting, as in the examples."""

    name: str = "smollm2-chain_sum"
    greedy = True
    layers: Any = "all"
    steps: int = 16

    @cached_property
    def _setup(self) -> Any:
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        training = importlib.import_module("training")
        options = training.parser("", str(FOLDER / self.name), steps=self.steps).parse_args([])
        options.tokens, options.seeds = 8, [0]
        return training, options, training.start(options)

    @property
    def data(self) -> tuple[Dataset, Dataset]:
        """Problems to train on, and others to evaluate on."""
        _, _, setup = self._setup
        return setup.data.train, importlib.import_module("chain_sum").distinct(setup.data.held_out)

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        return self._setup[2].tokenizer

    @property
    def reward(self) -> Any:
        """1 where the last integer of the completion is the answer."""
        _ = self._setup
        return importlib.import_module("chain_sum").reward

    def model(self) -> Any:
        """The base, fresh."""
        return self._setup[2].model()

    def args(self, *, full: bool = False) -> GRPOConfig:
        """Of a training."""
        training, options, _ = self._setup
        rate = {"learning_rate": 3e-5} if full else {}
        along = {"eval_strategy": "steps", "eval_steps": self.steps // 4}
        return training.arguments(options, **along, **rate)


class Multiplying(SmolLM2):
    """The same model on reasoning-gym's `products` of two digits, of which there are 100.

    Its truth has eight of the layers: two seeds of all would take five hours.
    """

    def __init__(self) -> None:
        super().__init__("smollm2-products", layers=[0, 3, 9, 15, 21, 24, 27, 29], steps=8)

    @cached_property
    def data(self) -> tuple[Dataset, Dataset]:
        """Half of the problems to train on, the others to evaluate on."""
        import reasoning_gym

        drawn = reasoning_gym.create_dataset(
            "products", seed=0, size=2000, min_terms=2, max_terms=2, min_digits=1, max_digits=1
        )
        answers = {item["metadata"]["expression"]: item["answer"] for item in drawn}
        asked = sorted(answers)
        random.Random(0).shuffle(asked)
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{text} = Reply with the number only."}],
                "answer": answers[text],
            }
            for text in asked
        ]
        return Dataset.from_list(rows[50:]), Dataset.from_list(rows[:50])


# The fourth, addition-gpt_neox, knows nothing after 550 steps of pre-training.
SMALL = [Suite(name) for name in ("addition-llama", "sorting-llama", "sorting-gpt_neox")]
SUITES: dict[str, Suite | SmolLM2] = {
    suite.name: suite for suite in (*SMALL, SmolLM2(), Multiplying())
}


def main() -> None:
    """Make a small suite's base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=[suite.name for suite in SMALL])
    [suite] = (s for s in SMALL if s.name == parser.parse_args().suite)
    print(f"{suite.name}: sampled accuracy {suite.accuracy(suite.model()):.3f}")


if __name__ == "__main__":
    main()
