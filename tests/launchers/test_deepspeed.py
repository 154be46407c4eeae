"""DeepSpeed's ZeRO on a CPU, where it is installed: `pip install deepspeed` (not a dependency)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerrl import load_delta
from tests.launchers.launch import launch
from tests.launchers.test_launchers import LAYER, SAVING, distance
from tests.models import tiny
from tests.runs import in_layers, saved

pytest.importorskip("deepspeed")


def zero(stage: int) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    values = {"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"}
    return {"deepspeed": {**values, **dict.fromkeys(auto, "auto")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    saved(folder / "base", tiny("llama", 4))
    return folder


def job(folder: Path, name: str, num_processes: int, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(folder / "base"),
        "output": str(folder / name),
        "dtype": "float32",
        "selection": LAYER,
        "per_device_train_batch_size": 8 // num_processes,
        **changes,
    }


@pytest.fixture(scope="module")
def one(folder: Path) -> Any:
    found = launch(folder / "jobs-one", {"layer": job(folder, "one", 1, **SAVING)}, num_processes=1)
    return found["layer"][0]


@pytest.fixture(scope="module")
def found(folder: Path, one: Any) -> dict[str, list[Any]]:
    jobs = {
        "zero1": job(folder, "zero1", 2, **zero(1), **SAVING),
        "zero2": job(folder, "zero2", 2, **zero(2)),
        "resumed": job(folder, "resumed", 2, **zero(1), resume=str(folder / "zero1/checkpoint-3")),
        "foreign": job(folder, "foreign", 2, **zero(1), resume=str(folder / "one/checkpoint-3")),
        "zero3": job(folder, "zero3", 2, **zero(3)),
    }
    variables = {"DS_ACCELERATOR": "cpu"}
    return launch(folder / "jobs", jobs, num_processes=2, environment=variables)


@pytest.mark.parametrize("name", ["zero1", "zero2", "resumed"])
def test_trains_the_layer_as_one_process_does(folder, found, one, name):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    before = base.state_dict()
    layer = {name for name in before if in_layers(name, [LAYER])}
    for process in found[name]:
        assert not isinstance(process, str), process
        assert process["wrapper"] == "DeepSpeedEngine"
        weights = process["weights"]
        assert {n for n in before if not weights[n].equal(before[n])} == layer
        assert distance(weights, one["weights"]) <= 1e-5
    load_delta(base, folder / name / "delta")
    assert distance(base.state_dict(), one["weights"]) <= 1e-5


def test_does_not_take_a_checkpoint_written_without_it(found):
    for error in found["foreign"]:
        assert "was written without DeepSpeed and this run is with it" in error


def test_zero3_is_refused(found):
    for error in found["zero3"]:
        assert "LauncherError: DeepSpeed's ZeRO-3 was given for layer 2 of 4" in error
