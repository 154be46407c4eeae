"""Digests and names of a run's arguments, data and rewards: the same for equal runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import nn

from layerrl.digests import json_digest

if TYPE_CHECKING:
    from datasets import Dataset

# What says where and how loudly a run happens, not what it computes.
_NOT_SETTINGS = (
    *("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "seed", "data_seed"),
    *("logging_steps", "logging_strategy", "save_strategy", "save_steps", "save_total_limit"),
    *("push_to_hub", "hub_model_id", "hub_token", "eval_strategy", "eval_steps"),
    *("load_best_model_at_end", "save_only_model", "logging_first_step", "log_level"),
    *("log_level_replica", "log_completions", "num_completions_to_print", "log_multimodal"),
)


def settings_of(args: Any) -> dict[str, Any]:
    """The arguments of a trainer that change the result of a run."""
    shown = args.to_dict()
    return {name: value for name, value in shown.items() if name not in _NOT_SETTINGS}


def digest(*values: Any) -> str:
    """A digest of JSON values in 16 digits; what JSON does not know counts as its text."""
    return json_digest(*values)[:16]


def digest_of_rows(dataset: Dataset) -> str:
    """Number of rows and digest of a data set; images and files count as they are stored."""
    return f"{len(dataset)} rows {digest(*stored_rows(dataset))}"


def stored_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Rows as they are stored: images and other files are not decoded."""
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        yield from batch.to_pylist()  # pyright: ignore[reportAttributeAccessIssue]


def name_of(function: Any) -> str:
    """The name of a reward: a function's or a class's, or the id of a reward model."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, str):
        return function
    return getattr(function, "__name__", type(function).__name__)


def identity_of(function: Any) -> str:
    """A name that changes with what a function does, as far as its own text says so."""
    if isinstance(function, partial):
        given = digest(function.args, function.keywords)
        return f"{identity_of(function.func)} with {given}"
    if isinstance(function, nn.Module):
        return f"{name_of(function)} {getattr(function, 'name_or_path', '')}".strip()
    if isinstance(function, type):
        return name_of(function)
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return name_of(function)
    code = getattr(function, "__code__", None)
    # Several lambdas on one line have one source.
    own = _instructions(code) if code is not None and code.co_name == "<lambda>" else None
    return f"{name_of(function)} {digest(text, own)}"


def _instructions(code: CodeType) -> list[Any]:
    constants = [_instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def identity_of_tokens(processing_class: Any) -> str:
    """A name that changes with how texts become tokens."""
    if processing_class is None:
        return "the model's own"
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    template = getattr(processing_class, "chat_template", None)
    return f"{type(processing_class).__name__} of {tokens} tokens {digest(template)}"
