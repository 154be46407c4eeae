"""Layers of a vision tower, and projectors, train as in plain TRL with flags set by hand."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from peft import LoraConfig
from transformers import set_seed

from layerrl import select_layers
from tests.devices import on_any_device
from tests.grpo import make
from tests.images import arguments, no_image, tiny_with_images
from tests.models import FAMILIES
from tests.runs import (
    NO_CHECKPOINTING,
    REENTRANT,
    assert_same_run,
    bits,
    load,
    metric,
    moved,
    saved,
    train,
)

pytestmark = on_any_device
STEPS = 3
Trains = Callable[[str, str], bool]


def in_tower(*layers: int, part: str = "") -> Trains:
    return lambda name, family: name.startswith(
        tuple(f"{FAMILIES[family].tower}.{layer}.{part}" for layer in layers)
    )


def in_projector(name: str, family: str) -> bool:
    return name.startswith(FAMILIES[family].projectors)


# What is selected, and by hand: does the tensor of this name train?
CASES: dict[str, tuple[dict[str, Any], Trains]] = {
    "last": ({"layers": -1, "stack": "vision"}, in_tower(1)),
    "modules": (
        {"layers": "all", "stack": "vision", "modules": "*norm*1.*"},
        lambda name, family: in_tower(0, 1)(name, family) and "norm1" in name.replace("_", ""),
    ),
    "layer and projector": (
        {"layers": 1, "stack": "vision", "also": "projector"},
        lambda name, family: in_tower(1)(name, family) or in_projector(name, family),
    ),
    "projector above the tower": ({"stack": "vision", "also": "projector"}, in_projector),
    "projector below the text": (
        {"layers": 2, "also": "projector"},
        lambda name, family: (
            name.startswith(f"{FAMILIES[family].path}.2.") or in_projector(name, family)
        ),
    ),
}


def trained_both_ways(
    tmp_path: Any, family: str, case: str, *, images: bool = True, **changes: Any
) -> tuple[Any, dict[str, Any], set[str]]:
    """A masked trainer that agreed with plain TRL, what its model was, and what should move."""
    chosen, trains = CASES[case]
    base = saved(tmp_path / "base", tiny_with_images(family))
    ours, by_hand = load(base), load(base)
    before = bits(ours)
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(trains(name, family))
    changes = {"max_steps": STEPS, **no_image(family), **changes}
    given = arguments(family, images=images)
    plain = make(by_hand, tmp_path / "plain", arguments=given, **changes)
    selection = select_layers(ours, **chosen)
    masked = make(ours, tmp_path / "ours", selection=selection, arguments=given, **changes)
    train(plain, masked)
    assert_same_run(masked, plain)
    return masked, before, {name for name in before if trains(name, family)}


@pytest.mark.parametrize(
    ("family", "case"),
    [*product(["gemma3", "qwen3_vl"], CASES), ("qwen2_5_vl", "layer and projector")],
)
def test_training_equals_plain_trl(tmp_path, family, case):
    masked, before, expected = trained_both_ways(tmp_path, family, case)
    assert masked.state.global_step == STEPS
    assert all(norm > 0 for norm in metric(masked, "grad_norm"))
    assert moved(masked, before) == expected


@pytest.mark.parametrize(
    "changes",
    [REENTRANT, NO_CHECKPOINTING, {"beta": 0.04, "num_iterations": 2}],
    ids=["reentrant", "no checkpointing", "reference and two passes"],
)
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_however_activations_are_kept_and_the_policy_is_compared(tmp_path, family, changes):
    masked, before, expected = trained_both_ways(tmp_path, family, "last", **changes)
    assert moved(masked, before) == expected


def test_adapters_in_the_tower_are_those_of_plain_peft(tmp_path):
    base = saved(tmp_path / "base", tiny_with_images("gemma3"))
    by_hand = r"model\.vision_tower\.encoder\.layers\.1\.self_attn\.(q_proj|v_proj)"
    made = []
    for targets in (by_hand, ["q_proj", "v_proj"]):
        model = load(base)
        chosen = (
            {} if targets is by_hand else {"selection": select_layers(model, 1, stack="vision")}
        )
        config = LoraConfig(r=2, target_modules=targets)
        given = {**arguments("gemma3"), "peft_config": config}
        set_seed(1)  # adapters start as random numbers
        made.append(make(model, tmp_path / "run", arguments=given, **chosen, **no_image("gemma3")))
    train(*made)
    plain, masked = made
    adapters = {n: t for n, t in bits(masked.model).items() if "lora_" in n}
    assert adapters
    assert_same_run(masked, plain)


def test_reentrant_checkpoints_of_a_tower_without_its_own_hook_do_not_lose_the_gradient(tmp_path):
    """Plain TRL trains nothing here: the tower of Qwen3-VL shows no embedding to transformers."""
    found = {}
    for name, changes in {"reentrant": REENTRANT, "plain": NO_CHECKPOINTING}.items():
        model = tiny_with_images("qwen3_vl")
        trainer = make(
            model,
            tmp_path / name,
            selection=select_layers(model, 1, stack="vision"),
            arguments=arguments("qwen3_vl"),
            max_steps=2,
            **no_image("qwen3_vl"),
            **changes,
        )
        train(trainer)
        found[name] = trainer
    assert_same_run(found["reentrant"], found["plain"])
    assert all(norm > 0 for norm in metric(found["reentrant"], "grad_norm"))


def test_prompts_without_an_image_run_and_train_nothing(tmp_path):
    masked, before, _ = trained_both_ways(tmp_path, "gemma3", "last", images=False)
    assert metric(masked, "grad_norm") == [0.0] * STEPS
    assert moved(masked, before) == set()
