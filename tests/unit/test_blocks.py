import re

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from layerrl import blocks as blocks_module
from layerrl import select_layers
from layerrl.blocks import (
    count_layers,
    find_blocks,
    layers_described,
    meta_model,
    plain_name,
    replaced_forwards,
    unwrap,
)
from layerrl.errors import ModelError, SelectionError
from tests.grpo import make
from tests.models import FAMILIES, VISION_FAMILIES, Plain, linears, tiny, tiny_config

families = pytest.mark.parametrize("family", FAMILIES)


def inner_names(blocks, layer):
    return [name for name, _ in blocks.named_parameters(layer)]


# Families


@families
def test_stack_is_found_where_the_family_keeps_it(family):
    model = tiny(family, num_layers=3)
    blocks = find_blocks(model)
    assert blocks.path == FAMILIES[family].path
    assert blocks.modules == tuple(model.get_submodule(blocks.path))
    assert len(blocks.modules) == 3


@families
def test_config_and_model_agree_on_the_number_of_layers(family):
    config = tiny_config(family, num_layers=4)
    assert count_layers(config) == 4
    assert len(find_blocks(tiny(family, num_layers=4)).modules) == 4


@families
def test_layers_of_a_model_on_meta_are_those_of_the_real_one(family):
    with torch.device("meta"):
        on_meta = tiny(family)
    real = find_blocks(tiny(family))
    found = find_blocks(on_meta)
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert found.path == real.path
    assert [inner_names(found, k) for k in range(3)] == [inner_names(real, k) for k in range(3)]


@families
def test_meta_model_of_a_config_has_the_names_and_shapes_of_the_real_one(family):
    on_meta = meta_model(tiny_config(family))
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert {n: p.shape for n, p in on_meta.named_parameters()} == {
        n: p.shape for n, p in tiny(family).named_parameters()
    }


@families
def test_selected_tensors_are_the_whole_of_their_layer_and_nothing_else(family):
    model = tiny(family)
    prefix = f"{FAMILIES[family].path}.1."
    expected = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    assert list(select_layers(model, 1).parameters(model)) == expected


def test_meta_model_follows_the_architecture_that_the_config_names():
    config = tiny_config("llama")
    config.architectures = ["LlamaForSequenceClassification"]
    assert type(meta_model(config)).__name__ == "LlamaForSequenceClassification"


@pytest.mark.parametrize("vision_layers", [2, 3, 5])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_text_stack_is_told_from_a_vision_tower_of_any_depth(family, vision_layers):
    model = tiny(family, num_layers=3, vision_layers=vision_layers)
    for whole, path in [
        (model, "model.language_model.layers"),
        (model.model, "language_model.layers"),
    ]:
        blocks = find_blocks(whole)
        assert (blocks.path, len(blocks.modules)) == (path, 3)
    assert count_layers(model.config) == 3


def test_text_stack_of_two_lists_is_the_one_as_deep_as_the_config_says():
    model = Plain(vision=Plain(layers=linears(2)), text=Plain(layers=linears(3)))
    model.config = tiny_config("llama", num_layers=3)
    assert find_blocks(model).path == "text.layers"


def test_a_submodule_that_holds_one_stack_can_be_passed():
    model = Plain(vision=Plain(layers=linears(2)), text=Plain(layers=linears(3)))
    assert len(find_blocks(model.text).modules) == 3


def test_empty_module_lists_are_no_stack():
    model = Plain(adapters=nn.ModuleList(), layers=linears(2))
    assert find_blocks(model).path == "layers"


# Layer numbers


@pytest.mark.parametrize("layer", [0, 1, 2, 10, 11])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layer_1_of_12_is_not_layer_10_or_11(family, layer):
    model = tiny(family, num_layers=12)
    trained = select_layers(model, layer).parameters(model)
    depth = FAMILIES[family].path.count(".") + 1
    assert {name.split(".")[depth] for name in trained} == {str(layer)}
    assert [id(p) for p in trained.values()] == [
        id(p) for p in model.get_submodule(FAMILIES[family].path)[layer].parameters()
    ]


def test_index_of_an_expert_is_not_the_index_of_a_layer():
    model = Plain(layers=nn.ModuleList(Plain(experts=linears(4)) for _ in range(3)))
    blocks = find_blocks(model)
    assert (blocks.path, len(blocks.modules)) == ("layers", 3)
    assert list(select_layers(model, 1).parameters(model)) == [
        f"layers.1.experts.{expert}.weight" for expert in range(4)
    ]
    assert list(select_layers(model, 2, modules="experts.1").parameters(model)) == [
        "layers.2.experts.1.weight"
    ]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_and_router_of_the_selected_layer_train(family):
    model = tiny(family)
    trained = select_layers(model, 2, modules="mlp").parameters(model)
    assert all(name.startswith("model.layers.2.mlp.") for name in trained)
    assert any(".experts." in name for name in trained)
    assert any(".gate." in name or ".router." in name for name in trained)


# Wrappers


@pytest.fixture
def process_group(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def prompt_tuning(model):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def compile_inner_model(model):
    model.model = torch.compile(model.model)
    return model


def compile_each_layer(model):
    for k, layer in enumerate(model.model.layers):
        model.model.layers[k] = torch.compile(layer)
    return model


def compile_in_place(model):
    model.compile()
    return model


def checkpoint_each_layer(model):
    layers = tuple(model.model.layers)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=CheckpointWrapper, check_fn=lambda module: module in layers
    )
    return model


def engine(model):
    """As DeepSpeed does, a plain module that holds the model as `module`."""
    return Plain(module=model)


WRAPPERS = {
    "torch.compile": torch.compile,
    "torch.compile in place": compile_in_place,
    "torch.compile of the inner model": compile_inner_model,
    "torch.compile of each layer": compile_each_layer,
    "checkpoint wrapper on each layer": checkpoint_each_layer,
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "engine": engine,
    "DDP of torch.compile": lambda m: DistributedDataParallel(torch.compile(m)),
    "torch.compile of DDP": lambda m: torch.compile(DistributedDataParallel(m)),
    "engine of DDP of torch.compile of layers": lambda m: engine(
        DistributedDataParallel(compile_each_layer(m))
    ),
}
PEFT_WRAPPERS = {
    "LoRA": lora,
    "prompt tuning": prompt_tuning,
    "torch.compile of LoRA": lambda m: torch.compile(lora(m)),
    "DDP of LoRA": lambda m: DistributedDataParallel(lora(m)),
    "torch.compile of DDP of LoRA": lambda m: torch.compile(DistributedDataParallel(lora(m))),
    "LoRA of torch.compile": lambda m: lora(torch.compile(m)),
    "LoRA of compiled layers": lambda m: lora(compile_each_layer(m)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", (WRAPPERS | PEFT_WRAPPERS).values(), ids=WRAPPERS | PEFT_WRAPPERS)
def test_wrapped_model_has_the_layers_of_the_model_inside(wrap):
    model = tiny("llama")
    layers = tuple(model.model.layers)
    wrapped = wrap(model)
    blocks = find_blocks(wrapped)
    assert blocks.path == "model.layers"
    assert tuple(unwrap(layer) for layer in blocks.modules) == layers
    assert unwrap(wrapped) is model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_and_tensors_do_not_depend_on_the_wrapper(wrap):
    model = tiny("llama")
    selection = select_layers(model, [0, 2], modules=["self_attn.q_proj", "mlp.*"])
    expected = {name: id(p) for name, p in selection.parameters(model).items()}
    wrapped = wrap(model)
    assert {name: id(p) for name, p in selection.parameters(wrapped).items()} == expected
    assert select_layers(wrapped, [0, 2], modules=["self_attn.q_proj", "mlp.*"]) == selection


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", PEFT_WRAPPERS.values(), ids=PEFT_WRAPPERS)
def test_selection_of_a_peft_model_holds_the_adapters_of_its_layers_and_nothing_else(wrap):
    model = tiny("llama")
    trained = select_layers(model, 1).parameters(wrap(model))
    has_adapters = wrap is not prompt_tuning  # which leaves the layers as they are
    expected = {
        id(p)
        for n, p in model.model.layers[1].named_parameters()
        if "lora_" in n or not has_adapters
    }
    assert {id(p) for p in trained.values()} == expected != set()
    assert all(name.startswith("model.layers.1.") for name in trained)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("model.layers.1._orig_mod.mlp.weight", "model.layers.1.mlp.weight"),
        ("model._fsdp_wrapped_module.layers.1.weight", "model.layers.1.weight"),
        ("layers.1._orig_mod._checkpoint_wrapped_module.weight", "layers.1.weight"),
        ("model.my_orig_mod.weight", "model.my_orig_mod.weight"),
        ("model.module.weight", "model.module.weight"),
    ],
)
def test_plain_name_drops_only_what_wrappers_around_submodules_add(name, plain):
    assert plain_name(name) == plain


# Models without one stack of decoder layers


def encoder_decoders():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = BartConfig(
        vocab_size=64, encoder_layers=2, decoder_layers=3, max_position_embeddings=64,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, forced_eos_token_id=2,
        decoder_start_token_id=2, **widths, **heads,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=2, num_decoder_layers=3
    )
    return {
        "BART": (
            BartForConditionalGeneration,
            bart,
            "'model.encoder.layers' (2), 'model.decoder.layers' (3)",
        ),
        "T5": (T5ForConditionalGeneration, t5, "'encoder.block' (2), 'decoder.block' (3)"),
    }


ENCODER_DECODERS = encoder_decoders()


@pytest.mark.parametrize(
    ("model_class", "config", "candidates"), ENCODER_DECODERS.values(), ids=ENCODER_DECODERS
)
def test_encoder_decoder_is_refused_with_both_stacks_named(model_class, config, candidates):
    with torch.device("meta"):
        model = model_class(config)
    message = f"{model_class.__name__} is an encoder-decoder.*{re.escape(candidates)}"
    with pytest.raises(ModelError, match=message):
        select_layers(model, 0)


@pytest.mark.parametrize(
    "config", [config for _, config, _ in ENCODER_DECODERS.values()], ids=ENCODER_DECODERS
)
def test_config_of_an_encoder_decoder_is_refused(config):
    with pytest.raises(ModelError, match=f"{type(config).__name__} describes an encoder-decoder"):
        select_layers(config, 0)


RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic")


def test_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="Linear has no decoder layers: none of its 1 modules"):
        select_layers(nn.Linear(2, 2), 0)


def test_stages_of_a_resnet_are_no_decoder_layers():
    with pytest.raises(ModelError, match="ResNet"):
        select_layers(ResNetModel(RESNET), 0)


@pytest.mark.parametrize(
    ("config", "num_layers"),
    [(RESNET, None), (LlamaConfig(num_hidden_layers=0), 0)],
    ids=["ResNet", "Llama without layers"],
)
def test_config_without_decoder_layers_is_refused(config, num_layers):
    name = type(config).__name__
    with pytest.raises(
        ModelError, match=f"{name} has no decoder layers.* is {num_layers}, expected"
    ):
        select_layers(config, 0)


@pytest.mark.parametrize("model", ["org/name", None, {}, LlamaConfig], ids=str)
def test_what_is_neither_model_nor_config_is_refused(model):
    with pytest.raises(ModelError, match=f"model or config, got {type(model).__name__}"):
        select_layers(model, 0)


def test_two_stacks_are_refused_with_both_named():
    model = Plain(left=linears(2), right=Plain(layers=linears(3)))
    with pytest.raises(ModelError, match=re.escape("Plain has no unambiguous stack")) as caught:
        select_layers(model, 0)
    assert "'left' (2), 'right.layers' (3)" in str(caught.value)


def test_two_stacks_as_deep_as_the_config_says_are_refused_with_both_named():
    model = Plain(left=linears(3), right=linears(3))
    model.config = tiny_config("llama", num_layers=3)
    with pytest.raises(ModelError, match=re.escape("'left' (3), 'right' (3)")):
        select_layers(model, 0)


def longcat(num_layers: int = 2):
    return AutoConfig.for_model(
        "longcat_flash",
        vocab_size=64,
        hidden_size=16,
        ffn_hidden_size=32,
        num_layers=num_layers,
        num_attention_heads=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        head_dim=4,
        v_head_dim=8,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        expert_ffn_hidden_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class TwiceConfig(LlamaConfig):
    """A config from outside transformers, whose model has twice its layers."""

    model_type = "layerrl_twice"


class Twice(LlamaForCausalLM):
    config_class = TwiceConfig

    def __init__(self, config):
        super().__init__(config)
        layers = (LlamaDecoderLayer(config, k) for k in range(2 * config.num_hidden_layers))
        self.model.layers = nn.ModuleList(layers)


@pytest.fixture
def twice():
    AutoConfig.register("layerrl_twice", TwiceConfig, exist_ok=True)
    AutoModelForCausalLM.register(TwiceConfig, Twice, exist_ok=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return TwiceConfig(num_hidden_layers=2, vocab_size=64, **sizes)


class TestConfigThatCountsOtherwiseThanItsModel:
    @pytest.mark.parametrize("family", ["longcat", "twice"])
    @pytest.mark.parametrize("layers", [1, -1, "middle", "all", "last:2", "50%:100%"], ids=str)
    def test_selects_what_the_model_selects(self, family, layers, request):
        config = longcat() if family == "longcat" else request.getfixturevalue("twice")
        model = AutoModelForCausalLM.from_config(config)
        selection = select_layers(model, layers)
        assert select_layers(config, layers) == selection
        assert layers_described(config) == selection.num_layers
        plans = [selection.plan(described, dtype=torch.float32) for described in (config, model)]
        assert plans[0] == plans[1]

    def test_by_path_a_trainer_selects_what_it_selects_by_instance(self, tmp_path):
        model = AutoModelForCausalLM.from_config(longcat())
        model.save_pretrained(tmp_path / "model")
        for layers in (1, -1, "last:1", iter([0, 1])):
            trainer = make(str(tmp_path / "model"), tmp_path, selection=layers)
            assert trainer.selection.num_layers == 2
        for layers in (2, -3, "last:3"):
            with pytest.raises(SelectionError, match=r"has 2 decoder layers|expected 1 to 2"):
                make(str(tmp_path / "model"), tmp_path, selection=layers)

    def test_is_refused_where_no_model_can_say(self, monkeypatch):
        def fail(config):
            raise ModelError("no such class")

        monkeypatch.setattr(blocks_module, "meta_model", fail)
        with pytest.raises(ModelError, match=r"num_hidden_layers \d+, beside {'num_layers': 2}"):
            select_layers(longcat(), 1)
        assert select_layers(tiny_config("llama", 4), 1).num_layers == 4


class TestReplacedForwards:
    """What others put in place of a forward meanwhile stays, and runs no stale code of ours."""

    def run(self, others, log):
        """A module whose forward is replaced around what others do to it; its forward then."""
        module = nn.Identity()

        def noting(_, forward):
            def run(*args):
                log.append("ours")
                return forward(*args)

            return run

        with replaced_forwards([module], noting):
            others(module)
            module(torch.ones(1))
        inside = log.copy()
        log.clear()
        module(torch.ones(1))
        return module, inside

    def test_own_is_back(self):
        log: list[str] = []
        module, inside = self.run(lambda module: None, log)
        assert (inside, log) == (["ours"], [])
        assert "forward" not in vars(module)

    def test_a_wrapper_around_ours_stays(self):
        log: list[str] = []

        def wrap(module):
            forward = module.forward

            def run(*args):
                log.append("theirs")
                return forward(*args)

            module.forward = run

        module, inside = self.run(wrap, log)
        assert (inside, log) == (["theirs", "ours"], ["theirs"])
        assert "forward" in vars(module)

    def test_one_that_was_taken_off_stays_off(self):
        log: list[str] = []

        def take_off(module):
            del module.forward

        module, inside = self.run(take_off, log)
        assert (inside, log) == ([], [])
        assert "forward" not in vars(module)
