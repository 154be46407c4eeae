"""Losses of one's own that call the model in other ways: masked as in TRL by hand, bit for bit."""

import copy
import functools
import inspect
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer import utils

from layerrl import LayerMaskedMixin
from layerrl.reference import ReferenceModel
from tests.devices import on_any_device
from tests.grpo import PROMPTS, QUIETLY, make, tokenizer
from tests.models import tiny
from tests.runs import (
    assert_same_run,
    freeze_by_hand,
    load,
    metric,
    saved,
    train,
    trained_pair,
)

pytestmark = on_any_device

PREFERENCES = {
    "prompt": PROMPTS * 4,
    "chosen": ["ab", "cde", "f", "ghij"] * 4,
    "rejected": ["mn", "o", "pqr", "st"] * 4,
}
LAYER = 2


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "layerrl.replay"]


def runs_of(base: type, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A trainer class, and with the mixin, trained from one folder; what they `noted` is equal."""
    masked_class = type(f"Masked{base.__name__}", (LayerMaskedMixin, base), {})
    trainers = []
    for kind, selection in ((base, None), (masked_class, LAYER)):
        model = load(folder / "base")
        changes["arguments"] = {}
        if selection is None:
            freeze_by_hand(model, [LAYER])
        if issubclass(base, trl.DPOTrainer):
            config = {"per_device_train_batch_size": 4, "max_steps": 3, **QUIETLY} | {
                name: value for name, value in changes.items() if name != "arguments"
            }
            changes["arguments"] = {
                "args": trl.DPOConfig(output_dir=str(folder / "out"), **config),
                "train_dataset": Dataset.from_dict(PREFERENCES),
                "processing_class": tokenizer(),
            }
            changes["arguments"] |= {} if selection is None else {"selection": selection}
            trainer = kind(model, **changes["arguments"])
        else:
            trainer = make(model, folder / "out", selection=selection, trainer=kind, **changes)
        trainer.noted = []
        train(trainer)
        trainers.append(trainer)
    plain, masked = trainers
    assert plain.noted == masked.noted
    notes = any("noted" in inspect.get_annotations(cls) for cls in base.__mro__)
    assert bool(plain.noted) == notes
    assert_same_run(masked, plain)
    return plain, masked


def rows_of(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    if "input_ids" in inputs:
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids, mask = (
        torch.cat([inputs[f"{part}_{kind}"] for part in ("prompt", "completion")], dim=1)
        for kind in ("ids", "mask")
    )
    return {"input_ids": ids, "attention_mask": mask}


class Restless:
    """Calls the model in ways chosen at random, and adds what it finds to the loss."""

    noted: list[float]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        rows, chosen = rows_of(inputs), random.Random(len(self.noted))
        at = torch.ones_like(rows["input_ids"]).cumsum(1) - 1
        embeddings = model.get_input_embeddings()(rows["input_ids"]).detach()
        asks: list[dict[str, Any]] = [
            rows,
            rows | {"position_ids": at * 3},
            rows | {"position_ids": at},
            rows | {"attention_mask": torch.ones_like(at)},
            rows | {"output_hidden_states": True},
            {"inputs_embeds": embeddings * 1.1, "attention_mask": rows["attention_mask"]},
            rows | {"use_cache": False},
            {name: value[:2] for name, value in rows.items()} | {"use_cache": False},
        ]
        for _ in range(4):
            ask = chosen.choice(asks)
            with torch.set_grad_enabled(chosen.random() < 0.6):
                output = model(**ask)
            states = output.hidden_states or ()
            found = torch.stack([s.pow(2).mean() for s in (output.logits, *states)]).sum()
            self.noted.append(found.item())
            loss = loss + 0.1 * found
        return loss


class RestlessDPO(Restless, trl.DPOTrainer):
    pass


class RestlessGRPO(Restless, trl.GRPOTrainer):
    pass


class Invariant(trl.DPOTrainer):
    """The logits should not depend on how positions are stretched."""

    noted: list[float]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, rows = super().compute_loss(model, inputs, *args, **kwargs), rows_of(inputs)
        at = torch.ones_like(rows["input_ids"]).cumsum(1) - 1
        near, far = (model(**rows, position_ids=at * by, use_cache=False).logits for by in (1, 3))
        gap = (near - far).pow(2).mean()
        self.noted.append(gap.item())
        return loss + gap


class Watched(trl.DPOTrainer):
    """Also looks at the hidden states, to match a teacher's."""

    noted: list[float]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        states = model(**rows_of(inputs), output_hidden_states=True, use_cache=False).hidden_states
        self.noted += [state.pow(2).mean().item() for state in states]
        return loss


class Taught(trl.GRPOTrainer):
    """Scores the batch with a teacher, by the trainer's own method; the loss is as it was."""

    teacher: Any = None

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if Taught.teacher is None:
            Taught.teacher = tiny("llama", 4, seed=3).to(inputs["completion_ids"].device)
            # Before TRL 1.15 log-probabilities come from the logits.
            getattr(utils, "add_fused_lm_head", lambda _: None)(Taught.teacher)
        rows = rows_of(inputs)
        with torch.no_grad():
            self._get_per_token_logps_and_entropies(
                Taught.teacher, *rows.values(), inputs["completion_ids"].size(1)
            )
        return super()._compute_loss(model, inputs)


class Copying(trl.GRPOTrainer):
    """Leaves the caller's arguments as they are."""

    def __init__(self, model: Any, reward_funcs: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, copy.deepcopy(args), **kwargs)


class CopyingDPO(trl.DPOTrainer):
    """The same, of a trainer that is given its reference."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        self.given = ref_model
        super().__init__(model, ref_model, copy.deepcopy(args), **kwargs)


class Raised(trl.GRPOTrainer):
    """Has a penalty of its own choice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["args"].beta = 0.5
        super().__init__(*args, **kwargs)


class Adaptive(trl.GRPOTrainer):
    """Follows the divergence with its penalty."""

    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = self.beta, self.args.beta, self.ref_model is not None

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.beta *= 1.5
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("base", [RestlessDPO, RestlessGRPO])
def test_whatever_a_loss_asks_for(tmp_path, base):
    saved(tmp_path / "base", tiny("llama", 4, initializer_range=0.3))
    changes = {} if base is RestlessDPO else {"beta": 0.04, "num_iterations": 2}
    _, masked = runs_of(base, tmp_path, **changes)
    assert masked.masked_run.replay.enabled
    assert masked.masked_run.replay.num_replayed > 2


@pytest.mark.parametrize(
    ("base", "beta"), [(Copying, 0.5), (Raised, 0.0), (Raised, 0.1), (Adaptive, 0.2)]
)
def test_a_penalty_is_what_the_subclass_makes_of_it(tmp_path, base, beta):
    saved(tmp_path / "base", tiny("llama", 4, initializer_range=0.3))
    plain, masked = runs_of(base, tmp_path, beta=beta)
    assert max(metric(plain, "kl")) > 0
    assert isinstance(masked.ref_model, ReferenceModel)
    assert masked.beta == plain.beta
    assert masked.args.beta == plain.args.beta
    if base is Adaptive:
        assert masked.first == plain.first == (beta, beta, True)


def test_a_reference_that_follows_does_so_by_a_copy_of_the_arguments(tmp_path):
    saved(tmp_path / "base", tiny("llama", 4, initializer_range=0.3))
    followed = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    _, masked = runs_of(CopyingDPO, tmp_path, **followed)
    assert masked.given is None
    assert isinstance(masked.ref_model, ReferenceModel)
    _, alone = runs_of(CopyingDPO, tmp_path)
    assert metric(masked, "loss") != metric(alone, "loss")


def test_what_trl_makes_with_the_penalty_gets_it(tmp_path, monkeypatch):
    init = trl.GRPOTrainer.__init__

    @functools.wraps(init)
    def with_liger(self, *args, **kwargs):  # as TRL before 1.14, which no test can run on a CPU
        init(self, *args, **kwargs)
        penalised = self.beta != 0.0
        self.liger_loss = SimpleNamespace(beta=self.beta, use_ref_model=penalised)

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", with_liger)
    loss = make(tiny("llama", 4), tmp_path, selection=LAYER, beta=0.5).liger_loss
    assert (loss.beta, loss.use_ref_model) == (0.5, True)
    assert trl.GRPOTrainer.__init__ is with_liger


@pytest.mark.parametrize("base", [Invariant, Watched])
def test_other_positions_and_hidden_states(tmp_path, caplog, base):
    saved(tmp_path / "base", tiny("llama", 4, initializer_range=0.3))
    plain, masked = runs_of(base, tmp_path)
    assert min(plain.noted) > 1e-3
    assert masked.masked_run.replay.num_replayed
    if base is Watched:
        assert any("output_hidden_states" in line for line in warnings(caplog))


def test_a_teacher_scored_by_the_trainer_vouches_for_nothing(tmp_path, caplog):
    config = AutoConfig.for_model(
        "gpt2", vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=64,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        saved(tmp_path / "base", AutoModelForCausalLM.from_config(config))
    _, masked = runs_of(Taught, tmp_path, num_iterations=2, max_steps=4)
    assert not masked.masked_run.replay.num_replayed
    [warning] = warnings(caplog)
    assert "dropout is active in frozen layers" in warning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_loss_is_over_all_layers(tmp_path, caplog, dtype):
    folder = saved(tmp_path / "base", tiny("qwen3_moe", 4, num_experts_per_tok=2))
    plain, masked = trained_pair(
        folder, layers=(3,), dtype=dtype, num_iterations=2, max_steps=4, router_aux_loss_coef=1.0,
        masked={"master_weights": False},
    )  # fmt: skip
    assert all(metric(plain, "aux_loss"))
    assert_same_run(masked, plain)
    assert any("output_router_logits" in line for line in warnings(caplog))
