"""For every test file: no model hub, one thread (tiny models gain nothing from more), the same
random numbers and hypothesis examples in each run, and a device."""

import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import devices, workers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # for the processes that tests start
torch.set_num_threads(1)

settings.register_profile(
    "layerrl", derandomize=True, database=None, deadline=None, max_examples=40
)
settings.load_profile("layerrl")


LOGS = Path(".cache") / "workers"


@pytest.hookimpl(trylast=True)  # pytest turns its own faulthandler on
def pytest_configure(config: pytest.Config) -> None:
    """With `-m cuda`, before any test file asks where to train."""
    if config.option.markexpr == "cuda" and torch.cuda.is_available():
        devices.choose("cuda")
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(config, "workerinput"):
        workers.start(config.rootpath / LOGS)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No more workers than memory is enough for: the machine would kill one of them."""
    fit = workers.as_many_as_fit()
    cores = (os.cpu_count() or 1) if config.option.numprocesses == "logical" else None
    return None if fit is None or cores is None else min(fit, cores)


_SET = re.compile(r"\{[^{}:]+, [^{}:]+\}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse names with a set in them: workers whose hash seeds differ would not agree on them."""
    if found := [item.nodeid for item in session.items if _SET.search(item.nodeid)]:
        raise pytest.UsageError(f"give these parameters an id without a set: {found}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Keep what a worker left that died."""
    if error is not None:
        workers.end(Path(node.config.rootpath) / LOGS, node)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say why workers died."""
    for text in workers.ended:
        terminalreporter.section("a worker died")
        terminalreporter.write_line(text)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m cuda`, import no file without a test for a GPU: it may need packages of its own."""
    if config.option.markexpr != "cuda" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    return None if "on_any_device" in text or "mark.cuda" in text else True


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs on any device is one of the tests for a GPU where these are asked for."""
    if config.option.markexpr == "cuda":
        for item in items:
            if item.get_closest_marker("any_device") and not item.get_closest_marker("slow"):
                item.add_marker("cuda")


@pytest.hookimpl(tryfirst=True)  # before fixtures draw
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test has its own seed, the same in each run, and compiles anew.

    One of a GPU is skipped where there is none.
    """
    workers.begin(item.nodeid)
    from transformers import set_seed  # once HF_HUB_OFFLINE is set

    set_seed(zlib.crc32(item.nodeid.encode()))
    if "torch._dynamo" in sys.modules:  # which compiles a function of a module eight times at most
        torch.compiler.reset()
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture
def made_on_device() -> Iterator[None]:
    """Tensors and models that a test makes are where it runs."""
    with nullcontext() if devices.DEVICE.type == "cpu" else devices.DEVICE:
        yield
