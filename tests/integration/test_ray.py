"""What a sweep sends to Ray, and `on_ray.py`, its runs on a real cluster.

Those are in a process of their own: Ray ends the one that connected to a cluster, without a word
and whatever runs in it, where the cluster's head does not answer for a minute.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from layerrl.errors import ProbeError
from layerrl.sweep.harness import Harness
from tests.integration.test_probe import HELD_OUT, config, probe
from tests.models import tiny
from tests.runs import bits

ON_RAY = Path(__file__).with_name("on_ray.py")


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_a_cluster(marked):
    pytest.importorskip("ray")
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, ON_RAY],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def test_without_ray_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ProbeError, match=r"pip install \"layerrl\[ray\]\""):
        probe(tiny("llama", 3), tmp_path, executor="ray")


def test_a_harness_goes_to_another_process_with_its_weights(tmp_path):
    model = tiny("llama", 3)
    sent = Harness(
        [model],
        print,
        args=config(tmp_path),
        full_args=config(tmp_path),
        eval_dataset=HELD_OUT,
        greedy=True,
        modules=None,
        folder=tmp_path,
    )
    arrived = pickle.loads(pickle.dumps(sent))
    assert_close(bits(arrived._model), bits(model), rtol=0, atol=0)
    assert_close(arrived._base, sent._base, rtol=0, atol=0)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert not torch.equal(arrived._model.model.norm.weight, model.model.norm.weight)
