"""`also="new_tokens"` trains the rows that plain TRL trains when the others are held by hand.

By hand: `requires_grad` on the layer and on what holds the rows, a gradient hook, and the other
rows put back after each step. None of it is taken from layerrl.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel, TrainerCallback

from layerrl import select_layers
from tests.devices import on_any_device, on_cpu
from tests.grpo import make, tokenizer
from tests.models import FAMILIES, tiny

pytestmark = on_any_device
STEPS = 3
TOKENS = ["<answer>", "</answer>"]
NEW = [64, 65]  # of 64 rows that were there before


def resized(base: Path) -> tuple[PreTrainedModel, Any]:
    """The saved model with two rows more, the same ones every time, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    model, own = AutoModelForCausalLM.from_pretrained(base), tokenizer()
    own.add_tokens(TOKENS)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(len(own), mean_resizing=False)
    return model, own


class HeldByHand(TrainerCallback):
    """The old rows, as they were, after every step."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.kept = [(tensor, tensor.detach()[:64].clone()) for tensor in tensors]

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for tensor, rows in self.kept:
                tensor[:64] = rows


def by_hand(model: PreTrainedModel, path: str) -> HeldByHand:
    ends = {id(e.weight): e for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    tensors = [p for end in ends.values() for p in end.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{path}.1."))
    for tensor in tensors:
        tensor.requires_grad_(True)
        tensor.register_hook(lambda g: torch.cat([torch.zeros_like(g[:64]), g[64:]]))
    return HeldByHand(tensors)


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: on_cpu(tensor) for name, tensor in model.named_parameters()}


SETTINGS = {
    "decay": {"weight_decay": 0.1},
    "accumulation and two iterations": {
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "weight_decay": 0.1,
    },
    "clipping, momentum": {
        "max_grad_norm": 0.1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "weight_decay": 0.1,
    },
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
    "reference": {"beta": 0.04, "weight_decay": 0.1},
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", name) for name in SETTINGS] + [("qwen3", "decay"), ("gpt2", "decay")],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equals_rows_held_by_hand(tmp_path, family, tied, settings):
    base = tmp_path / "base"
    tiny(family, tie_word_embeddings=tied).save_pretrained(base)
    changes = SETTINGS[settings] | {"max_steps": STEPS}
    ours, own = resized(base)
    plain, _ = resized(base)
    if "beta" in changes:  # TRL loads its reference from where the model came from
        for part in (plain, own):
            part.save_pretrained(tmp_path / "resized")
        plain.config._name_or_path = str(tmp_path / "resized")
    before = bits(ours)
    assert_close(bits(plain), before, rtol=0, atol=0)

    selection = select_layers(ours, 1, also="new_tokens")
    assert selection.token_rows == tuple(NEW)
    arguments = {"processing_class": own}
    masked = make(ours, tmp_path / "ours", selection=selection, arguments=arguments, **changes)
    masked.train()
    holder = by_hand(plain, FAMILIES[family].path)
    arguments = {"processing_class": own, "callbacks": [holder]}
    held = make(plain, tmp_path / "plain", arguments=arguments, **changes)
    held.train()

    assert masked.state.global_step == held.state.global_step == STEPS
    assert_close(bits(ours), bits(plain), rtol=0, atol=0)
    found, expected = masked.optimizer.state_dict(), held.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert_close(found["state"][key], state, rtol=0, atol=0)

    # Equal because both did nothing, or moved every row, would also be equal.
    after = bits(ours)
    ends = {"embed_tokens.weight", "wte.weight", "lm_head.weight"}
    for name, tensor in after.items():
        if name.endswith(tuple(ends)):
            moved = (tensor != before[name]).any(dim=1).nonzero().flatten().tolist()
            assert moved == NEW
        else:
            trained = name.startswith(f"{FAMILIES[family].path}.1.")
            assert torch.equal(tensor, before[name]) is not trained
    logged = [entry for entry in masked.state.log_history if "loss" in entry]
    assert all(entry["layerrl/grad_norm/new_tokens"] > 0 for entry in logged)
