"""`selection=` beside `peft_config=`: PEFT's adapters in chosen layers, with the same savings."""

import json
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, set_seed

from layerrl import contribution_probe, load_delta, select_layers
from layerrl.errors import DeltaError, LayerRLError, SelectionError
from layerrl.replay.state import state_of
from tests import trainers
from tests.engines import Engine, in_place_of_vllm
from tests.grpo import config, make, tokenizer
from tests.integration.test_auto import TRAIN, Counting, trainer
from tests.models import tiny
from tests.runs import bits, load, saved, train

LAYERS = [1, 2]
KINDS = {
    "LoRA": {},
    "dropout, rsLoRA": {"lora_dropout": 0.1, "use_rslora": True},
    "DoRA": {"use_dora": True},
    "several modules": {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "a module to save": {"modules_to_save": ["input_layernorm"]},
}
SETTINGS = {
    "beta=0": {},
    "a reference, two iterations": {"beta": 0.04, "num_iterations": 2},
    "without checkpointing": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "base")


def trainer_of(folder, name: str, selection: Any, config: Any, **changes: Any) -> Any:
    """A trainer on the model in the folder, whose adapters begin with the same random numbers."""
    set_seed(3)
    arguments = {"peft_config": config} if config is not None else {}
    arguments |= changes.pop("arguments", {})
    model = changes.pop("model", None) or load(folder)
    changes = {"max_steps": 5, **changes}
    output_dir = folder.parent / name
    return make(model, output_dir, selection=selection, arguments=arguments, **changes)


def assert_same_training(ours: Any, plain: Any) -> None:
    assert_close(bits(ours.model), bits(plain.model), rtol=0, atol=0)
    found, expected = ours.optimizer.state_dict(), plain.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys() != set()
    for key, state in expected["state"].items():
        assert_close(found["state"][key], state, rtol=0, atol=0)


class TestEquivalence:
    # Adapters with dropout are the only ones with random numbers for a setting to change; of the
    # other kinds, the setting that enters their layers in most ways stands for all.
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            *(("dropout, rsLoRA", settings) for settings in SETTINGS),
            *((kind, "a reference, two iterations") for kind in KINDS if kind[:7] != "dropout"),
            ("a module to save", "reentrant"),
        ],
    )
    def test_training_is_that_of_trl_with_layers_to_transform(self, folder, kind, settings):
        options, settings = {"r": 4, **KINDS[kind]}, {"max_steps": 3, **SETTINGS[settings]}
        ours = trainer_of(folder, "ours", LAYERS, LoraConfig(**options), **settings)
        before = bits(ours.model)
        if "modules_to_save" in options:  # which PEFT does not restrict to layers
            options["modules_to_save"] = [f"layers.{k}.input_layernorm" for k in LAYERS]
        by_hand = LoraConfig(layers_to_transform=LAYERS, **options)
        plain = trainer_of(folder, "plain", None, by_hand, **settings)
        train(ours, plain)
        assert_same_training(ours, plain)
        after = bits(ours.model)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved
        assert all("lora_" in name or "modules_to_save" in name for name in moved)
        assert {name.split(".layers.")[1][0] for name in moved} == {"1", "2"}
        if "num_iterations" in settings:
            assert ours.masked_run.replay.num_replayed > 0

    @pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral"])
    def test_of_other_families(self, tmp_path, family):
        folder = saved(tmp_path / "base", tiny(family, 4))
        targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
        config = LoraConfig(r=2, target_modules=targets)
        ours = trainer_of(folder, "ours", 2, config)
        by_hand = LoraConfig(r=2, target_modules=targets, layers_to_transform=[2])
        plain = trainer_of(folder, "plain", None, by_hand)
        train(ours, plain)
        assert_same_training(ours, plain)

    @pytest.mark.parametrize("name", ["DPO", "SFT", "KTO", "RLOO"])
    def test_of_other_trainers(self, folder, name):
        case = next(c for key, c in trainers.CASES.items() if key.split()[0] == name)
        found = []
        for where, selection, layers in [("ours", 2, None), ("plain", None, [2])]:
            set_seed(3)
            config = LoraConfig(r=2, layers_to_transform=layers)
            arguments = {"peft_config": config}
            trainer = case.make(folder, folder.parent / where, selection, arguments=arguments)
            train(trainer)
            found.append(trainer)
        assert_same_training(*found)

    def test_adapters_that_were_there_before_train_in_the_selected_layers(self, folder):
        settings = {"beta": 0.04, "num_iterations": 2}

        def adapted():
            set_seed(1)
            return get_peft_model(load(folder), LoraConfig(r=2, init_lora_weights=False))

        graded: set[str] = set()

        class Graded(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, model: Any, **given: Any) -> None:
                graded.update(n for n, p in model.named_parameters() if p.grad is not None)

        ours = trainer_of(folder, "ours", 2, None, model=adapted(), **settings)
        ours.add_callback(Graded())
        before = bits(ours.model)
        train(ours)
        after = bits(ours.model)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved
        assert all(".layers.2." in name and ".default." in name for name in moved)
        trains = {n for n, p in ours.model.named_parameters() if id(p) in {
            id(p) for g in ours.optimizer.param_groups for p in g["params"]
        }}  # fmt: skip
        assert trains == moved
        assert graded == moved  # though PEFT lets all adapters train when the reference was asked

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_parts_outside_the_layers_that_peft_saves(self, tmp_path, tied):
        folder = saved(tmp_path / "base", tiny("llama", 4, tie_word_embeddings=tied))
        also = ["head", "embeddings", "final_norm"] if tied else ["head", "final_norm"]
        saves = ["embed_tokens" if tied else "lm_head", "model.norm"]
        options = {"r": 2, "modules_to_save": saves, "ensure_weight_tying": tied}
        settings = {"beta": 0.04, "num_iterations": 2}
        selection = select_layers(load(folder), 2, also=also)
        ours = trainer_of(folder, "ours", selection, LoraConfig(**options), **settings)
        by_hand = LoraConfig(layers_to_transform=[2], **options)
        plain = trainer_of(folder, "plain", None, by_hand, **settings)
        before = bits(ours.model)
        train(ours, plain)
        assert_same_training(ours, plain)
        after = bits(ours.model)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert sum("modules_to_save" in name for name in moved) == (3 if tied else 2)  # two names

    def test_a_part_alone(self, folder):
        selection = select_layers(load(folder), also="head")
        config = LoraConfig(r=2, modules_to_save=["lm_head"])
        ours = trainer_of(folder, "ours", selection, config, beta=0.04)
        before = bits(ours.model)
        train(ours)
        after = bits(ours.model)
        [moved] = [name for name in after if not torch.equal(after[name], before[name])]
        assert moved.endswith("lm_head.modules_to_save.default.weight")
        assert ours.masked_run.replay.num_replayed > 0

    def test_modules_restrict_it_further(self, folder):
        selection = select_layers(load(folder), 1, modules="*.v_proj")
        ours = trainer_of(folder, "ours", selection, LoraConfig(r=2))
        assert {name for name, p in ours.model.named_parameters() if p.requires_grad} == {
            f"base_model.model.model.layers.1.self_attn.v_proj.lora_{x}.default.weight"
            for x in "AB"
        }

    def test_a_boost_scales_the_adapters_rates(self, folder):
        selection = select_layers(load(folder), LAYERS, boost={2: 3.0})
        ours = trainer_of(folder, "ours", selection, LoraConfig(r=2), learning_rate=1e-2)
        ours.create_optimizer()
        rates = {
            name: group["lr"]
            for group in ours.optimizer.param_groups
            for name, p in ours.model.named_parameters()
            if any(p is each for each in group["params"])
        }
        assert {(name.split(".layers.")[1][0], rate) for name, rate in rates.items()} == {
            ("1", 1e-2),
            ("2", 3e-2),
        }

    def test_experts_that_are_one_tensor(self, tmp_path):
        folder = saved(tmp_path / "base", tiny("mixtral", 4))
        options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ours = trainer_of(folder, "ours", 2, LoraConfig(**options))
        places = {n.split("lora_")[0] for n, p in ours.model.named_parameters() if p.requires_grad}
        assert all(".layers.2." in place for place in places)
        assert len(places) == 3
        train(ours)

    def test_a_quantised_base(self, tmp_path):
        size = {"hidden_size": 128, "intermediate_size": 256}
        folder = saved(tmp_path / "base", tiny("llama", 4, **size))
        packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

        def quantised():
            return AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing)

        options = {"r": 2, "target_modules": "all-linear"}
        ours = trainer_of(folder, "ours", 2, LoraConfig(**options), model=quantised())
        by_hand = {"r": 2, "target_modules": r"model\.layers\.2\..*_proj"}
        plain = trainer_of(folder, "plain", None, LoraConfig(**by_hand), model=quantised())
        before = bits(ours.model)
        train(ours, plain)
        moved = {n for n, t in bits(ours.model).items() if not torch.equal(t, before[n])}
        assert moved
        assert all(".layers.2." in name and "lora_" in name for name in moved)
        trained = [p for n, p in plain.model.named_parameters() if p.requires_grad]
        # TRL casts these adapters to bfloat16, and layerrl steps on them in float32.
        for p, q in zip(ours.masked_run.layers.parameters.values(), trained, strict=True):
            # Adam takes a whole step either way where rounding decides the sign of a gradient.
            same = torch.isclose(p.float(), q.float(), rtol=0.05, atol=5e-3)
            assert same.float().mean() > 0.99


def test_auto_chooses_among_the_layers_adapters(tmp_path):
    set_seed(3)
    ours = trainer(tmp_path, arguments={"peft_config": LoraConfig(r=2)}, beta=0.1)
    before = bits(ours.model)
    ours.train()
    after = bits(ours.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    [chosen] = ours.selection.layers
    assert moved
    assert all(f".layers.{chosen}." in name and "lora_" in name for name in moved)


def test_the_gradient_probe_ranks_layers_by_their_adapters(tmp_path):
    set_seed(3)
    report = contribution_probe(
        get_peft_model(tiny("llama", 4), LoraConfig(r=2)),
        layers=[0, 1, 3],
        method="gradient",
        reward_funcs=Counting(),
        train_dataset=TRAIN,
        processing_class=tokenizer(),
        args=config(tmp_path),
        budget=64,
    )
    assert [*report.scores] == [0, 1, 3]


def test_plans_and_settings_of_a_peft_model_are_those_of_its_base(folder):
    base = load(folder)
    selection = select_layers(base, 2)
    plan, settings = str(selection.plan(base)), selection.to_config("peft", base)
    skipped = selection.quantization_skip_modules(base)
    adapted = get_peft_model(base, LoraConfig(r=2))
    assert str(selection.plan(adapted)) == plan
    assert selection.to_config("peft", adapted) == settings
    assert selection.quantization_skip_modules(adapted) == skipped


class Average(TrainerCallback):
    """Keeps the sum of a trainer's adapters in another adapter, as TRL keeps its EMA teachers."""

    def on_train_begin(self, *_: Any, model: Any, **given: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            model.add_adapter("average", model.peft_config["default"])

    def on_step_end(self, *_: Any, model: Any, **given: Any) -> None:
        tensors = dict(model.named_parameters())
        for name in (n for n in tensors if ".average." in n):
            tensors[name].data += tensors[name.replace(".average.", ".default.")].data


def test_a_callback_may_keep_an_average_in_an_adapter(folder):
    averaged = trainer_of(folder, "averaged", 2, LoraConfig(r=2))
    averaged.add_callback(Average())
    train(averaged)
    plain = trainer_of(folder, "plain", 2, LoraConfig(r=2))
    train(plain)
    expected, found = bits(plain.model), bits(averaged.model)
    assert_close({name: found[name] for name in expected}, expected, rtol=0, atol=0)
    assert any(".average." in name for name in found)


def test_auto_chooses_beside_an_average_in_an_adapter(tmp_path):
    set_seed(3)
    ours = trainer(tmp_path, arguments={"peft_config": LoraConfig(r=2), "callbacks": [Average()]})
    ours.train()
    assert len(ours.selection.layers) == 1


class TestSavings:
    def test_another_adapter_in_the_prefix_is_another_prefix(self, folder):
        model = get_peft_model(load(folder), LoraConfig(r=2))
        model.add_adapter("other", LoraConfig(r=2))
        prefix = [model.get_base_model().model.layers[0]]
        states = []
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            states.append(state_of(prefix))
        assert states[0] == states[2] != states[1]

    def test_backward_ends_at_the_first_adapter(self, folder):
        ours = trainer_of(folder, "ours", 2, LoraConfig(r=2), max_steps=1)
        visited = []
        layers = ours.model.get_base_model().model.layers
        for index, layer in enumerate(layers):
            layer.register_full_backward_hook(lambda *_, k=index: visited.append(k))
        train(ours)
        assert set(visited) == {2, 3}

    def test_the_users_config_is_not_changed(self, folder):
        config = LoraConfig(r=2, target_modules=["q_proj"])
        before = config.to_dict()
        trainer_of(folder, "ours", 2, config)
        assert config.to_dict() == before


class TestCheckpoints:
    def test_hold_adapters_alone_which_plain_peft_loads(self, folder):
        ours = trainer_of(folder, "ours", 2, LoraConfig(r=2), save_strategy="steps", save_steps=3)
        train(ours)
        ids = torch.arange(4, 24).reshape(2, 10)
        checkpoint = folder.parent / "ours" / "checkpoint-5"
        assert (checkpoint / "adapter_model.safetensors").stat().st_size < 20_000
        assert not (checkpoint / "model.safetensors").exists()
        assert not (checkpoint / "delta.safetensors").exists()
        config = json.loads((checkpoint / "adapter_config.json").read_text())
        assert all(".layers.2." in f".{name}" for name in config["target_modules"])
        loaded = PeftModel.from_pretrained(load(folder), checkpoint)
        with torch.no_grad():
            expected = ours.model.eval()(ids).logits
            assert_close(loaded.eval()(ids).logits, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("settings", [{}, {"beta": 0.04, "num_iterations": 2}])
    def test_resumed_training_is_uninterrupted_training(self, folder, settings):
        whole = trainer_of(
            folder, "whole", 2, LoraConfig(r=2), save_strategy="steps", save_steps=2, **settings
        )
        train(whole)
        rest = trainer_of(folder, "rest", 2, LoraConfig(r=2), **settings)
        train(rest, resume_from_checkpoint=str(folder.parent / "whole" / "checkpoint-2"))
        assert_close(bits(rest.model), bits(whole.model), rtol=0, atol=0)

    def test_lie_beside_a_delta_of_another_run(self, folder):
        ours = trainer_of(folder, "ours", 2, LoraConfig(r=2), max_steps=1)
        out = folder.parent / "out"
        make(load(folder), folder.parent / "whole", selection=1).save_delta(out)
        ours.save_model(str(out))
        assert load_delta(load(folder), out).layers == (1,)
        assert (out / "adapter_model.safetensors").is_file()

    @pytest.mark.parametrize(("names", "beta"), [(["mine"], 0.0), (["default", "second"], 0.04)])
    def test_of_adapters_of_any_name_are_resumed(self, folder, names, beta):
        def run(name: str, **changes: Any) -> Any:
            set_seed(3)
            model = get_peft_model(load(folder), LoraConfig(r=2), adapter_name=names[0])
            for another in names[1:]:
                model.add_adapter(another, LoraConfig(r=4))
            model.set_adapter(names[-1])
            return trainer_of(folder, name, 2, None, model=model, beta=beta, **changes)

        whole = run("whole", save_strategy="steps", save_steps=2, max_steps=4)
        train(whole)
        rest = run("rest", max_steps=4)
        train(rest, resume_from_checkpoint=str(folder.parent / "whole" / "checkpoint-2"))
        assert_close(bits(rest.model), bits(whole.model), rtol=0, atol=0)
        best = run("best")
        best.state.best_model_checkpoint = str(folder.parent / "whole" / "checkpoint-4")
        best._load_best_model()
        own = [name for name in bits(best.model) if f".{names[-1]}." in name]
        expected = {name: bits(whole.model)[name] for name in own}
        assert_close({name: bits(best.model)[name] for name in own}, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("selection", "options"),
        [(1, {}), ([1, 2], {}), (2, {"r": 4}), (2, {"lora_alpha": 3}), (2, {"use_dora": True})],
    )
    def test_of_other_adapters_are_refused(self, folder, selection, options):
        train(trainer_of(folder, "whole", 2, LoraConfig(r=2), save_strategy="steps", save_steps=2))
        rest = trainer_of(folder, "rest", selection, LoraConfig(**{"r": 2, **options}))
        before = bits(rest.model)
        with pytest.raises(DeltaError, match="holds other adapters than this run trains"):
            rest.train(resume_from_checkpoint=str(folder.parent / "whole" / "checkpoint-2"))
        assert_close(bits(rest.model), before, rtol=0, atol=0)

    def test_on_another_base_are_refused(self, folder):
        train(trainer_of(folder, "whole", 2, LoraConfig(r=2), save_strategy="steps", save_steps=2))
        checkpoint = folder.parent / "whole" / "checkpoint-2"
        other = load(folder)
        other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        rest = trainer_of(folder, "rest", 2, LoraConfig(r=2), model=other)
        before = bits(rest.model)
        with pytest.raises(DeltaError, match="were trained on another base: the frozen tensors"):
            rest.train(resume_from_checkpoint=str(checkpoint))
        assert_close(bits(rest.model), before, rtol=0, atol=0)
        (checkpoint / "adapted_base.json").unlink()  # as plain TRL writes it
        train(rest, resume_from_checkpoint=str(checkpoint))

    def test_of_no_adapters_are_refused(self, folder):
        train(make(load(folder), folder.parent / "whole", selection=2, save_strategy="steps"))
        rest = trainer_of(folder, "rest", 2, LoraConfig(r=2))
        [checkpoint, *_] = sorted((folder.parent / "whole").glob("checkpoint-*"))
        with pytest.raises(DeltaError, match="holds the delta of layers"):
            rest.train(resume_from_checkpoint=str(checkpoint))

    def test_a_delta_is_refused(self, folder):
        ours = trainer_of(folder, "ours", 2, LoraConfig(r=2), max_steps=1)
        with pytest.raises(SelectionError, match=r"adapters were trained on layer 2 of 4.*save_mo"):
            ours.save_delta(folder.parent / "delta")


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_is_sent_the_merged_layers_alone(folder, monkeypatch, mode):
    with in_place_of_vllm(monkeypatch):
        ours = trainer_of(folder, "ours", 2, LoraConfig(r=2), use_vllm=True, vllm_mode=mode)
        before = bits(ours.model)
        train(ours)
        everything, *later = Engine.latest.syncs
        names = {name for name, _ in load(folder).named_parameters()}
        assert {*everything} == names
        assert later
        for sent in later:
            assert {*sent} == {n for n in names if ".layers.2.self_attn." in n}
        # PEFT's own way of taking adapters off again would have rounded them.
        after = bits(ours.model)
        assert all(torch.equal(after[n], before[n]) for n in after if "lora_" not in n)
        ours.vllm_generation.sync_weights()
        ids = torch.arange(4, 24).reshape(2, 10)
        with torch.no_grad():
            expected = ours.model.eval()(ids).logits
            assert_close(Engine.latest.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


BAD = {
    "layers outside": (
        {"peft_config": LoraConfig(r=2, layers_to_transform=[0, 2])},
        r"layers_to_transform=\[0, 2\] names layers \[0\] outside the selection",
    ),
    "prompt tuning": (
        {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
        "PromptTuningConfig adapts no modules of layers",
    ),
    "biases": ({"peft_config": LoraConfig(r=2, bias="all")}, "bias='all' also trains biases"),
    "a head outside": (
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"])},
        "target_modules has 'lm_head', which lies outside",
    ),
    "a saved head outside": (
        {"peft_config": LoraConfig(r=2, modules_to_save=["lm_head"])},
        "modules_to_save has 'lm_head', which lies outside",
    ),
    "no such module": (
        {"peft_config": LoraConfig(r=2, target_modules=["wqkv"])},
        "PEFT refuses the peft_config for this model: .*wqkv",
    ),
    "parameters outside": (
        {"peft_config": LoraConfig(r=2, target_parameters=["embed_tokens.weight"])},
        "target_parameters has 'embed_tokens.weight', which lies outside",
    ),
    "another layer by name": (
        {"peft_config": LoraConfig(r=2, target_modules=["2.self_attn.q_proj", "1.mlp.up_proj"])},
        "target_modules has '1.mlp.up_proj', which lies outside",
    ),
    "nothing of the layer": (
        {"peft_config": LoraConfig(r=2, layers_to_transform=[2]), "selection": [1, 2]},
        "and the peft_config do not meet: layers",
    ),
    "full": ({"peft_config": LoraConfig(r=2), "selection": "full"}, '"all" for adapters in every'),
    "no such layer": ({"peft_config": LoraConfig(r=2), "selection": 9}, "layer 9 does not exist"),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD)
    def test_is_one_sentence_and_changes_nothing(self, folder, case):
        given, message = BAD[case]
        selection = given.get("selection", 2)
        arguments = {"peft_config": given["peft_config"]}
        model = load(folder)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(LayerRLError, match=message):
            make(model, folder.parent / "run", selection=selection, arguments=arguments)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    @pytest.mark.parametrize("name", ["target_modules", "modules_to_save"])
    def test_a_name_that_matches_nothing_is_said_with_what_there_is(self, folder, name):
        found = {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}
        peft_config = LoraConfig(r=2, **found | {name: [*found[name], "wqkv"]})
        arguments = {"peft_config": peft_config}
        message = rf"{name} has 'wqkv', which matches nothing .* have self_attn.q_proj, .*down_proj"
        with pytest.warns(UserWarning, match=message) as caught:
            make(load(folder), folder.parent / "run", selection=2, arguments=arguments)
        assert sum("matches nothing" in str(each.message) for each in caught) == 1

    def test_names_that_peft_knows_under_others_are_not_said(self, tmp_path):
        experts = saved(tmp_path / "experts", tiny("mixtral", 4))
        arguments = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "w1", "w3", "w2"])}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make(load(experts), tmp_path / "run", selection=2, arguments=arguments)
        assert not [each for each in caught if "matches nothing" in str(each.message)]

    def test_a_peft_model_without_adapters_in_the_layers(self, folder):
        model = get_peft_model(load(folder), LoraConfig(r=2, layers_to_transform=[0]))
        with pytest.raises(SelectionError, match=r"none that is active in layers \[2\]"):
            make(model, folder.parent / "run", selection=2)

    def test_a_peft_model_of_prompts(self, folder):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(SelectionError, match="a PEFT model of PromptTuningConfig"):
            make(get_peft_model(load(folder), config), folder.parent / "run", selection=2)

    @pytest.mark.parametrize("name", ["GRPO", "DPO"])
    def test_no_adapter_that_trl_makes_a_reference_of(self, folder, name):
        case = trainers.CASES[name]
        args = case.config(str(folder.parent / "run"), beta=0.04, **trainers.QUIETLY)
        model = get_peft_model(load(folder), LoraConfig(r=2), adapter_name="mine")
        before = bits(model)
        with pytest.raises(SelectionError, match=r"with the adapters \['mine'\] .*'default'"):
            case.masked(
                model,
                args=args,
                train_dataset=Dataset.from_dict(case.rows),
                processing_class=tokenizer(),
                selection=2,
                **case.arguments(),
            )
        assert_close(bits(model), before, rtol=0, atol=0)

    def test_several_adapters_at_once(self, folder):
        model = get_peft_model(load(folder), LoraConfig(r=2))
        model.add_adapter("other", LoraConfig(r=2))
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(SelectionError, match=r"2 active adapters, \['default', 'other'\]"):
            make(model, folder.parent / "run", selection=2)

    def test_adapters_that_are_switched_off(self, folder):
        model = get_peft_model(load(folder), LoraConfig(r=2))
        model.disable_adapter_layers()
        with pytest.raises(SelectionError, match="adapters are switched off"):
            make(model, folder.parent / "run", selection=2)

    def test_adapters_that_peft_has_not_wrapped(self, folder):
        model = load(folder)
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        inject_adapter_in_model(config, model)
        with pytest.raises(SelectionError, match="that PEFT has not wrapped"):
            make(model, folder.parent / "run", selection=2)

    def test_adapters_that_come_later(self, folder):
        ours = make(load(folder), folder.parent / "run", selection=2, max_steps=1)
        ours.model = get_peft_model(ours.model, LoraConfig(r=2))
        with pytest.raises(SelectionError, match="has been given PEFT adapters since"):
            ours.train()
