"""A GRPO run small enough for a test: real generation, real rewards, real steps, no download."""

import gc
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from layerrl import LayerMaskedGRPOTrainer
from tests.devices import DEVICE

# Tensors this small only wait for a second thread, most of all where tests share the cores.
torch.set_num_threads(1)
# accelerate collects garbage whenever a training starts. Looking through all that was imported
# would be half of these trainings' time.
gc.collect()
gc.freeze()

_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]  # the ids that tests/models.py gives its models
_LETTERS = [chr(ord("0") + i) for i in range(64 - len(_SPECIAL))]
PROMPTS = ["abc", "defg", "hi", "jklm"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    ids = {token: i for i, token in enumerate(_SPECIAL + _LETTERS)}
    characters = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Differs between the completions of any group, so that gradients are not zero."""
    return [float(sum(map(ord, text)) % 17) for text in completions]


# Of any trainer: logged step by step, learning fast enough to see.
QUIETLY = {
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": DEVICE.type == "cpu",
    "bf16": False,
    "disable_tqdm": True,
}


def config(output_dir: Any, *, kind: type = GRPOConfig, **changes: Any) -> Any:
    """Three steps of eight completions."""
    values = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        **QUIETLY,
    }
    return kind(output_dir=str(output_dir), **(values | changes))


def make(
    model: PreTrainedModel | str,
    output_dir: Any,
    *,
    selection: Any = None,
    trainer: type | None = None,
    arguments: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer for a tiny model: layerrl's if there is a `selection`, otherwise plain TRL's.

    Further keywords change the `GRPOConfig`, or its `kind`; `arguments` are the trainer's own.
    """
    values = {
        "reward_funcs": reward,
        "args": config(output_dir, **changes),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS * 4}),
        "processing_class": tokenizer(),
    }
    if selection is not None:
        values["selection"] = selection
    default = GRPOTrainer if selection is None else LayerMaskedGRPOTrainer
    return (trainer or default)(model, **(values | (arguments or {})))
