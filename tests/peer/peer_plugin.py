"""pytest's side of `make test-peer`: masked trainers in place of TRL's, and a line a test.

Loaded with `-p peer_plugin` before TRL's tests are imported, never from the package `tests`: a
checkout of TRL has one of that name. `LAYERRL_PEER` says what trains: a selection; `plain` for
TRL's trainers; `by hand` for TRL's with all but the last layer frozen. `LAYERRL_PEER_RESULTS` is
the file that gets the lines, `LAYERRL_PEER_HUB` the folder of `stand_ins.py`.
"""

import gc
import hashlib
import importlib
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import pytest
import torch
import transformers

from layerrl import LayerMaskedMixin, select_layers

TRAINERS = {
    "trl": ("DPO", "Distillation", "GRPO", "KTO", "RLOO", "Reward", "SFT"),
    "trl.experimental.cpo": ("CPO",),
    "trl.experimental.gkd": ("GKD",),
    "trl.experimental.gmpo": ("GMPO",),
    "trl.experimental.online_dpo": ("OnlineDPO",),
    "trl.experimental.orpo": ("ORPO",),
    "trl.experimental.tpo": ("TPO",),
}
PLAIN, BY_HAND = "plain", "by hand"
MODE = os.environ["LAYERRL_PEER"]
SELECTION: Any = -1 if MODE == "last" else MODE
MASKED = MODE not in (PLAIN, BY_HAND)

_trainings: list[str] = []


def masked(plain: type) -> type:
    """A class that does what TRL's does, but for what its selection freezes."""

    def init(self: Any, *args: Any, selection: Any = SELECTION, **kwargs: Any) -> None:
        super(made, self).__init__(*args, selection=selection, **kwargs)

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


def _noting(train: Any) -> Any:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if MODE == BY_HAND:
            chosen = select_layers(self.model, -1).parameters(self.model)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in chosen)
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


def pytest_configure() -> None:
    """Put everything in place before a test file is imported."""
    os.chdir(os.environ["LAYERRL_PEER_HUB"])
    torch.set_num_threads(1)
    for name in ("trl.import_utils", "trl.trainer.sft_trainer"):
        module: Any = importlib.import_module(name)
        module.__getattr__ = _missing
    transformers.Trainer.train = _noting(transformers.Trainer.train)
    if MASKED:
        for name, kinds in TRAINERS.items():
            module = importlib.import_module(name)
            for kind in kinds:
                if plain := getattr(module, f"{kind}Trainer", None):  # an old TRL has not all
                    setattr(module, f"{kind}Trainer", masked(plain))
    gc.collect()
    gc.freeze()  # or each of the many collections would look through all that was imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers whatever ran before, and whatever trains."""
    _trainings.clear()
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
        line = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "why": why,
            "trainings": list(_trainings),
            "seconds": round(call.duration, 2),
        }
        with Path(os.environ["LAYERRL_PEER_RESULTS"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
    return report
