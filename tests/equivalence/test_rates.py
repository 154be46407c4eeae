"""Boosts train exactly what plain TRL trains with parameter groups made by hand: bit for bit.

The rates of the groups follow rules written here and not taken from layerrl.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import PreTrainedModel, set_seed

from layerrl import select_layers
from layerrl.errors import SelectionError
from tests.devices import on_any_device, on_cpu
from tests.grpo import make
from tests.models import tiny

pytestmark = on_any_device
STEPS = 5
RATE, DECAY = 1e-2, 0.1

# Names of two families, as their model code has them.
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d)\.(self_attn|attn|mlp)?")
_HEAD, _EMBEDDINGS = "lm_head.weight", ("model.embed_tokens.weight", "transformer.wte.weight")


def by_keys(name: str) -> float | None:
    if name == _HEAD:
        return 0.25
    match = _LAYER.match(name)
    if not match or match[1] == "0":
        return None
    layer, part = match[1], (match[2] or "")
    if part == "mlp":
        return 0.5
    if layer == "2" and part.endswith("attn"):
        return 0.1
    return 2.0 if layer == "2" else 1.0


def decayed(name: str) -> float | None:
    if name in _EMBEDDINGS:
        return 0.9**3
    match = _LAYER.match(name)
    if match:
        return {"0": 0.9**2, "1": None, "2": 1.0}[match[1]]
    return 1.0 if name == _HEAD else None


def all_decayed(name: str) -> float:
    if name in _EMBEDDINGS:
        return 0.8**3
    match = _LAYER.match(name)
    return 0.8 ** (2 - int(match[1])) if match else 1.0


# What is selected, and by hand: the factor of the tensor of this name, None where it is frozen.
CASES: dict[str, tuple[dict[str, Any], Callable[[str], float | None]]] = {
    "keys": (
        {
            "layers": [1, 2],
            "also": "head",
            "boost": {2: 2.0, "mlp.*": 0.5, (2, "*attn.*"): 0.1, "head": 0.25},
        },
        by_keys,
    ),
    "decay": ({"layers": [0, 2], "also": ["embeddings", "head"], "boost": "decay:0.9"}, decayed),
    "full with decay": ({"layers": "full", "boost": "decay:0.8"}, all_decayed),
}
OPTIMIZERS = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8),
    "sgd": torch.optim.SGD,
}


def groups_by_hand(
    model: PreTrainedModel, factor_of: Callable[[str], float | None]
) -> list[dict[str, Any]]:
    """Freeze, and put tensors of one rate and weight decay into one group; matrices decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        factor = factor_of(name)
        parameter.requires_grad_(factor is not None)
        if factor is not None:
            groups[RATE * factor, DECAY if parameter.ndim > 1 else 0.0].append(parameter)
    return [
        {"params": tensors, "lr": rate, "weight_decay": decay}
        for (rate, decay), tensors in groups.items()
    ]


def stepped(trainer: Any) -> dict[str, Any]:
    """By name, all that the optimizer knows of a tensor: rates, weight decay, state."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    options = ("lr", "initial_lr", "weight_decay")
    return {
        names[id(p)]: [*(group[option] for option in options), trainer.optimizer.state.get(p, {})]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


def assert_equivalent(case: str, family: str, folder: Any, optim: str, **changes: Any) -> None:
    chosen, factor_of = CASES[case]
    ours, plain = (tiny(family, tie_word_embeddings=False) for _ in range(2))
    before = {name: on_cpu(tensor) for name, tensor in ours.state_dict().items()}
    changes = {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "optim": optim,
        "max_steps": STEPS,
        **changes,
    }

    selection = select_layers(ours, **chosen)
    masked = make(ours, folder / "ours", selection=selection, **changes)
    masked.train()
    optimizer = OPTIMIZERS[optim](groups_by_hand(plain, factor_of))
    by_hand = make(plain, folder / "plain", arguments={"optimizers": (optimizer, None)}, **changes)
    by_hand.train()

    assert masked.state.global_step == by_hand.state.global_step == STEPS
    after = {name: on_cpu(tensor) for name, tensor in ours.state_dict().items()}
    assert_close(after, {n: on_cpu(t) for n, t in plain.state_dict().items()}, rtol=0, atol=0)
    assert_close(stepped(masked), stepped(by_hand), rtol=0, atol=0)

    # Equal because both did nothing would also be equal.
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if factor_of(name) is not None}
    initial = {values[1] for values in stepped(masked).values()}
    assert initial == {RATE * factor for factor in map(factor_of, before) if factor is not None}
    assert len(initial) >= 3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_boosts_equal_groups_made_by_hand(tmp_path, family, case):
    assert_equivalent(case, family, tmp_path, "adamw_torch")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optim": "sgd", "max_grad_norm": 0.5}, id="sgd, clipped"),
        pytest.param({"lr_scheduler_type": "cosine", "warmup_steps": 2}, id="warm-up and cosine"),
        pytest.param(
            {"gradient_accumulation_steps": 2, "num_iterations": 2},
            id="accumulation and two iterations",
        ),
    ],
)
def test_boosts_equal_groups_made_by_hand_in_other_settings(tmp_path, changes):
    assert_equivalent("keys", "llama", tmp_path, **{"optim": "adamw_torch", **changes})


def lora_by_keys(name: str) -> float | None:
    """Of an adapter's tensor in PEFT's model."""
    if ".lora_" not in name:
        return None
    if ".layers.2." in name and "q_proj" in name:
        return 0.1
    return 0.5 if "mlp" in name else 2.0 if ".layers.2." in name else 1.0


def test_boosts_scale_adapters_as_groups_made_by_hand_do(tmp_path):
    targets = ["q_proj", "v_proj", "up_proj"]
    ours, plain = tiny("llama"), tiny("llama")
    changes = {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "optim": "adamw_torch",
        "max_steps": STEPS,
    }
    boost = {2: 2.0, "mlp.*": 0.5, (2, "self_attn.q_proj.weight"): 0.1}
    masked = make(
        ours,
        tmp_path / "ours",
        selection=select_layers(ours, [1, 2], boost=boost),
        arguments={"peft_config": LoraConfig(r=2, target_modules=targets)},
        **changes,
    )
    config = LoraConfig(r=2, target_modules=targets, layers_to_transform=[1, 2])
    by_hand = make(plain, tmp_path / "plain", arguments={"peft_config": config}, **changes)
    values = {n.replace(".default", ""): p for n, p in masked.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in by_hand.model.named_parameters():
            parameter.copy_(values[name.replace(".default", "")])
    groups = groups_by_hand(by_hand.model, lora_by_keys)
    by_hand.optimizer = OPTIMIZERS["adamw_torch"](groups)
    for trainer in (masked, by_hand):
        set_seed(0)
        trainer.train()

    found, expected = stepped(masked), stepped(by_hand)
    assert_close(found, expected, rtol=0, atol=0)
    assert {values[1] / RATE for values in found.values()} == {0.1, 0.5, 1.0, 2.0}
    assert_close(
        {name: on_cpu(tensor) for name, tensor in masked.model.state_dict().items()},
        {name: on_cpu(tensor) for name, tensor in by_hand.model.state_dict().items()},
        rtol=0,
        atol=0,
    )
    assert all(state["step"] == STEPS for *_, state in found.values())


def test_boost_of_what_has_no_adapter_is_refused(tmp_path):
    model = tiny("llama")
    selection = select_layers(model, 1, boost={"mlp": 2.0})
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(SelectionError, match=r"'mlp' .*layer 1 is self_attn\.q_proj\.weight, self"):
        make(model, tmp_path, selection=selection, arguments={"peft_config": config})
