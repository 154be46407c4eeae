"""For every test file: no model hub, one thread (tiny models gain nothing from more), the same
hypothesis examples in each run, and a device."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import settings

from tests import devices

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

settings.register_profile(
    "layerrl", derandomize=True, database=None, deadline=None, max_examples=40
)
settings.load_profile("layerrl")


def pytest_configure(config: pytest.Config) -> None:
    """With `-m cuda`, before any test file asks where to train."""
    if config.option.markexpr == "cuda" and torch.cuda.is_available():
        devices.choose("cuda")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs on any device is one of the tests for a GPU where these are asked for."""
    if config.option.markexpr == "cuda":
        for item in items:
            if item.get_closest_marker("any_device") and not item.get_closest_marker("slow"):
                item.add_marker("cuda")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No GPU, no test of one."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture
def made_on_device() -> Iterator[None]:
    """Tensors and models that a test makes are where it runs."""
    with nullcontext() if devices.DEVICE.type == "cpu" else devices.DEVICE:
        yield
