"""A trainer, reward and data for axolotl (docs/recipes.md): GRPO on layer 10.

PYTHONPATH=examples/recipes axolotl train examples/recipes/axolotl.yaml
"""

import re

from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer

from layerrl import LayerMaskedMixin


class Layer10(LayerMaskedMixin, AxolotlGRPOTrainer):
    """axolotl's GRPO trainer, training layer 10 only."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, selection=10, **kwargs)


def reward(completions: list, answer: list[str], **_: object) -> list[float]:
    """1 where the last number of a completion is right."""
    numbers = [re.findall(r"-?[\d,]+", completion[-1]["content"]) for completion in completions]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer, strict=True)]


def prompts(cfg: object, *args: object, **kwargs: object) -> tuple:
    """GSM8K rows as prompts with answers, in the form that axolotl expects of a transformation."""

    def transform(row: dict, tokenizer: object = None) -> dict:
        answer = row["answer"].rpartition("#### ")[2]
        return {"prompt": [{"role": "user", "content": row["question"]}], "answer": answer}

    return transform, {"remove_columns": ["question"]}
