"""For every test file: no model hub, one thread (tiny models gain nothing from more), and the same
hypothesis examples in each run."""

import os

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

settings.register_profile(
    "layerrl", derandomize=True, database=None, deadline=None, max_examples=40
)
settings.load_profile("layerrl")
