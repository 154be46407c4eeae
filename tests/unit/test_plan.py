"""Plans against bytes that were counted, and the cost model against hand-worked numbers."""

import pytest
import torch
from transformers import LlamaConfig

from layerrl import select_layers
from layerrl.errors import SelectionError
from tests.models import tiny, tiny_config

# Two layers of 4 x 4 attention projections and 4 x 8 MLP matrices, tied 10 x 4 embedding.
CONFIG = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=4,
    intermediate_size=8,
    num_attention_heads=1,
    num_key_value_heads=1,
    vocab_size=10,
    tie_word_embeddings=True,
)
LAYER = 4 * 4 * 4 + 3 * 4 * 8  # weights a token meets in one layer: 160
HEAD = 10 * 4
NORMS = 2 * 4


def test_bytes_by_hand():
    plan = select_layers(CONFIG, 1).plan(CONFIG, dtype=torch.bfloat16, beta=0.1)
    trained, everything = LAYER + NORMS, 2 * (LAYER + NORMS) + HEAD + 4
    assert plan.weights == 2 * everything
    assert plan.gradients == plan.reference == 2 * trained
    assert plan.optimizer == 8 * trained
    assert plan.checkpoint == (2 + 2 + 8) * trained
    assert plan.total == 2 * everything + (2 + 2 + 8) * trained
    assert plan.full.reference == plan.full.gradients == 2 * everything
    assert plan.full.checkpoint == (2 + 8) * everything


@pytest.mark.parametrize(
    ("layer", "options", "step"),
    [
        # One policy pass, nothing recorded: forward F+h, recomputation S, backward S+h+t.
        (1, {}, (2 * LAYER + HEAD) + LAYER + (LAYER + HEAD + LAYER)),
        # The reference pass records, the policy pass replays.
        (1, {"beta": 0.1}, (2 * LAYER + HEAD) + (LAYER + HEAD) + LAYER + (2 * LAYER + HEAD)),
        # Old and reference pass, then two policy passes.
        (
            1,
            {"beta": 0.1, "num_iterations": 2},
            (2 * LAYER + HEAD) + (LAYER + HEAD) + 2 * (2 * LAYER + HEAD + 2 * LAYER + HEAD),
        ),
    ],
)
def test_step_cost_by_hand(layer, options, step):
    plan = select_layers(CONFIG, layer).plan(CONFIG, **options)
    scored = ("beta" in options) + ("num_iterations" in options)
    full = scored * (2 * LAYER + HEAD)
    full += options.get("num_iterations", 1) * (4 * 2 * LAYER + 3 * HEAD)
    assert plan.step == pytest.approx(step / full)


def test_early_layers_cost_more_than_late_ones():
    config = tiny_config("llama", 8)
    steps = [select_layers(config, layer).plan(config, beta=0.1).step for layer in range(8)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 1.5 * steps[-1]


def test_full_is_its_own_measure():
    plan = select_layers(CONFIG, "full").plan(CONFIG)
    assert plan.step == 1.0
    assert plan.full is None
    assert "1.00" in str(plan)


def test_only_the_experts_a_token_is_routed_to_count():
    config = tiny_config("qwen3_moe", 4)
    dense = select_layers(config, 3).plan(config)
    config.num_experts_per_tok = config.num_experts
    assert select_layers(config, 3).plan(config).step != dense.step


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma3"])
def test_model_and_config_give_the_same_plan(name):
    model = tiny(name)
    selection = select_layers(model, 1)
    assert selection.plan(model) == selection.plan(model.config, dtype=torch.float32)


@pytest.mark.parametrize("options", [{"num_iterations": 0}, {"beta": -0.1}])
def test_impossible_settings_are_refused(options):
    [(name, value)] = options.items()
    with pytest.raises(SelectionError, match=f"{name}={value}"):
        select_layers(CONFIG, 1).plan(CONFIG, **options)
