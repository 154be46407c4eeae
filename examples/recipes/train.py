"""Train chosen layers with GRPO from a YAML file: the script of docs/recipes.md.

    python examples/recipes/train.py --config examples/recipes/vllm_colocate.yaml
    python examples/recipes/train.py --config ... --max_steps 2   # any key, on the command line

A file has the keys of `Recipe` and of TRL's `GRPOConfig`. Data and reward are sums of two numbers,
so that it runs without a download; put your own in their place.
"""

import random
import re
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import AutoConfig, BitsAndBytesConfig
from trl import GRPOConfig, TrlParser

from layerrl import LayerMaskedGRPOTrainer, select_layers


@dataclass
class Recipe:
    """Settings of the trainer that are not in `GRPOConfig`."""

    model: str = field(metadata={"help": "A hub id or a path."})
    layers: str = field(metadata={"help": "10, middle:5, 30%:50%, auto, ..."})
    four_bits: bool = field(default=False, metadata={"help": "Quantise the frozen layers to NF4."})


def sums(number: int) -> Dataset:
    """Prompts that ask for the sum of two two-digit numbers."""
    draw = random.Random(0)
    pairs = [(draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(number)]
    question = "What is {} + {}? Reply with the number only."
    prompts = [[{"role": "user", "content": question.format(a, b)}] for a, b in pairs]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a + b) for a, b in pairs]})


def reward(completions: list, answer: list[str], **_: object) -> list[float]:
    """1 where the last number of a completion is right."""
    numbers = [re.findall(r"\d+", completion[-1]["content"]) for completion in completions]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer, strict=True)]


def quantised(model: str, layers: int | str) -> BitsAndBytesConfig:
    """All layers in 4 bits except the trained ones."""
    config = AutoConfig.from_pretrained(model)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=select_layers(config, layers).quantization_skip_modules(config),
    )


def main() -> None:
    """Train, and save the delta."""
    recipe, args = TrlParser((Recipe, GRPOConfig)).parse_args_and_config()
    layers = int(recipe.layers) if recipe.layers.lstrip("-").isdigit() else recipe.layers
    trainer = LayerMaskedGRPOTrainer(
        recipe.model,
        reward,
        args=args,
        train_dataset=sums(4096),
        quantization_config=quantised(recipe.model, layers) if recipe.four_bits else None,
        selection=layers,
    )
    trainer.train()
    trainer.save_delta(f"{args.output_dir}/delta")


if __name__ == "__main__":
    main()
