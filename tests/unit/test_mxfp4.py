"""A base published in MXFP4, as gpt-oss is: what transformers does with it without a GPU."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Mxfp4Config

from layerrl import load_delta, merge_delta
from layerrl.errors import DeltaError, SelectionError
from layerrl.quantisation import _refuse_others
from tests.grpo import make
from tests.models import tiny
from tests.runs import bits, train

SIZE = {"hidden_size": 64, "intermediate_size": 64}
_PACKED = ("gate_up_proj", "down_proj")


@pytest.fixture
def packed(tmp_path):
    """A tiny gpt-oss whose experts are packed, 32 elements to a scale, with random bytes."""
    model = tiny("gpt_oss", 3, **SIZE).to(torch.bfloat16)
    folder = tmp_path / "packed"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    draws = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(_PACKED)]:
        experts, inner, outer = tensors.pop(name).shape
        groups = (experts, outer, inner // 32)
        blocks = torch.randint(256, (*groups, 16), generator=draws, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.full(groups, 121, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unpacked(folder):
    settings = {"dtype": torch.bfloat16, "quantization_config": Mxfp4Config(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def test_a_layer_trains_on_the_unpacked_base_and_merges_into_it(packed, tmp_path):
    base = tmp_path / "base"
    unpacked(packed).save_pretrained(base, save_original_format=False)
    model = unpacked(packed)
    before = bits(model)
    trainer = make(model, tmp_path / "run", selection=1, max_steps=2, learning_rate=1e-2)
    train(trainer)
    after = bits(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(name.endswith(_PACKED) for name in moved)
    assert all(name.startswith("model.layers.1.") for name in moved)
    delta = trainer.save_delta(tmp_path / "delta")
    merged = merge_delta(base, delta, tmp_path / "merged")
    assert_close(bits(AutoModelForCausalLM.from_pretrained(merged)), after, rtol=0, atol=0)
    again = unpacked(packed)
    load_delta(again, delta)
    assert_close(bits(again), after, rtol=0, atol=0)
    with pytest.raises(DeltaError, match=r"quantised \(mxfp4\).*Mxfp4Config\(dequantize=True\)"):
        merge_delta(packed, delta, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    shutil.rmtree(base)


def test_packed_layers_are_refused_with_the_way_round():
    model = SimpleNamespace(hf_quantizer=SimpleNamespace(quantization_config=Mxfp4Config()))
    with pytest.raises(SelectionError, match=r"by mxfp4.*Mxfp4Config\(dequantize=True\)"):
        _refuse_others(model, vllm=False)
