"""Sweeps on a real cluster of two workers on this machine."""

import os
import pickle
import signal
import sys

import pytest
import torch
from torch.testing import assert_close

from layerrl.errors import ProbeError
from layerrl.sweep.harness import Harness
from tests.grpo import reward
from tests.integration.test_probe import HELD_OUT, config, numbers, probe
from tests.models import tiny
from tests.runs import bits

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class TestRay:
    @pytest.mark.slow
    def test_is_the_serial_sweep_though_a_worker_is_killed(self, tmp_path):
        killed = tmp_path / "killed"
        calls: list[int] = []

        def killing(completions, **_):
            calls.append(1)
            if len(calls) > 2 and not killed.exists():
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return reward(completions)

        killing.__name__ = reward.__name__
        serial = probe(tiny("llama", 3), tmp_path / "serial", layers="all")
        model = tiny("llama", 3)
        before = bits(model)
        on_ray = probe(model, tmp_path / "ray", layers="all", executor="ray", reward_funcs=killing)
        assert killed.exists()
        assert int(killed.read_text()) != os.getpid()
        assert numbers(on_ray) == numbers(serial)
        assert_close(bits(model), before, rtol=0, atol=0)

    def test_halves_like_the_serial_sweep(self, tmp_path):
        changes = {"args": config(tmp_path, max_steps=4), "layers": "all", "halving": True}
        serial = probe(tiny("llama", 3), tmp_path / "serial", **changes)
        on_ray = probe(tiny("llama", 3), tmp_path / "ray", executor="ray", **changes)
        assert numbers(on_ray) == numbers(serial)

    def test_an_error_in_a_run_reaches_the_caller(self, tmp_path):
        def same(completions, **_):
            return [1.0] * len(completions)

        with pytest.raises(ProbeError, match="in the whole run, all 4 completions"):
            probe(tiny("llama", 3), tmp_path, executor="ray", reward_funcs=same)

    def test_more_than_there_is_is_refused(self, tmp_path):
        with pytest.raises(ProbeError, match=r"a run needs \{'CPU': 64\}, and no node .*'CPU': 2"):
            probe(tiny("llama", 3), tmp_path, executor="ray", resources={"num_cpus": 64})
        with pytest.raises(
            ProbeError, match=r"\['cpus'\], expected \['memory', 'num_cpus', 'num_g"
        ):
            probe(tiny("llama", 3), tmp_path, executor="ray", resources={"cpus": 1})


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
