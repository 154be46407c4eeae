"""The layers of a vision tower and the projector of a model, as `stack` and `also` choose them."""

import json
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, MllamaConfig

from layerrl import (
    LayerSelection,
    contribution_probe,
    load_delta,
    merge_delta,
    select_layers,
)
from layerrl.activations import backward_from_first_trained
from layerrl.errors import ModelError, ProbeError, SelectionError
from layerrl.selection.towers import blocks_of
from layerrl.trainer import LayerSchedule
from layerrl.trainer.arguments import warn_of_idle_layers
from tests.engines import Engine, in_place_of_vllm
from tests.grpo import make
from tests.images import arguments, no_image, tiny_with_images
from tests.models import FAMILIES, VISION_FAMILIES, Plain, linears, tiny, tiny_config
from tests.runs import REENTRANT, bits, load, saved

each_family = pytest.mark.parametrize("family", VISION_FAMILIES)


def trained(model: nn.Module, *layers: Any, **options: Any) -> set[str]:
    return {*select_layers(model, *layers, **options).parameters(model)}


def in_layer(model: nn.Module, family: str, layer: int) -> set[str]:
    inside = f"{FAMILIES[family].tower}.{layer}."
    return {name for name, _ in model.named_parameters() if name.startswith(inside)}


def in_projectors(model: nn.Module, family: str) -> set[str]:
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if name.startswith(FAMILIES[family].projectors)}


class TestStack:
    @each_family
    def test_vision_numbers_and_trains_the_layers_of_the_tower(self, family):
        model = tiny(family, 3, vision_layers=5)
        selection = select_layers(model, "middle", stack="vision")
        assert (selection.num_layers, selection.layers) == (5, (2,))
        names = {*selection.parameters(model)}
        assert names == in_layer(model, family, 2)
        assert names
        assert blocks_of(model, "vision").path == FAMILIES[family].tower

    @each_family
    def test_of_a_config_is_that_of_its_model(self, family):
        config = tiny_config(family, 3, vision_layers=5)
        chosen = select_layers(config, [1, -1], stack="vision", also="projector")
        assert chosen == select_layers(
            tiny(family, 3, vision_layers=5), [1, 4], stack="vision", also="projector"
        )

    def test_does_not_take_mergers_for_layers_where_there_are_as_many(self):
        model = tiny("qwen3_vl", vision_layers=1)
        assert len(model.model.visual.deepstack_merger_list) == 1
        assert trained(model, "all", stack="vision") == in_layer(model, "qwen3_vl", 0)

    def test_text_is_the_default_and_is_not_written(self):
        config = tiny_config("gemma3", 2)
        default, named = select_layers(config, 1), select_layers(config, 1, stack="text")
        assert default == named
        assert "stack" not in default.to_json()
        assert "format_version" not in default.to_json()
        # As many layers, and yet another selection.
        assert select_layers(config, 1, stack="vision") != default

    def test_vision_goes_through_json_in_the_second_format(self):
        config = tiny_config("gemma3", 2)
        selection = select_layers(config, 1, stack="vision")
        data = json.loads(selection.to_json())
        assert (data["stack"], data["format_version"]) == ("vision", 2)
        assert LayerSelection.from_json(selection.to_json()) == selection

    def test_is_that_of_a_selection_which_is_given(self):
        model = tiny("gemma3", 2)
        selection = select_layers(model, 1, stack="vision")
        assert select_layers(model, selection) == selection
        assert select_layers(model, selection, stack="vision") == selection
        problem = "stack is 'text', but layers is vision layer 1 of 2: .* the vision layers"
        with pytest.raises(SelectionError, match=problem):
            select_layers(model, selection, stack="text")

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"layers": [0, 1]}, "vision layers 0-1 of 2"),
            ({"layers": 1, "also": "projector"}, "vision layer 1 of 2, also projector"),
            ({"also": "projector"}, "no vision layer of 2, also projector"),
        ],
    )
    def test_is_said(self, options, text):
        assert str(select_layers(tiny_config("llava"), stack="vision", **options)) == text

    @pytest.mark.parametrize("stack", ["audio", "Vision", "", 3, ["vision"]])
    def test_of_another_name_is_refused(self, stack):
        problem = re.escape(f'stack is {stack!r}, expected "text" or "vision"')
        with pytest.raises(SelectionError, match=problem):
            select_layers(tiny_config("llava"), 1, stack=stack)
        with pytest.raises(SelectionError, match=problem):
            LayerSelection(num_layers=2, layers=(1,), stack=stack)

    @pytest.mark.parametrize("model", [tiny("llama"), tiny_config("llama"), tiny("llama").model])
    def test_vision_of_a_model_without_a_tower_is_refused(self, model):
        with pytest.raises(ModelError, match=r"Llama\w+ is no decoder-only model with a vision"):
            select_layers(model, 1, stack="vision")

    def test_vision_of_what_is_not_of_transformers_is_refused(self):
        with pytest.raises(ModelError, match="Plain is no decoder-only model with a vision tower"):
            select_layers(Plain(layers=linears(3)), 1, stack="vision")

    def test_that_is_ambiguous_lists_its_candidates(self):
        config = MllamaConfig(architectures=["MllamaForConditionalGeneration"])
        with pytest.raises(ModelError) as error:
            select_layers(config, 1, stack="vision")
        text = str(error.value)
        assert "MllamaForConditionalGeneration, 'model.vision_model', has no unambiguous" in text
        assert "'model.vision_model.transformer.layers' (32)" in text
        assert "'model.vision_model.global_transformer.layers' (8)" in text

    @pytest.mark.parametrize(
        ("layers", "problem"),
        [
            (2, "layer 2 does not exist: Gemma3.* has 2 vision layers .0 to 1. under 'model.vis"),
            ("full", '"full" trains every parameter: it takes no .*stack'),
            (None, "no layers given"),
        ],
    )
    def test_of_layers_that_are_not_there_is_refused(self, layers, problem):
        with pytest.raises(SelectionError, match=problem):
            select_layers(tiny("gemma3"), layers, stack="vision")

    def test_of_a_deeper_tower_is_refused(self):
        selection = select_layers(tiny_config("gemma3", vision_layers=3), 1, stack="vision")
        problem = "made for 3 vision layers, but .* has 2 vision layers"
        with pytest.raises(SelectionError, match=problem):
            selection.parameters(tiny("gemma3"))


class TestProjector:
    @each_family
    def test_is_all_between_the_tower_and_the_text(self, family):
        model = tiny(family)
        expected = in_projectors(model, family)
        assert expected
        for stack in ("text", "vision"):
            assert trained(model, also="projector", stack=stack) == expected

    def test_of_qwen3_vl_is_the_merger_and_those_of_deepstack(self):
        names = trained(tiny("qwen3_vl"), also="projector")
        parents = {".".join(name.split(".")[:4]) for name in names}
        assert "model.visual.deepstack_merger_list.0" in parents
        assert any(parent.startswith("model.visual.merger.") for parent in parents)

    @pytest.mark.parametrize(
        "kind", ["idefics3", "smolvlm", "internvl", "paligemma", "mistral3", "qwen2_vl", "glm4v"]
    )
    def test_has_one_of_transformers_names_in_other_families(self, kind):
        config = AutoConfig.for_model(kind)
        config.get_text_config().pad_token_id = 0  # older defaults lie outside the vocabulary
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        names = trained(model, also="projector")
        assert names
        tower = blocks_of(model, "vision")
        assert not any(name.startswith(f"{tower.path}.") for name in names)
        assert not any("language_model" in name or "text_model" in name for name in names)

    def test_of_a_text_model_is_refused(self):
        with pytest.raises(SelectionError, match="LlamaForCausalLM has nothing that also='proj"):
            select_layers(tiny("llama"), 1, also="projector")

    def test_replays_nothing_of_a_tower(self):
        selection = select_layers(tiny_config("gemma3", vision_layers=3), 2, stack="vision")
        assert (selection.first, selection.frozen_prefix) == (2, range(0))

    def test_leaves_the_tower_s_layers_a_prefix_and_the_text_s_none(self):
        model = tiny("gemma3")
        assert not select_layers(model, 1, stack="vision", also="projector").trains_below
        assert select_layers(model, 1, also="projector").trains_below
        assert select_layers(model, 1, stack="vision", also="*.embeddings.*").trains_below

    def test_final_norm_and_head_are_those_of_the_text_whatever_the_stack(self):
        model = tiny("gemma3", tie_word_embeddings=False)
        assert trained(model, also="final_norm", stack="vision") == {
            "model.language_model.norm.weight"
        }

    def test_a_message_about_a_tower_s_names_is_short(self):
        model = tiny("gemma3", vision_layers=20)
        with pytest.raises(SelectionError, match=r"and \d+ others$") as error:
            select_layers(model, 1, also="no.such.*")
        assert len(str(error.value)) < 1500


class TestBackward:
    """Of the tower, as little as there is to train; of the text, all."""

    @pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
    @pytest.mark.parametrize("checkpointed", [True, False])
    def test_ends_at_the_first_trained_layer_of_the_tower(self, family, checkpointed):
        model = tiny_with_images(family, vision_layers=3)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
        selection = select_layers(model, 1, stack="vision")
        enters, computed = [], []
        blocks = blocks_of(model, "vision").modules
        for block in blocks:
            block.register_forward_pre_hook(lambda _, args: enters.append(args[0].requires_grad))
        next(blocks[0].children()).register_forward_pre_hook(lambda *_: computed.append(1))
        batch = processed(family)
        with selection.masked(model), backward_from_first_trained(model, selection):
            loss = model.train()(**batch).logits.square().mean()
            assert loss.requires_grad
            loss.backward()
        assert enters[:3] == [False, False, True]
        assert computed == [1]  # not again in the backward
        assert {name for name, p in model.named_parameters() if p.grad is not None} == in_layer(
            model, family, 1
        )
        after = {name: len(m._forward_hooks) for name, m in model.named_modules()}
        assert after == hooks

    def test_keeps_the_hook_of_the_text(self):
        """Rows without an image have no other gradient, and their backward would fail."""
        model = tiny_with_images("gemma3")
        model.gradient_checkpointing_enable(REENTRANT["gradient_checkpointing_kwargs"])
        model.enable_input_require_grads()
        selection = select_layers(model, 1, stack="vision")
        ids = torch.tensor([[5, 9, 11, 3]])
        with selection.masked(model), backward_from_first_trained(model, selection):
            model.train()(input_ids=ids).logits.square().mean().backward()
        assert all(p.grad is None for p in model.parameters())


class TestFeatures:
    """LLaVA takes what leaves the last layer of its tower but one."""

    @pytest.mark.parametrize("taken", [-2, -1, [0, 2], 3])
    def test_layers_above_those_that_are_taken_are_named(self, recwarn, taken):
        config = tiny_config("llava", vision_layers=3)
        config.image_token_index, config.vision_feature_layer = 5, taken
        width = 16 * len(taken) if isinstance(taken, list) else 16
        model = AutoModelForImageTextToText.from_config(config)
        assert model.model.multi_modal_projector.linear_1.in_features == width
        pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
        ids = torch.tensor([[7] + [5] * 4 + [9]])
        blocks, idle = blocks_of(model, "vision").modules, []
        model(input_ids=ids, pixel_values=pixels).logits.square().mean().backward()
        for layer, block in enumerate(blocks):
            if all(p.grad is None for p in block.parameters()):
                idle.append(layer)
            warn_of_idle_layers(model, select_layers(model, layer, stack="vision"))
        found = [re.search(r"\[(\d)\] will get no gradient", str(w.message)) for w in recwarn]
        assert [int(match[1]) for match in found if match] == idle
        warn_of_idle_layers(model, select_layers(model, "all"))
        assert len(recwarn) == len(found)


def processed(family: str) -> dict[str, Any]:
    """A batch of two prompts with images, as a trainer's processor makes it."""
    given = arguments(family)
    rows = given["train_dataset"][:2]
    words = given["processing_class"]
    text = [
        words.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "abc"}]}],
            tokenize=False,
        )
        for _ in rows["prompt"]
    ]
    images = [[image] for image in rows["image"]]
    return {**words(text=text, images=images, padding=True, return_tensors="pt")}


class TestPlan:
    @each_family
    def test_counts_bytes_exactly_and_says_what_it_does_not_cost(self, family):
        model = tiny(family, 3, vision_layers=4)
        selection = select_layers(model, 1, stack="vision", also="projector")
        plan = selection.plan(model, beta=0.04)
        num_bytes = sum(p.nbytes for p in selection.parameters(model).values())
        assert plan.weights == sum(p.nbytes for p in model.parameters())
        assert plan.gradients == plan.reference == num_bytes
        assert plan.optimizer == 2 * num_bytes
        assert plan.step_by_layer == ()
        assert "the vision tower's, which depends on the images, is not counted" in str(plan)
        assert plan == selection.plan(tiny_config(family, 3, vision_layers=4), beta=0.04)

    def test_runs_the_backward_through_all_of_the_text_whichever_layer_trains(self):
        config = tiny_config("gemma3", 3)
        steps = {select_layers(config, k, stack="vision").plan(config).step for k in (0, 1)}
        assert len(steps) == 1
        alone = select_layers(config, 0).plan(config)
        assert select_layers(config, 2).plan(config).step < steps.pop() < alone.step
        assert alone.uncounted == ""


class TestElsewhere:
    def test_other_tools_are_told_the_tower_s_names(self):
        model = tiny("gemma3")
        selection = select_layers(model, 1, stack="vision")
        inside = f"{FAMILIES['gemma3'].tower}.1."
        assert selection.to_config("ms-swift", model)["trainable_parameters"] == [inside]
        assert selection.to_config("axolotl", model) == {"unfrozen_parameters": [f"^{inside}"]}
        targets = selection.to_config("peft", model)["target_modules"]
        assert targets
        assert all(target.startswith(inside) for target in targets)

    def test_a_quantisation_leaves_out_the_tower_s_modules(self):
        config = tiny_config("gemma3")
        names = select_layers(config, 1, stack="vision").quantization_skip_modules(config)
        assert f"{FAMILIES['gemma3'].tower}.1.self_attn.q_proj" in names
        assert FAMILIES["gemma3"].tower + ".1" not in names

    def test_a_probe_refuses_it(self):
        model = tiny("gemma3")
        selection = select_layers(model, "all", stack="vision")
        with pytest.raises(ProbeError, match="vision layers 0-1 of 2: the layers of the text"):
            contribution_probe(model, method="position", layers=selection)

    def test_a_schedule_refuses_it(self, tmp_path):
        model = tiny_with_images("gemma3")
        trainer = make(
            model,
            tmp_path,
            selection=select_layers(model, "all", stack="vision"),
            arguments={**arguments("gemma3"), "callbacks": [LayerSchedule([0, 1], every=1)]},
            **no_image("gemma3"),
        )
        with pytest.raises(SelectionError, match="Those of a vision tower do not take turns"):
            trainer.train()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_a_delta_of_the_tower_goes_back_into_its_base(tmp_path, family):
    base = saved(tmp_path / "base", tiny_with_images(family))
    model = load(base)
    selection = select_layers(model, 1, stack="vision", also="projector")
    trainer = make(
        model, tmp_path, selection=selection, arguments=arguments(family), **no_image(family)
    )
    trainer.train()
    trainer.save_delta(tmp_path / "delta")
    fresh = load(base)
    load_delta(fresh, tmp_path / "delta")
    merge_delta(base, tmp_path / "delta", tmp_path / "merged")
    expected = bits(model)
    for other in (fresh, load(tmp_path / "merged")):
        torch.testing.assert_close(bits(other), expected, rtol=0, atol=0)
    recorded = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert LayerSelection.from_json(json.dumps(recorded["selection"])) == selection
    assert "vision layer 1 of 2" in (tmp_path / "delta" / "README.md").read_text()


def test_vllm_is_sent_the_tower_s_tensors_alone(tmp_path, monkeypatch):
    base = saved(tmp_path / "base", tiny_with_images("gemma3"))
    model = load(base)
    selection = select_layers(model, 1, stack="vision", also="projector")
    with in_place_of_vllm(monkeypatch):
        trainer = make(
            model,
            tmp_path,
            selection=selection,
            arguments=arguments("gemma3", images=False),
            use_vllm=True,
            vllm_mode="colocate",
        )
        Engine.latest.model = load(base)
        trainer.train()
        first, *others = Engine.latest.syncs
    assert {*first} == {name for name, _ in model.named_parameters()}
    assert [{*names} for names in others] == [{*selection.parameters(model)}] * 2
