"""`method="step"` with passes that start at the layer that moved, against whole ones."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from layerrl.blocks import find_blocks
from layerrl.scores import step
from layerrl.scores.rollouts import Rollouts
from tests.grpo import make
from tests.integration.test_probe_methods import TRAIN, letters
from tests.models import tiny

WINDOW = {"sliding_window": 4}
NUM_PROMPTS = 8


class Whole:
    """Every pass from the embedding to the head."""

    passes = 0.0

    def __init__(self, *_):
        pass

    def values(self, compute, moves, **_):
        base, after = compute(), []
        for move in moves.values():
            with move():
                after.append(compute())
        return base, torch.stack(after)


def gains(family, folder, selection, text, changes, arguments):
    model = tiny(family, 3, **text)
    torch.manual_seed(0)
    trainer = make(
        model,
        folder,
        selection=selection,
        arguments={"reward_funcs": letters, "train_dataset": TRAIN, **arguments},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **changes},
    )
    rollouts = Rollouts(trainer, NUM_PROMPTS, twice=False)
    return model, step._gains(rollouts, trainer.masked_run.selection, trainer.args)


@pytest.mark.parametrize(
    ("family", "text", "changes"),
    [
        ("llama", {}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ("gpt_neox", {}, {"gradient_checkpointing": True}),
        ("gpt2", {}, {}),
        ("mixtral", {}, {}),
        ("qwen3", {}, {"bf16": True}),
        ("gemma2", WINDOW, {}),
        ("mistral", WINDOW, {}),
        ("llama", {}, {"lora": True}),
        ("llama", {}, {"layers": [1]}),
    ],
)
def test_gains_are_those_of_whole_passes(family, text, changes, tmp_path, monkeypatch, caplog):
    changes = {"learning_rate": 1e-3, **changes}
    selection = changes.pop("layers", "all")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    arguments = {"peft_config": lora} if changes.pop("lora", False) else {}
    model, found = gains(family, tmp_path / "short", selection, text, changes, arguments)
    assert not [record for record in caplog.records if "layer's step" in record.message]
    monkeypatch.setattr(step, "ShortPasses", Whole)
    _, expected = gains(family, tmp_path / "whole", selection, text, changes, arguments)
    assert (found.gains_PL != 0).all()
    assert_close(found.gains_PL, expected.gains_PL, rtol=0, atol=0)

    layers = [sum(p.numel() for p in layer.parameters()) for layer in find_blocks(model).modules]
    outside = sum(p.numel() for p in model.get_output_embeddings().parameters())
    shares = [(sum(layers[k:]) + outside) / (sum(layers) + outside) for k in range(3)]
    chosen = range(3) if selection == "all" else selection
    num_parts = 4 // changes.get("per_device_train_batch_size", 4) * NUM_PROMPTS
    compared = len(chosen) / num_parts  # the first micro-batch
    passes = 2 + sum(shares[k] for k in chosen) + compared
    assert found.more_passes == pytest.approx(passes, rel=0.01)
