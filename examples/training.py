"""Shared by the examples: options, the model and its problems, a training run."""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chain_sum import (
    BUNDLED,
    MAX_NEW_TOKENS,
    Problems,
    base_checkpoint,
    problems,
    problems_in,
    reward,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging
from trl import GRPOConfig

from layerrl import LayerMaskedGRPOTrainer
from layerrl.statistics import bootstrap, interval_of


class Setup(NamedTuple):
    """The base, its tokenizer and the problems."""

    base: str
    tokenizer: Any
    data: Problems

    def model(self, **options: Any) -> Any:
        """The base, fresh, in float32 unless the options say otherwise."""
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        options = {"dtype": torch.float32} | options
        return AutoModelForCausalLM.from_pretrained(self.base, **options).to(device)


def parser(description: str, output: str, *, steps: int = 15) -> argparse.ArgumentParser:
    """The options that all examples have."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("--model", default=BUNDLED, help="hub id or path (default: %(default)s)")
    add("--data", type=Path, help='other problems: lines of {"prompt": "...", "answer": 12}')
    add("--steps", type=int, default=steps, help="of each training (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-4, help="of layers (default: %(default)s)")
    add("--tokens", type=int, default=MAX_NEW_TOKENS, help="at most (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, default=Path(output), help="default: %(default)s")
    return made


def letters(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of these characters."""
    known = ["<pad>", "<bos>", "<eos>", "<unk>", *words]
    level = models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    made = Tokenizer(level)
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def small_llama(tokens: PreTrainedTokenizerFast, **settings: Any) -> LlamaForCausalLM:
    """A Llama of 4 layers and width 64, with random weights, for these tokens."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            **settings,
        )
    )


def layers(text: str) -> int | list[int] | str:
    """`10`, `10,12` or a word that select_layers knows."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else numbers


def start(options: argparse.Namespace) -> Setup:
    """Make the output folder; unpack the base and load tokenizer and problems."""
    warnings.filterwarnings("ignore", module="(trl|transformers|torch)")
    logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    base = base_checkpoint(options.model, options.output.parent)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chat = tokenizer.chat_template is not None
    read = options.data and problems_in(options.data, chat=chat)
    return Setup(base, tokenizer, read or problems(options.seed, chat=chat))


def arguments(options: argparse.Namespace, **changes: Any) -> GRPOConfig:
    """TRL's arguments for each run."""
    values = {
        "output_dir": str(options.output / "trainer"),
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": options.tokens,
        "temperature": 0.7,
        "seed": options.seed,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": torch.accelerator.current_accelerator() is None,
        "bf16": has_bf16(),
    }
    return GRPOConfig(**(values | changes))


def has_bf16() -> bool:
    """Whether to train in bfloat16, TRL's default: older CPUs are ten times slower in it."""
    on_cpu = torch.accelerator.current_accelerator() is None
    return not on_cpu or torch.backends.cpu.get_cpu_capability() == "AVX512"


def train(setup: Setup, model: Any, selection: Any, args: GRPOConfig, name: str) -> Any:
    """Train with one progress bar, and return the trainer."""
    trainer = LayerMaskedGRPOTrainer(
        model,
        reward,
        args=args,
        train_dataset=setup.data.train,
        processing_class=setup.tokenizer,
        selection=selection,
        callbacks=[RewardBar(name)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return trainer


class RewardBar(TrainerCallback):
    """A progress bar over the steps, with the mean reward of the last step."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: object) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: object) -> None:
        if logs and "reward" in logs:
            self.bar.set_postfix(reward=f"{logs['reward']:.2f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        self.bar.close()


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def show(scores: dict[str, list[float]], against: str) -> None:
    """Print accuracies and their difference to one of them, with 95 % intervals over problems."""
    draws = bootstrap({name: [row] for name, row in scores.items()})
    width = max(map(len, scores))
    print(f"{len(scores[against])} held-out problems, greedy, one seed")
    print(f"{'':{width}} accuracy  95 %              to {against}  95 %")
    for name, row in scores.items():
        mean, other = (sum(values) / len(values) for values in (row, scores[against]))
        difference = interval_of(draws[name] - draws[against])
        own = f"{interval_of(draws[name], mean):.3f}"
        to = f"{mean - other:+{3 + len(against)}.3f}"
        print(f"{name:{width}} {mean:8.3f}  {own}  {to}  {difference:+.3f}")


def check_settings(options: argparse.Namespace, **more: Any) -> None:
    """Refuse an output folder made with other options (except `--layers`)."""
    path = options.output / "settings.json"
    settings = {
        n: str(v) for n, v in sorted(vars(options).items()) if n not in ("layers", "output")
    } | {n: str(v) for n, v in {"bf16": has_bf16(), **more}.items()}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(
            f"{path} holds other settings: give another --output, or remove the folder"
        )
    write_json(path, settings)
