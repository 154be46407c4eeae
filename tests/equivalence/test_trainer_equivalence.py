"""A selection trains exactly what plain TRL trains: bit for bit, optimizer state included.

`"full"` is compared with the plain trainer, every other selection with `requires_grad` set by hand
on the plain trainer, by rules written here and not taken from layerrl.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from layerrl import select_layers
from layerrl.errors import SelectionError
from tests.devices import on_any_device, on_cpu
from tests.grpo import make
from tests.models import FAMILIES, tiny

pytestmark = on_any_device
STEPS = 3  # one with a new optimizer, one with its state, one of weights that came of both


def in_layers(*layers: int) -> Callable[[str, str], bool]:
    return lambda name, path: name.startswith(tuple(f"{path}.{layer}." for layer in layers))


def attention_of_layers(*layers: int) -> Callable[[str, str], bool]:
    return lambda name, path: name.startswith(
        tuple(f"{path}.{layer}.{part}." for layer in layers for part in ("self_attn", "attn"))
    )


def outside(*parts: str) -> Callable[[str, str], bool]:
    """Parts by the ends of their names in the families of these tests."""
    return lambda name, path: not name.startswith(path) and name.endswith(parts)


HEAD, NORM = ("lm_head.weight",), ("norm.weight", "ln_f.weight", "ln_f.bias")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")

# What is selected, and by hand: does the tensor of this name train?
CASES = {
    "full": ({"layers": "full"}, lambda name, path: True),
    "all": ({"layers": "all"}, in_layers(0, 1, 2)),
    "one layer": ({"layers": 1}, in_layers(1)),
    "two layers": ({"layers": [1, 2]}, in_layers(1, 2)),
    "modules": ({"layers": [0, -1], "modules": "*attn.*"}, attention_of_layers(0, 2)),
    "head alone": ({"also": "head"}, outside(*HEAD)),
    "layer and above": (
        {"layers": 1, "also": ["head", "final_norm"]},
        lambda name, path: in_layers(1)(name, path) or outside(*HEAD, *NORM)(name, path),
    ),
    "embeddings": (
        {"layers": 1, "also": ["embeddings", "head"]},
        lambda name, path: in_layers(1)(name, path) or outside(*HEAD, *EMBEDDINGS)(name, path),
    ),
    "glob": ({"also": "*[mf].weight"}, outside("norm.weight", "ln_f.weight")),
}


def train(model: PreTrainedModel, folder: Path, *, selection: Any = None, **changes: Any) -> Any:
    trainer = make(model, folder, selection=selection, max_steps=STEPS, **changes)
    trainer.train()
    assert trainer.state.global_step == STEPS
    return trainer


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: on_cpu(tensor) for name, tensor in named}


def assert_equivalent(
    load: Callable[[], PreTrainedModel], case: str, family: str, folder: Path, **changes: Any
) -> None:
    """Train a model both ways and compare everything that came out."""
    chosen, trains = CASES[case]
    ours, plain = load(), load()
    before = bits(ours)
    assert_close(bits(plain), before, rtol=0, atol=0)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(trains(name, FAMILIES[family].path))

    selection = select_layers(ours, **chosen)
    masked = train(ours, folder / "ours", selection=selection, **changes)
    by_hand = train(plain, folder / "plain", **changes)

    assert_close(bits(ours), bits(plain), rtol=0, atol=0)
    found, expected = masked.optimizer.state_dict(), by_hand.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert_close(found["state"][key], state, rtol=0, atol=0)

    # Equal because both did nothing would also be equal.
    moved = {name for name, tensor in bits(ours).items() if not torch.equal(tensor, before[name])}
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert trained
    assert moved == trained
    held = {id(parameter) for parameter in masked.optimizer.state}
    assert held == {id(p) for name, p in ours.named_parameters() if name in trained}
    assert all(state["step"] > 0 for state in masked.optimizer.state.values())
    spread = [entry["reward_std"] for entry in masked.state.log_history if "reward_std" in entry]
    assert min(spread) > 0


# Where neither head nor embedding trains, tying them changes nothing: both ways in one family.
INSIDE = ("all", "one layer", "two layers", "modules")


@pytest.mark.parametrize(
    ("family", "tied", "case"),
    [
        (family, tied, case)
        for family, tied, case in product(["llama", "qwen3", "gpt2"], [True, False], CASES)
        if tied or family == "llama" or case not in INSIDE
    ],
)
def test_training_equals_plain_trl(tmp_path, family, tied, case):
    model = tiny(family, tie_word_embeddings=tied)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied
    if tied and case in ("head alone", "layer and above"):
        with pytest.raises(SelectionError, match=r'is shared with .*embeddings", "head"'):
            select_layers(model, **CASES[case][0])
        return
    assert_equivalent(
        lambda: tiny(family, tie_word_embeddings=tied), case, family, tmp_path, weight_decay=0.1
    )


@pytest.mark.parametrize("case", ["full", "one layer", "head alone", "embeddings"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gradient_checkpointing": False}, id="without checkpointing"),
        pytest.param(
            {"gradient_accumulation_steps": 2, "num_iterations": 2},
            id="accumulation and two iterations",
        ),
        pytest.param({"max_grad_norm": 1e-3}, id="clipping"),
        pytest.param({"optim": "adafactor", "lr_scheduler_type": "cosine"}, id="adafactor"),
    ],
)
def test_training_equals_plain_trl_in_other_settings(tmp_path, changes, case):
    assert_equivalent(lambda: tiny("llama"), case, "llama", tmp_path, **changes)


@pytest.mark.parametrize("case", ["full", "one layer", "modules", "head alone", "embeddings"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_equals_plain_trl_with_a_reference_model(tmp_path, family, case):
    # TRL loads the reference from where the model came from, so it must come from somewhere.
    like = tiny(family, tie_word_embeddings=False)
    like.save_pretrained(tmp_path / "model")
    assert_equivalent(
        lambda: type(like).from_pretrained(tmp_path / "model"), case, family, tmp_path, beta=0.04
    )
