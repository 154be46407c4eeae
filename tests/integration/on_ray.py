"""Sweeps on a real cluster of two workers, in the process that `test_ray.py` starts."""

import os
import signal

import pytest
from torch.testing import assert_close

from layerrl.errors import ProbeError
from tests.grpo import reward
from tests.integration.test_probe import config, numbers, probe
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
        killed, here = tmp_path / "killed", os.getpid()
        calls: list[int] = []

        def killing(completions, **_):
            calls.append(1)
            if len(calls) > 2 and not killed.exists() and os.getpid() != here:
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return reward(completions)

        killing.__name__ = reward.__name__
        serial = probe(tiny("llama", 3), tmp_path / "serial", layers="all")
        model = tiny("llama", 3)
        before = bits(model)
        on_ray = probe(model, tmp_path / "ray", layers="all", executor="ray", reward_funcs=killing)
        assert killed.exists()
        assert numbers(on_ray) == numbers(serial)
        assert_close(bits(model), before, rtol=0, atol=0)

    def test_halves_like_the_serial_sweep(self, tmp_path):
        changes = {"args": config(tmp_path, max_steps=4), "layers": "all", "halving": True}
        serial = probe(tiny("llama", 3), tmp_path / "serial", **changes)
        on_ray = probe(tiny("llama", 3), tmp_path / "ray", executor="ray", **changes)
        assert numbers(on_ray) == numbers(serial)

    def test_an_error_in_a_run_reaches_the_caller(self, tmp_path, monkeypatch):
        def cancel(*_, **__):
            raise AssertionError("a task that ends while it is cancelled ends the whole process")

        monkeypatch.setattr(ray, "cancel", cancel)

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
