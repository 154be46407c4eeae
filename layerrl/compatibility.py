"""Where the versions of TRL that layerrl works with differ: one function a difference.

Each is deleted, with what calls it for no other reason, when the older way leaves the range.
"""

from __future__ import annotations

import inspect
from typing import Any

from trl import GRPOTrainer

from layerrl.replacing import replaced
from layerrl.seams import installed


def generated_one_each(trainer: Any, prompt_ids: list[list[int]]) -> tuple[Any, Any]:
    """A completion of each prompt, every one with a history of its own.

    Before 1.15, TRL takes it that each prompt is there as often as the trainer generates for it,
    and has vLLM generate for one of them.

    Returns:
        Tokens of the completions, and their log-probabilities if the trainer keeps them.
    """
    generate = trainer._generate_single_turn
    if "num_generations" in inspect.signature(GRPOTrainer._generate_single_turn).parameters:
        return generate(prompt_ids, None, {}, num_generations=1)
    with replaced(trainer, num_generations=1, num_generations_eval=1):
        return generate(prompt_ids, None, {})


def windows_of_tokens(trainer: Any) -> float:
    """Return what a loss by token (DAPO's) divides a batch's tokens by, before it divides by them.

    Since 1.10, TRL takes the share of a generation batch that one optimizer step is for.
    """
    if installed("trl") < (1, 10):
        return 1.0
    return trainer.args.steps_per_generation / trainer.current_gradient_accumulation_steps


def end_tokens(trainer: Any) -> list[int]:
    """The tokens that end a completion: before 1.15, TRL knows the tokenizer's alone."""
    if hasattr(trainer, "eos_token_ids"):
        return trainer.eos_token_ids
    return [trainer._tokenizer.eos_token_id]
