"""Digests and names of a run's arguments, data and rewards: the same for equal runs."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache, partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerrl.checks import plain, shown
from layerrl.digests import json_digest
from layerrl.errors import ProbeError
from layerrl.scores.canonical import beside_code, canonical, instructions, stored_rows
from layerrl.stored import parsed

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


def settings_of(args: Any, name: str = "args") -> dict[str, Any]:
    """Return the arguments of a trainer that change the result of a run, as JSON has them.

    `name` is what the caller names them; a `ProbeError` for a value that JSON lacks.
    """
    given = args.to_dict()
    return {n: _json_of(f"{name}.{n}", v) for n, v in given.items() if n not in _NOT_SETTINGS}


def _json_of(name: str, value: Any) -> Any:
    try:
        text = json.dumps([[[[value]]]], default=_known)  # as deep as in a journal or a report
        return parsed(text)[0][0][0][0]
    except (TypeError, ValueError, RecursionError) as error:
        raise ProbeError(
            f"{name} is {shown(value)}, expected numbers, text, lists and dicts of them, as JSON "
            "has: they tell runs with these arguments from others"
        ) from error


def _known(value: Any) -> Any:
    """The JSON value for an enum, a path, or a number of torch or numpy; a TypeError for others."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    own = plain(value)
    if own is value:
        raise TypeError(value)
    return own


def digest(*values: Any) -> str:
    """A digest of JSON values in 16 digits; what JSON does not know counts as its text."""
    return json_digest(*values)[:16]


def digest_of_rows(dataset: Dataset) -> str:
    """Number of rows and digest of a data set; images and files count as they are stored."""
    return f"{len(dataset)} rows {digest(*stored_rows(dataset))}"


def name_of(function: Any) -> str:
    """The name of a reward: a function's or a class's, or the id of a reward model."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, str):
        return function
    return getattr(function, "__name__", type(function).__name__)


def identity_of(function: Any) -> str:
    """Return a reward's name with a digest of its code, settings and attributes.

    Globals, files and servers that it reads do not count. For rewards that change when they are
    called, see `known_afterwards`.
    """
    if id(function) in _IN_RUN:
        return _IN_RUN[id(function)]
    now = _identity(function)
    return _FOUND.get(now, now)


_FUNCTIONS = FunctionType, type(lru_cache(name_of))
_IN_RUN: dict[int, str] = {}
"""Identities of the functions of a run, by their ids, while it lasts."""
_FOUND: dict[str, str] = {}
"""Identities that functions had before a run, by those that it left them with."""


@contextmanager
def known_afterwards(functions: Iterable[Any]) -> Iterator[None]:
    """Inside, functions keep their identity; a later run in this process knows them by it, too.

    So a reward may count its calls or keep answers. A model has the identity of its weights, which
    take long to read and do not change.
    """
    before = {id(function): (function, identity_of(function)) for function in functions}
    _IN_RUN.update({key: identity for key, (_, identity) in before.items()})
    try:
        yield
    finally:
        for key, (function, identity) in before.items():
            _IN_RUN.pop(key, None)  # of two runs at once, the first to end
            _FOUND.setdefault(identity, identity)
            if not isinstance(function, nn.Module):
                _FOUND.setdefault(_identity(function), identity)


def _identity(function: Any) -> str:
    if isinstance(function, partial):
        given = digest(canonical(function.args), canonical(function.keywords))
        return f"{_identity(function.func)} with {given}"
    name = name_of(function)
    if isinstance(function, str):
        return name
    if isinstance(function, nn.Module):
        name = f"{name} {getattr(function, 'name_or_path', '')}".strip()
        return f"{name} {digest(canonical(function))}"
    if isinstance(function, type) and function.__module__.partition(".")[0] == "layerrl":
        return name
    try:
        if not isinstance(function, _FUNCTIONS):
            raise TypeError
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return f"{name} with {digest(canonical(function))}"
    code = getattr(function, "__code__", None)
    # Several lambdas on one line have one source.
    own = instructions(code) if code is not None and code.co_name == "<lambda>" else None
    beside = beside_code(function)
    return f"{name} {digest(text, own)}" + (f" with {digest(beside)}" if beside else "")


def identity_of_tokens(processing_class: Any) -> str:
    """A name that changes with how texts become tokens."""
    if processing_class is None:
        return "the model's own"
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    template = getattr(processing_class, "chat_template", None)
    return f"{type(processing_class).__name__} of {tokens} tokens {digest(template)}"
