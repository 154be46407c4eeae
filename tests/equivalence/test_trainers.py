"""Every trainer of TRL that the mixin goes in front of is, bit for bit, the plain one."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.dpo_trainer as dpo_trainer
import trl.trainer.kto_trainer as kto_trainer
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from layerrl.blocks import find_blocks
from layerrl.errors import DeltaError
from layerrl.reference import ReferenceModel
from tests.devices import DEVICE, on_any_device
from tests.grpo import make
from tests.models import tiny
from tests.replays import noting_hook
from tests.runs import (
    NO_CHECKPOINTING,
    REENTRANT,
    assert_same_run,
    assert_trained,
    bits,
    in_layers,
    load,
    metric,
    train,
)
from tests.trainers import (
    CASES,
    HEADING,
    LAYER,
    PREFERENCES,
    STEPS,
    YES,
    Runs,
    row,
    saves_a_delta,
    sends_what_was_trained,
)

pytestmark = on_any_device

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
# Halves add up to the very same frozen tensor, which plain TRL mixes with itself as well.
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
REFERENCED = {"DPO": dpo_trainer, "KTO": kto_trainer}


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory) -> Callable[[str], Runs]:
    return cache(lambda name: Runs(CASES[name], tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def runs(name, runs_of) -> Runs:
    return runs_of(name)


class TestEveryTrainer:
    def test_full_is_the_plain_trainer(self, runs):
        assert_same_run(runs.full, runs.plain)
        assert runs.full.state.global_step == STEPS
        assert all(norm > 0 for norm in metric(runs.full, "grad_norm"))

    def test_one_layer_is_the_plain_trainer_with_the_rest_frozen(self, runs):
        assert_same_run(runs.masked, runs.by_hand)
        assert_trained(runs.masked, runs.base, [LAYER])

    def test_goes_on_from_a_delta(self, runs):
        assert saves_a_delta(runs) == YES
        assert runs.resumed.state.global_step == STEPS

    def test_sends_what_was_trained(self, runs):
        if not runs.case.vllm:
            pytest.skip("TRL generates for it in another way, or not at all")
        assert sends_what_was_trained(runs) == YES

    def test_is_in_the_table(self, name, runs):
        assert row(name, runs) in PAGE.read_text().splitlines(), "run python -m tests.trainers"


def test_the_table_holds_nothing_else():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert tuple(lines[:2]) == HEADING
    assert len(lines) == len(HEADING) + len(CASES | {"Distillation": None})


@pytest.fixture(params=REFERENCED)
def referenced(request, runs_of) -> tuple[str, Runs]:
    """One that scores a batch with its policy, and then with its reference."""
    return request.param, runs_of(request.param)


@pytest.fixture
def dpo(runs_of) -> Runs:
    return runs_of("DPO")


def same(runs: Runs, **changes: Any) -> Any:
    """The masked one of two trainings that agreed."""
    changes = {"max_steps": 3, **changes}
    made = [runs.make(str(i), which, **changes) for i, which in enumerate(("by hand", LAYER))]
    train(*made)
    assert_same_run(made[1], made[0])
    assert_trained(made[1], runs.base, [LAYER])
    return made[1]


def ran(trainer: Any, module: nn.Module) -> list[None]:
    """An entry for each time the module has run."""
    calls: list[None] = []
    noting_hook(module, lambda: calls.append(None))
    return calls


class TestReference:
    def test_is_no_second_model(self, referenced, monkeypatch):
        name, runs = referenced

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("a second model was loaded")

        monkeypatch.setattr(REFERENCED[name], "create_model_from_path", refuse)
        trainer = runs.make("alone", LAYER)
        trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
        assert sum(p.nbytes for p in trainer.ref_model.parameters()) == trained
        with pytest.raises(AssertionError, match="a second model"):
            runs.make("plain-alone", None)

    def test_replays_what_the_policy_recorded(self, referenced):
        name, runs = referenced
        counts = []
        for prefix_cache_bytes in (0, 2**30):
            arguments = {"prefix_cache_bytes": prefix_cache_bytes}
            trainer = runs.make("replay", LAYER, arguments=arguments)
            calls = ran(trainer, find_blocks(trainer.model).modules[0].self_attn)
            train(trainer)
            assert_same_run(trainer, runs.by_hand)
            counts.append(len(calls))
        passes = {"DPO": 1, "KTO": 2}[name] * STEPS  # KTO has a second text for each row
        # The first pass of the reference ran plainly, too, to be compared.
        assert counts == [2 * passes, passes + 1]

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param(NO_CHECKPOINTING, id="without checkpointing"),
            pytest.param(REENTRANT, id="reentrant"),
            pytest.param(SYNCED, id="follows"),
            pytest.param({"bf16": True}, id="autocast"),
        ],
    )
    def test_equals_a_second_model(self, referenced, changes):
        trainer = same(referenced[1], **changes)
        assert isinstance(trainer.ref_model, ReferenceModel)
        assert trainer.masked_run.replay.num_replayed

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
            pytest.param({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]}, id="losses"),
            pytest.param({"ld_alpha": 0.5, "use_weighting": True}, id="weighted"),
            pytest.param(
                {
                    "eval_strategy": "steps",
                    "eval_steps": 1,
                    "arguments": {"eval_dataset": Dataset.from_dict(PREFERENCES).select(range(4))},
                },
                id="evaluation",
            ),
        ],
    )
    def test_equals_a_second_model_in_dpo(self, dpo, changes):
        same(dpo, **changes)

    def test_may_be_left_out_by_position(self, dpo):
        template = dpo.make("template", LAYER)
        trainer = CASES["DPO"].masked(
            load(dpo.folder / "base"), None, template.args, None, Dataset.from_dict(PREFERENCES),
            processing_class=template.processing_class, selection=LAYER,
        )  # fmt: skip
        assert isinstance(trainer.ref_model, ReferenceModel)

    def test_is_what_the_policy_was_where_it_is_computed_beforehand(self, dpo):
        trainer = same(dpo, precompute_ref_log_probs=True)
        assert trainer.ref_model is None
        example = trainer.train_dataset[0]
        prompt, chosen = example["prompt_ids"], example["chosen_ids"]
        ids = torch.tensor([prompt + chosen], device=DEVICE)
        with torch.no_grad():
            logps = load(dpo.folder / "base").eval()(ids).logits.log_softmax(-1)[0, :-1]
        scores = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        assert_close(example["ref_chosen_logps"], scores.sum().item(), rtol=1e-5, atol=1e-5)

    def test_follows_the_policy_through_a_checkpoint(self, dpo):
        changes = {**SYNCED, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
        whole = dpo.make("whole", LAYER, **changes)
        train(whole)
        checkpoint = dpo.folder / "whole" / "checkpoint-2"
        before, moved_on = dpo.base, load_file(checkpoint / "reference.safetensors")
        assert all(in_layers(name, [LAYER]) for name in moved_on)
        assert any(not value.equal(before[name]) for name, value in moved_on.items())
        resumed = dpo.make("rest", LAYER, **changes)
        train(resumed, resume_from_checkpoint=str(checkpoint))
        assert_close(bits(resumed.model), bits(whole.model), rtol=0, atol=0)
        assert_close(resumed.ref_model.tensors, whole.ref_model.tensors, rtol=0, atol=0)

    def test_has_to_be_in_a_checkpoint(self, dpo):
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        train(dpo.make("computed", LAYER, precompute_ref_log_probs=True, **saving))
        checkpoint = dpo.folder / "computed" / "checkpoint-1"
        with pytest.raises(DeltaError, match=r"holds no readable reference.*precomputed"):
            dpo.make("rest", LAYER).train(resume_from_checkpoint=str(checkpoint))

    def test_with_dropout_in_the_prefix_is_not_replayed(self, tmp_path, caplog):
        runs = Runs(CASES["DPO"], tmp_path)
        tiny("gpt2", 4).save_pretrained(tmp_path / "base")
        trainer = same(runs, disable_dropout=False)
        assert not trainer.masked_run.replay.num_replayed
        assert "dropout is active in frozen layers" in caplog.text


class TestDrGRPO:
    """Its two differences from GRPO, by hand, and no other."""

    MAX_COMPLETION_LENGTH = 6

    def gradients(self, folder: Path, loss_type: str, scale_rewards: str) -> Any:
        """A batch, the rewards of its rows, and the gradients of the trainer's own loss."""
        trainer = make(
            tiny("llama", 4),
            folder,
            selection=LAYER,
            loss_type=loss_type,
            scale_rewards=scale_rewards,
            max_completion_length=self.MAX_COMPLETION_LENGTH,
        )
        rewards: list[torch.Tensor] = []
        calculate = trainer._calculate_rewards
        trainer._calculate_rewards = lambda *args: rewards.append(calculate(*args)) or rewards[-1]
        torch.manual_seed(0)
        batch = trainer._generate_and_score_completions(list(trainer.train_dataset)[:8])
        for i, mask in enumerate(batch["completion_mask"]):
            mask[1 + i % self.MAX_COMPLETION_LENGTH :] = 0  # lengths that differ
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, batch).backward()
        trained = trainer.selection.parameters(trainer.model)
        return batch, rewards[0][:, 0], {name: p.grad for name, p in trained.items()}

    def expected(self, batch: Any, rewards_B: torch.Tensor, *, dr_grpo: bool) -> Any:
        groups = rewards_B.view(-1, 4)
        advantages = groups - groups.mean(dim=1, keepdim=True)
        if not dr_grpo:
            advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
        model = tiny("llama", 4)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        length = batch["completion_ids"].shape[1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, -length:, 0]
        weights = batch["completion_mask"] * -advantages.view(-1, 1)
        lengths = batch["completion_mask"].sum(dim=1, keepdim=True)
        # The ratio to the old policy is 1, with the gradient of the log-probability.
        each = weights * (logps - logps.detach()).exp()
        (each / (self.MAX_COMPLETION_LENGTH if dr_grpo else lengths)).sum(dim=1).mean().backward()
        return dict(model.named_parameters()), advantages.view(-1)

    @pytest.mark.parametrize("dr_grpo", [True, False], ids=["dr_grpo", "grpo"])
    def test_is_computed_by_hand(self, tmp_path, dr_grpo):
        settings = ("dr_grpo", "none") if dr_grpo else ("grpo", "group")
        batch, rewards_B, gradients = self.gradients(tmp_path, *settings)
        parameters, advantages_B = self.expected(batch, rewards_B, dr_grpo=dr_grpo)
        assert_close(batch["advantages"], advantages_B, rtol=1e-5, atol=1e-6)
        assert len(gradients) == 9
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0
            assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=1e-6)
