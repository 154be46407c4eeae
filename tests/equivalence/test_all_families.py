"""One layer of every decoder family that one small config can make, against TRL by hand.

make test-slow ARGS="tests/equivalence/test_all_families.py"
"""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layerrl.blocks import find_blocks
from tests.grpo import make
from tests.models import TEXT
from tests.runs import assert_same_run, bits, moved, train

pytestmark = pytest.mark.slow

# Every name that a family has for a size or a rate; each takes those that it knows.
CONFIG = TEXT | {
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "d_model": 16,
    "dropout": 0.0,
    "embd_pdrop": 0.0,
    "expert_ffn_hidden_size": 8,
    "ffn_dim": 32,
    "ffn_hidden_size": 32,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_dropout": 0.0,
    "hidden_size_per_layer_input": 4,
    "layerdrop": 0.0,
    "mamba_d_state": 8,
    "moe_intermediate_size": 8,
    "moe_num_experts": 4,
    "n_embd": 16,
    "n_group": 1,
    "n_head": 2,
    "n_heads": 2,
    "n_layer": 4,
    "n_layers": 4,
    "n_positions": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_heads": 4,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "resid_pdrop": 0.0,
    "rotary_dim": 4,
    "shared_expert_intermediate_size": 8,
    "state_size": 8,
    "topk_group": 1,
    "vocab_size_per_layer_input": 64,
    "word_embed_proj_dim": 16,
}
DENSE = """
    afmoe apertus arcee aria_text bitnet bloom cohere cohere2 cwm ernie4_5 exaone4 falcon_h1
    falcon_mamba flint gemma gemma2 gemma3_text gemma4_text glm glm4 gpt-sw3 gpt2 gpt_bigcode
    gpt_neox gpt_neox_japanese gptj granite granite_swa helium hunyuan_v1_dense hyperclovax
    internlm3 jais2 lfm2 lfm3 llama mamba ministral ministral3 mistral modernbert-decoder mpt
    nanochat nemotron olmo olmo2 olmo3 olmo_hybrid openai-gpt opt persimmon phi phi3 qwen2 qwen3
    qwen3_5_text qwen3_next recurrent_gemma seed_oss smollm3 stablelm starcoder2 vaultgemma xglm
"""
# Not Llama 4: plain TRL cannot train it.
EXPERTS = """
    cohere2_moe dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss granitemoe granitemoeshared
    hunyuan_v1_moe jetmoe laguna mellum minimax_m2 mixtral olmoe phimoe qwen2_moe
    qwen3_5_moe_text qwen3_moe solar_open
"""
LAYER = 2


def model_of(family: str, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **CONFIG)
        return AutoModelForCausalLM.from_config(config).to(dtype)


def run(model: PreTrainedModel, folder: Any, **who: Any) -> Any:
    """Three passes over a batch, twice: old policy, reference where it is ours, policy."""
    # Some cannot be checkpointed, and TRL would.
    checkpointing = {"gradient_checkpointing": model.supports_gradient_checkpointing}
    trainer = make(model, folder, num_iterations=2, max_steps=4, **checkpointing, **who)
    train(trainer)
    return trainer


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in (DENSE + EXPERTS).split()]
    + [(family, torch.bfloat16) for family in EXPERTS.split()],
    ids=str,
)
def test_equals_freezing_by_hand(tmp_path, family, dtype):
    by_hand = model_of(family, dtype)
    layer = {id(p) for p in find_blocks(by_hand).modules[LAYER].parameters()}
    for parameter in by_hand.parameters():
        parameter.requires_grad_(id(parameter) in layer)
    trained = {name for name, p in by_hand.named_parameters() if p.requires_grad}
    plain = run(by_hand, tmp_path)
    model = model_of(family, dtype)
    before = bits(model)
    masked = run(model, tmp_path, selection=LAYER, arguments={"master_weights": False})
    assert_same_run(masked, plain)
    assert moved(masked, before) <= trained
    assert moved(masked, before)
