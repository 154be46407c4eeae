"""Mixtures of experts and vision-language models from end to end: trained, saved, merged."""

import json
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from layerrl import merge_delta, select_layers
from layerrl.errors import SelectionError
from tests.grpo import make
from tests.images import arguments, no_image, tiny_with_images
from tests.models import FAMILIES, tiny, tiny_config
from tests.runs import bits, load, metric, moved, saved

REUSED = {"beta": 0.04, "num_iterations": 2}


def assert_merges(trainer, folder, base):
    """The delta in its base, loaded by plain transformers, is the model that was trained."""
    trainer.save_delta(folder / "delta")
    merge_delta(base, folder / "delta", folder / "merged")
    assert_close(bits(load(folder / "merged")), bits(trainer.model), rtol=0, atol=0)
    return set(json.loads((folder / "delta" / "delta.json").read_text())["tensors"])


class TestExperts:
    def test_of_one_layer_train_alone(self, tmp_path):
        """And layer 1 is no expert's number, nor is expert 2 a layer's."""
        experts = {"num_experts": 12, "num_experts_per_tok": 2}
        base = saved(tmp_path / "base", tiny("qwen3_moe", 4, **experts))
        model = load(base)
        before = bits(model)
        trainer = make(
            model, tmp_path, selection=select_layers(model, 1, modules="mlp.experts.*"), **REUSED
        )
        trainer.train()
        assert moved(trainer, before) == {
            "model.layers.1.mlp.experts.gate_up_proj",
            "model.layers.1.mlp.experts.down_proj",
        }
        names = assert_merges(trainer, tmp_path, base)
        found = {re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\..*", n) for n in names}
        assert {match[1] for match in found} == {"1"}
        assert {int(match[2]) for match in found} == set(range(12))

    def test_leave_the_router_s_buffers_where_they_are(self, tmp_path):
        config = AutoConfig.for_model(
            "deepseek_v3",
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=8,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        base = saved(tmp_path / "base", AutoModelForCausalLM.from_config(config))
        model = load(base)
        biases = {f"model.layers.{k}.mlp.gate.e_score_correction_bias" for k in (1, 2)}
        assert biases <= {name for name, _ in model.named_buffers()}
        before = bits(model)
        trainer = make(model, tmp_path, selection=2, **REUSED)
        trainer.train()
        trained = {name for name in before if name.startswith("model.layers.2.")} - biases
        assert moved(trainer, before) == trained
        assert_merges(trainer, tmp_path, base)

    @pytest.mark.parametrize(
        ("family", "glob", "problem"),
        [
            ("llama", "mlp.experts.*", "its layers have no experts. Layer 1 holds self_attn"),
            ("qwen3_moe", "mlp.experts.3.*", "all experts of a layer are in one tensor. Layer 1"),
        ],
    )
    def test_that_are_not_there(self, family, glob, problem):
        with pytest.raises(SelectionError, match=re.escape(f"'{glob}' matches no tensor")) as e:
            select_layers(tiny_config(family), 1, modules=glob)
        assert problem in str(e.value)


def test_text_layers_train_on_images_and_the_tower_stays(tmp_path):
    base = saved(tmp_path / "base", tiny_with_images("gemma3", 4))
    model = load(base)
    before, passes = bits(model), []
    model.model.vision_tower.register_forward_hook(
        lambda *_: passes.append(torch.is_grad_enabled())
    )
    changes = {"arguments": arguments("gemma3"), **no_image("gemma3"), **REUSED}
    trainer = make(model, tmp_path, selection=2, **changes)
    trainer.train()
    assert passes
    assert all(norm > 0 for norm in metric(trainer, "grad_norm"))
    layer = f"{FAMILIES['gemma3'].path}.2."
    assert moved(trainer, before) == {name for name in before if name.startswith(layer)}
    assert trainer.masked_run.replay.enabled
    assert_merges(trainer, tmp_path, base)
