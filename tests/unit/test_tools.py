"""Selections as settings of other tools, read as those tools read them."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from layerrl import select_layers
from layerrl.errors import SelectionError
from layerrl.selection.exports import TOOLS
from tests.models import FAMILIES, TEXT, Plain, tiny, tiny_config

LAYERS = 12  # so that layer 1 could be taken for 10 and 11


def read_by_axolotl(settings, name):
    """axolotl/utils/freeze.py: dots are escaped, then `match`."""
    [patterns] = settings.values()
    return any(re.match(re.sub(r"\.(?!\+)", r"\.", pattern), name) for pattern in patterns)


def read_by_ms_swift(settings, name):
    """swift/utils/transformers_utils.py: all is frozen, then names that start so are not."""
    assert settings["tuner_type"] == "full"
    assert settings["freeze_parameters_ratio"] == 1.0
    return any(name.startswith(prefix) for prefix in settings["trainable_parameters"])


READERS = {"axolotl": read_by_axolotl, "ms-swift": read_by_ms_swift}


@pytest.mark.parametrize("modules", [None, "mlp*"], ids=["layers", "parts"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("tool", READERS)
def test_names_what_the_selection_trains_and_nothing_else(tool, family, modules):
    model = tiny(family, LAYERS, vision_layers=LAYERS)
    selection = select_layers(model, [1, 4], modules=modules)
    settings = selection.to_config(tool, model)
    assert settings == selection.to_config(tool, model.config)
    named = {name for name, _ in model.named_parameters() if READERS[tool](settings, name)}
    assert named == set(selection.parameters(model))


def test_ms_swift_itself_freezes_and_activates_the_same():
    swift = pytest.importorskip(
        "swift.utils.transformers_utils", reason="ms-swift is missing", exc_type=ImportError
    )
    model = tiny("llama", LAYERS)
    selection = select_layers(model, [1, 4])
    settings = selection.to_config("ms-swift", model)
    swift.freeze_parameters(model, settings["freeze_parameters_ratio"], [])
    swift.activate_parameters(model, settings["trainable_parameters"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(selection.parameters(model))


def test_slime_searches_megatron_s_names_for_whole_layers():
    """slime/backends/megatron_utils/model_provider.py: `re.search`, before anything is wrapped."""
    config = tiny_config("qwen3_moe", LAYERS)
    patterns = select_layers(config, [1, 4]).to_config("slime", config)
    [patterns] = patterns.values()
    kinds = ["self_attention.linear_qkv.weight", "mlp.experts.local_experts.4.linear_fc1.weight"]
    names = [f"decoder.layers.{k}.{kind}" for k in range(LAYERS) for kind in kinds]
    names += [
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "mtp.layers.1.enorm.weight",
    ]
    found = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    assert found == {f"decoder.layers.{k}.{kind}" for k in (1, 4) for kind in kinds}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3", "qwen2_5_vl"])
def test_peft_adapts_the_linear_modules_of_the_layers(family):
    routed = {"num_experts_per_tok": 2} if family == "qwen3_moe" else {}
    model = tiny(family, LAYERS, vision_layers=LAYERS, **routed)
    settings = select_layers(model, [1, 4]).to_config("peft", model)
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    tokens = torch.arange(4, 12)[None]
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    path = "base_model.model." + FAMILIES[family].path
    assert {name[: len(path) + 3] for name in trained} == {f"{path}.1.", f"{path}.4."}
    assert len(trained) == 2 * len(settings["target_modules"])


SHARED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
MIXTURES = {
    "glm4_moe": DEEPSEEK,
    "deepseek_v3": DEEPSEEK | LATENT,
    "deepseek_v2": DEEPSEEK | LATENT | {"topk_method": "greedy"},
    "dots1": DEEPSEEK | {"n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8},
    "qwen3_next": SHARED | {"head_dim": 8, "shared_expert_intermediate_size": 8},
    "qwen2_moe": SHARED | {"shared_expert_intermediate_size": 8},
    "qwen3_moe": SHARED | {"head_dim": 8},
    "olmoe": SHARED,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 32},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


# PEFT takes the names of their shared experts, and of their dense MLPs, for those of the experts.
REWRITTEN = {"glm4_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "qwen3_next"}


@pytest.mark.parametrize("modules", [None, "*attn*"], ids=["layers", "attention"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", MIXTURES)
def test_peft_adapts_a_mixture_in_its_layers_or_not_at_all(family, layer, modules):
    values = {**TEXT, "num_hidden_layers": 4, "intermediate_size": 32, **MIXTURES[family]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    try:
        selection = select_layers(model, layer, modules=modules)
    except SelectionError:
        pytest.skip("another kind of attention")
    if family in REWRITTEN and modules is None:
        with pytest.raises(SelectionError, match="for the experts of every layer"):
            selection.to_config("peft", model)
        return
    settings = selection.to_config("peft", model)
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    found = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    assert found == {*settings["target_modules"]}
    assert all(name.startswith(f"model.layers.{layer}.") for name in found)


def test_peft_adapts_parts_of_a_layer():
    model = tiny("llama", 3)
    selection = select_layers(model, 1, modules=["*.q_proj", "*norm*"])
    assert selection.to_config("peft", model) == {
        "target_modules": ["model.layers.1.self_attn.q_proj"]
    }


LLAMA, GEMMA = tiny_config("llama"), tiny_config("gemma3")


@pytest.mark.parametrize(
    ("tool", "config", "layers", "options", "problem"),
    [
        ("verl", LLAMA, 1, {}, 'tool is \'verl\', expected one of "peft", "slime", "ms-sw'),
        *((tool, LLAMA, "full", {}, "needs no list of layers") for tool in ("peft", "slime")),
        *(
            (tool, LLAMA, [0, 1], {"boost": {1: 2.0}}, f"{tool} cannot .* one learning rate")
            for tool in TOOLS
        ),
        ("slime", LLAMA, 1, {"modules": "mlp"}, "Megatron fuses and renames"),
        ("slime", GEMMA, 1, {}, "names the layers of text and vision alike"),
        ("peft", LLAMA, 1, {"modules": "*norm*"}, "no weight of one is selected"),
    ],
)
def test_what_a_tool_cannot_express_is_refused(tool, config, layers, options, problem):
    selection = select_layers(config, layers, **options)
    with pytest.raises(SelectionError, match=problem):
        selection.to_config(tool, config)


def test_a_model_of_another_depth_is_refused():
    with pytest.raises(SelectionError, match="has 5 decoder layers"):
        select_layers(LLAMA, 1).to_config("slime", tiny_config("llama", 5))


def test_a_model_without_a_config_has_names_too():
    layers = torch.nn.ModuleList(Plain(up=torch.nn.Linear(2, 2)) for _ in range(3))
    model = Plain(layers=layers)
    found = select_layers(model, 1).to_config("axolotl", model)
    assert found == {"unfrozen_parameters": ["^layers.1."]}
