"""Warnings name the user's line, however many frames lie between."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import layerrl
from layerrl.warning import warn


def called_by(module: str, call: Callable[[], object]) -> Callable[[], Any]:
    """A function of that module which makes the call."""
    names: dict[str, Any] = {"__name__": module, "call": call}
    exec(compile("def called(): call()", f"{module}.py", "exec"), names)
    return names["called"]


def warned_at(*modules: str) -> tuple[str, str]:
    """File of a warning that comes through functions of these modules, the innermost first."""
    call: Callable[[], Any] = partial(warn, "a word")
    for module in modules:
        call = called_by(module, call)
    with pytest.warns(UserWarning, match="^a word$") as warned:
        call()
    [warning] = warned
    return warning.filename, Path(warning.filename).read_text().splitlines()[warning.lineno - 1]


@pytest.mark.parametrize(
    "between",
    [
        ["layerrl.trainer.call"],
        ["layerrl.trainer.call", "layerrl.trainer.mixin"],
        ["layerrl.trainer.mixin", "contextlib", "trl.trainer.grpo_trainer", "layerrl"],
        ["layerrl.seams", "importlib._bootstrap", "layerrl"],
        ["layerrl.scores.rollouts", "trl.x", "transformers.trainer", "accelerate", "torch.utils"],
        ["layerrl", "peft.peft_model", "datasets.arrow_dataset", "functools"],
    ],
    ids=" < ".join,
)
def test_the_line_is_the_first_outside_the_libraries(between: list[str]) -> None:
    assert warned_at(*between) == (__file__, "        call()")


def test_a_module_that_is_only_named_like_a_library_is_the_users() -> None:
    call = called_by("torchish.tools", called_by("layerrl", partial(warn, "a word")))
    with pytest.warns(UserWarning, match="^a word$") as warned:
        call()
    assert [warning.filename for warning in warned] == ["torchish.tools.py"]


def test_a_line_is_warned_of_once() -> None:
    call = called_by("layerrl", partial(warn, "another word"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for _ in range(3):
            call()
    assert len(warned) == 1


def test_layerrl_warns_in_no_other_way() -> None:
    package = Path(layerrl.__file__).parent
    files = [file for file in package.rglob("*.py") if "warnings.warn" in file.read_text("utf-8")]
    assert [file.name for file in files] == ["warning.py"]
