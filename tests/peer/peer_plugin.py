"""pytest's side of `make test-peer`: masked trainers in place of TRL's, and a line a test.

Loaded with `-p peer_plugin` before TRL's tests are imported, never from the package `tests`: a
checkout of TRL has one of that name. `LAYERRL_PEER` says what trains: a selection; `plain` for
TRL's trainers; `by hand` for TRL's with all but the last layer frozen. `LAYERRL_PEER_RESULTS` is
the file that gets the lines, and the ending `.jsonl` with the last of them; `LAYERRL_PEER_HUB` is
the folder of `stand_ins.py`.
"""

import gc
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from layerrl import LayerMaskedMixin

PLAIN, BY_HAND = "plain", "by hand"
MODE = os.environ["LAYERRL_PEER"]
SELECTION: Any = -1 if MODE == "last" else MODE
MASKED = MODE not in (PLAIN, BY_HAND)
RESULTS = Path(os.environ["LAYERRL_PEER_RESULTS"])
BEGUN = "begun, and the process ended"

_trainings: list[str] = []


def masked(plain: type) -> type:
    """A class that does what TRL's does, but for what its selection freezes."""

    def init(self: Any, *args: Any, selection: Any = SELECTION, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        adapts = kwargs.get("peft_config") is not None or isinstance(model, PeftModel)
        if adapts and selection == "full":
            selection = "all"  # what the refusal of "full" beside adapters names in its place
        super(made, self).__init__(*args, selection=selection, **kwargs)  # pyright: ignore[reportCallIssue]

    body = {"__init__": init, "__module__": plain.__module__, "__doc__": plain.__doc__}
    made = type(plain.__name__, (LayerMaskedMixin, plain), body)
    return made


def digest(model: Any) -> str:
    """Of the bits of all parameters."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(parameter.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def freeze_by_hand(model: torch.nn.Module) -> None:
    """Leave what trains of the last layer, found without layerrl: the longest list's last."""
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    trains = {id(parameter) for parameter in max(lists, key=len)[-1].parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trains)


def _noting(train: Any) -> Any:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if MODE == BY_HAND:
            freeze_by_hand(self.model)
        result = train(self, *args, **kwargs)
        _trainings.append(digest(self.model))
        return result

    return noted


def _missing(name: str) -> Any:
    """In place of what the installed TRL does not have, and tests of another version import."""
    if re.fullmatch(r"is_\w+_available", name):
        return lambda: False
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *_, **__: pytest.fail(f"the installed TRL has no {name}")


def places() -> Iterator[Any]:
    """The modules that tests import trainers from."""
    yield importlib.import_module("trl")
    root = importlib.import_module("trl.experimental")
    for part in pkgutil.iter_modules(root.__path__, "trl.experimental."):
        with suppress(ImportError):  # of what is not installed
            yield importlib.import_module(part.name)


def pytest_configure() -> None:
    """Put everything in place before a test file is imported."""
    os.chdir(os.environ["LAYERRL_PEER_HUB"])
    torch.set_num_threads(1)
    for name in ("trl.import_utils", "trl.trainer.sft_trainer"):
        module: Any = importlib.import_module(name)
        module.__getattr__ = _missing
    Trainer.train = _noting(Trainer.train)
    for module in places():
        for name in filter(re.compile("[A-Z].*Trainer$").match, dir(module)):
            plain = getattr(module, name)
            if MASKED and issubclass(plain, Trainer) and not issubclass(plain, LayerMaskedMixin):
                setattr(module, name, masked(plain))
    gc.collect()
    gc.freeze()  # or each of the many collections would look through all that was imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Go on where the last run broke off: a test that ended two of them is not tried again."""
    RESULTS.touch()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    last = {line["test"]: line["outcome"] for line in lines}
    begun = Counter(line["test"] for line in lines if line["outcome"] == BEGUN)
    done = {test for test, outcome in last.items() if outcome != BEGUN or begun[test] > 1}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def write(test: str, outcome: str, why: str = "", seconds: float = 0.0) -> None:
    """One line of results."""
    line = {
        "test": test,
        "outcome": outcome,
        "why": why,
        "trainings": list(_trainings),
        "seconds": round(seconds, 2),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers whatever ran before, and whatever trains."""
    _trainings.clear()
    write(item.nodeid, BEGUN, BEGUN)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def frozen_as_selected(error: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether all that a test misses are changes of frozen parameters.

    Most of TRL's tests end with a loop that wants every parameter changed. Of a selection it is
    to say: all of the trained ones changed, and none of the others.
    """
    statement = str(error.traceback[-1].statement)
    if not MASKED or "assert not torch.equal(" not in statement:
        return False
    values = error.traceback[-1].frame.f_locals
    trainer = values.get("trainer")
    if not isinstance(trainer, LayerMaskedMixin):
        return False
    chosen = {id(value) for value in trainer.selection.parameters(trainer.model).values()}
    trained = {name for name, value in trainer.model.named_parameters() if id(value) in chosen}
    models = {"previous_trainable_params": "model", "previous_ref_params": "ref_model"}
    snapshots = [
        (values[name], getattr(trainer, models[name])) for name in models if name in values
    ]
    return all(
        {*before} <= {*(now := dict(model.named_parameters()))}
        and {n for n in before if not torch.equal(before[n], now[n])} == trained & {*before}
        for before, model in snapshots
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Write what came of a test, before a `conftest.py` clears the failure's frames."""
    as_selected = call.excinfo is not None and frozen_as_selected(call.excinfo)
    report = yield
    if as_selected:
        report.outcome, report.longrepr = "passed", None
    if call.when == "call" or report.outcome != "passed":
        why = ""
        if report.failed and call.excinfo is not None:
            why = f"{call.excinfo.type.__name__}: {call.excinfo.value}"[:2000]
        write(item.nodeid, report.outcome, why, call.duration)
    return report


def pytest_keyboard_interrupt() -> None:
    """Take back that a test has begun: what ended the process was not it."""
    lines = RESULTS.read_bytes().splitlines(keepends=True)
    if lines and json.loads(lines[-1])["outcome"] == BEGUN:
        os.truncate(RESULTS, RESULTS.stat().st_size - len(lines[-1]))


def pytest_sessionfinish(exitstatus: int) -> None:
    """Give the results their name if nothing kept a test from being run."""
    if exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        RESULTS.rename(RESULTS.with_suffix(".jsonl"))
