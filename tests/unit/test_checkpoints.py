"""Checkpoints hold what trains and how; resuming from one goes on as if nothing had happened."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.utils import RepeatSampler

from layerrl import LayerMaskedGRPOTrainer, load_delta, select_layers
from layerrl.delta import DeltaBase, save_delta
from layerrl.errors import DeltaError, FrameworkError, FrozenTensorError, SelectionError
from layerrl.trainer.callbacks import EpochOrder
from tests.devices import on_any_device, on_cpu
from tests.grpo import PROMPTS, config, make, reward
from tests.models import tiny, tiny_config
from tests.runs import (
    assert_same_run,
    assert_trained,
    bits,
    load,
    logged,
    metric,
    optimizer_state,
    pair,
    restore_delta,
    saved,
    train,
)

pytestmark = on_any_device

WEIGHT = "model.layers.2.mlp.up_proj.weight"
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
BOOSTED = select_layers(
    tiny_config("llama", 4), [1, 3], boost={3: 2.0, "mlp.*": 0.5, (1, "self_attn"): 0.1}
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


def trainer_on(base: Path, output_dir: Path, *, selection: Any = 2, **changes: Any) -> Any:
    """A trainer that saves every step, on the base fresh from disk."""
    values = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **changes}
    return make(load(base), output_dir, selection=selection, **values)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def trained(trainer: Any) -> dict[str, Tensor]:
    tensors = trainer.selection.parameters(trainer.model)
    return {name: on_cpu(tensor) for name, tensor in tensors.items()}


def delta_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "delta.safetensors")


def damage(file: Path) -> None:
    """Flip one bit of the last tensor's data."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


class TestContent:
    @pytest.mark.parametrize("beta", [0.0, 0.04])
    def test_is_the_delta_the_optimizer_and_the_trainer_and_no_model(self, base, tmp_path, beta):
        trainer = trainer_on(base, tmp_path / "out", beta=beta)
        before = bits(trainer.model)
        trainer.train()
        assert_trained(trainer, before, [2])
        found = files(tmp_path / "out" / "checkpoint-2")
        assert {
            "delta.json",
            "delta.safetensors",
            "config.json",
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "tokenizer.json",
            "trainer_state.json",
            "training_args.bin",
        } <= found
        weights = {name for name in found if name.endswith((".safetensors", ".bin"))}
        assert weights == {
            "delta.safetensors",
            "training_args.bin",
            *(["reference.safetensors"] if beta else []),
        }
        assert_close(delta_of(tmp_path / "out" / "checkpoint-2"), trained(trainer), rtol=0, atol=0)

    def test_holds_the_reference_where_it_follows_the_policy(self, base, tmp_path):
        trainer = trainer_on(base, tmp_path / "out", beta=0.04, **SYNCED)
        start = trained(trainer)
        trainer.train()
        reference = load_file(tmp_path / "out" / "checkpoint-2" / "reference.safetensors")
        now = {name: on_cpu(tensor) for name, tensor in trainer.ref_model.tensors.items()}
        assert_close(reference, now, rtol=0, atol=0)
        assert not torch.equal(reference[WEIGHT], start[WEIGHT])
        assert not torch.equal(reference[WEIGHT], trained(trainer)[WEIGHT])

    @pytest.mark.parametrize("beta", [0.0, 0.04])
    def test_takes_the_bytes_of_what_trains_and_its_optimizer_state(self, tmp_path, beta):
        wide = tiny("llama", 2, hidden_size=256, intermediate_size=1024)
        trainer = trainer_on(
            saved(tmp_path / "base", wide), tmp_path / "out", selection=1, beta=beta, max_steps=1
        )
        trainer.train()
        tensors = sum(tensor.nbytes for tensor in trained(trainer).values())
        state = sum(tensor.nbytes for tensor in optimizer_state(trainer).values())
        assert 2 * tensors <= state < 2.001 * tensors
        expected = tensors * (2 if beta else 1) + state
        assert expected < size(tmp_path / "out" / "checkpoint-1") <= 1.01 * expected
        assert size(tmp_path / "out" / "checkpoint-1" / "delta.safetensors") <= 1.01 * tensors

    def test_its_delta_is_one_that_any_base_takes(self, base, tmp_path):
        trainer = trainer_on(base, tmp_path / "out")
        trainer.train()
        model = load(base)
        selection = load_delta(model, tmp_path / "out" / "checkpoint-2")
        assert selection == trainer.selection
        assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)

    def test_save_model_writes_a_whole_model(self, base, tmp_path):
        trainer = trainer_on(base, tmp_path / "out", save_strategy="no")
        trainer.train()
        trainer.save_model(tmp_path / "whole")
        trainer.save_model()
        for folder in (tmp_path / "whole", tmp_path / "out"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
            assert not (folder / "delta").exists()

    @pytest.mark.parametrize("kept", ["delta", "full"])
    def test_save_model_brings_a_delta_in_the_folder_to_its_state(self, base, tmp_path, kept):
        arguments = {"checkpoint_format": kept}
        trainer = trainer_on(base, tmp_path / "out", save_strategy="no", arguments=arguments)
        trainer.save_delta(tmp_path / "both")
        trainer.train()
        trainer.save_model(tmp_path / "both")
        model = load(base)
        load_delta(model, tmp_path / "both")
        assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)

    def test_frozen_tensors_are_checked_before_anything_is_written(self, base, tmp_path):
        trainer = trainer_on(base, tmp_path / "out")
        with torch.no_grad():
            trainer.model.model.layers[0].mlp.up_proj.weight.add_(1)
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj\.weight"):
            trainer.save_model(tmp_path / "checkpoint", _internal_call=True)
        assert not (tmp_path / "checkpoint").exists()

    def test_save_total_limit_keeps_the_last(self, base, tmp_path):
        trainer = trainer_on(base, tmp_path / "out", max_steps=4, save_total_limit=2)
        trainer.train()
        assert checkpoints(tmp_path / "out") == {"checkpoint-3", "checkpoint-4"}

    @pytest.mark.parametrize(
        ("first", "beta", "second"),
        [
            ("delta", 0.0, "delta"),
            ("delta", 0.04, "delta"),
            ("delta", 0.04, "full"),
            ("full", 0.0, "delta"),
        ],
    )
    def test_of_a_later_run_replace_those_of_an_earlier_one(
        self, base, tmp_path, first, beta, second
    ):
        earlier = trainer_on(
            base,
            tmp_path / "out",
            learning_rate=3e-2,
            beta=beta,
            arguments={"checkpoint_format": first},
        )
        train(earlier)
        arguments = {"checkpoint_format": second}
        trainer = trainer_on(base, tmp_path / "out", learning_rate=1e-2, arguments=arguments)
        train(trainer)
        fresh = trainer_on(base, tmp_path / "out", learning_rate=1e-2, arguments=arguments)
        train(fresh, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert_close(bits(fresh.model), bits(trainer.model), rtol=0, atol=0)
        found = files(tmp_path / "out" / "checkpoint-2")
        again = trainer_on(base, tmp_path / "alone", learning_rate=1e-2, arguments=arguments)
        train(again)
        assert found == files(tmp_path / "alone" / "checkpoint-2")


class TestResume:
    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({}, id="plain"),
            pytest.param({"beta": 0.04}, id="reference"),
            pytest.param({"beta": 0.04, **SYNCED}, id="reference-follows"),
            pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
            pytest.param({"beta": 0.04, "gradient_accumulation_steps": 2, **SYNCED}, id="both"),
            pytest.param({"selection": [1, 3], "beta": 0.04}, id="two-layers"),
            pytest.param({"arguments": {"checkpoint_format": "full"}}, id="full-format"),
            pytest.param(
                {"arguments": {"checkpoint_format": "full"}, "beta": 0.04}, id="full-reference"
            ),
            pytest.param({"selection": "full"}, id="full-selection"),
            pytest.param({"selection": BOOSTED}, id="boosts"),
        ],
    )
    def test_goes_on_bit_for_bit(self, base, tmp_path, changes):
        straight = trainer_on(base, tmp_path / "out", max_steps=6, save_steps=3, **changes)
        before = bits(straight.model)
        train(straight)
        if changes.get("selection") != "full":
            assert_trained(straight, before, straight.selection.layers)
        torch.manual_seed(123)
        resumed = trainer_on(base, tmp_path / "again", max_steps=6, save_steps=3, **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert resumed.state.global_step == 6
        assert_same_but_summary(resumed, straight)

    def test_of_a_batch_that_is_used_twice_goes_on_at_the_next_one(self, base, tmp_path):
        changes = {"max_steps": 8, "save_steps": 4, "num_iterations": 2, "beta": 0.04}
        straight = trainer_on(base, tmp_path / "out", **changes)
        train(straight)
        resumed = trainer_on(base, tmp_path / "again", **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
        assert_same_but_summary(resumed, straight)
        assert resumed.masked_run.replay.num_replayed

    @pytest.mark.parametrize("at", [8, 12])
    def test_in_a_later_epoch_goes_on_with_its_order_of_the_data(self, base, tmp_path, at):
        """An epoch is eight steps: once at its end, once in the next one."""
        changes = {"max_steps": 14, "save_steps": 4}
        straight = trainer_on(base, tmp_path / "out", **changes)
        train(straight)
        resumed = trainer_on(base, tmp_path / "again", **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert resumed.state.epoch > 1
        assert_same_but_summary(resumed, straight)

    @pytest.mark.parametrize("accumulate", [1, 2, 3])
    def test_draws_as_many_orders_as_transformers_counts_epochs(self, accumulate):
        """From the steps, as it does: accumulation may be another than when it was saved."""
        rows = [None] * 6
        sampler = RepeatSampler(rows, 1, shuffle=True, seed=0)
        loader = DataLoader(rows, batch_size=1, sampler=sampler, collate_fn=list)
        other = RepeatSampler(rows, 1, shuffle=True, seed=0)
        for _ in range(12 // math.ceil(6 / accumulate)):
            next(iter(other))
        args = SimpleNamespace(gradient_accumulation_steps=accumulate)
        state = SimpleNamespace(global_step=12, epoch=7.5)
        EpochOrder().on_train_begin(args, state, None, train_dataloader=loader)
        assert list(sampler) == list(other)

    def test_with_true_finds_the_last_checkpoint(self, base, tmp_path):
        straight = trainer_on(base, tmp_path / "straight", max_steps=6, save_steps=3)
        train(straight)
        shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
        resumed = trainer_on(base, tmp_path / "out", max_steps=6, save_steps=3)
        resumed.train(resume_from_checkpoint=np.True_)  # as of a comparison
        assert_same_but_summary(resumed, straight)
        assert checkpoints(tmp_path / "out") == {"checkpoint-3", "checkpoint-6"}

    @pytest.mark.parametrize("changes", [{}, {"beta": 0.04, **SYNCED}], ids=["plain", "reference"])
    def test_works_in_a_trainer_whose_model_has_moved_on(self, base, tmp_path, changes):
        trainer = trainer_on(base, tmp_path / "out", max_steps=6, save_steps=3, **changes)
        train(trainer)
        expected, history = bits(trainer.model), logged(trainer)
        state = {name: t.clone() for name, t in optimizer_state(trainer).items()}
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert_close(bits(trainer.model), expected, rtol=0, atol=0)
        assert_close(optimizer_state(trainer), state, rtol=0, atol=0)
        assert logged(trainer)[:6] == history[:6]

    @pytest.mark.parametrize("family", ["gpt2", "falcon", "mixtral", "qwen3_vl"])
    def test_works_for_other_families(self, tmp_path, family):
        base = saved(tmp_path / "base", tiny(family, 4))
        changes = {"max_steps": 2, "beta": 0.04, **SYNCED, "ref_model_sync_steps": 1}
        straight = trainer_on(base, tmp_path / "out", **changes)
        train(straight)
        resumed = trainer_on(base, tmp_path / "again", **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert_same_but_summary(resumed, straight)

    def test_equals_what_plain_trl_resumes_to(self, base, tmp_path):
        changes = {"beta": 0.04, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        train(*pair(base, **changes))
        plain, masked = pair(base, **changes)
        for trainer in (plain, masked):
            trainer.train(
                resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3")
            )
        assert_same_run(masked, plain)

    # Checkpoints have Mixtral's experts one by one, the model in one tensor: plain TRL loses them.
    @pytest.mark.parametrize("family", ["llama", "mixtral"])
    def test_takes_a_whole_model_where_the_checkpoint_is_one(self, tmp_path, family):
        base = saved(tmp_path / "base", tiny(family, 4))
        full = {"arguments": {"checkpoint_format": "full"}}
        straight = trainer_on(base, tmp_path / "out", max_steps=6, save_steps=3, **full)
        train(straight)
        resumed = trainer_on(base, tmp_path / "again", max_steps=6, save_steps=3)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert_same_but_summary(resumed, straight)

    def test_after_an_interruption_in_the_middle_of_a_step(self, base, tmp_path):
        straight = trainer_on(base, tmp_path / "straight", max_steps=6, save_steps=3)
        train(straight)
        broken = trainer_on(base, tmp_path / "out", max_steps=6, save_steps=3)
        backward, calls = broken.accelerator.backward, []

        def failing(*args: Any, **kwargs: Any) -> None:
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            backward(*args, **kwargs)

        broken.accelerator.backward = failing
        with pytest.raises(KeyboardInterrupt):
            train(broken)
        resumed = trainer_on(base, tmp_path / "out", max_steps=6, save_steps=3)
        resumed.train(resume_from_checkpoint=True)
        assert_same_but_summary(resumed, straight)


def assert_same_but_summary(resumed: Any, straight: Any) -> None:
    """The same run up to the summary at its end, which averages over the steps of one process."""
    summaries = [trainer.state.log_history.pop() for trainer in (resumed, straight)]
    assert all("train_loss" in summary for summary in summaries)
    assert metric(straight, "reward")
    assert_same_run(resumed, straight)
    if straight.ref_model is not None and hasattr(straight.ref_model, "tensors"):
        assert_close(
            dict(resumed.ref_model.tensors), dict(straight.ref_model.tensors), rtol=0, atol=0
        )


class TestBestModel:
    @pytest.mark.parametrize("checkpoint_format", ["delta", "full"])
    @pytest.mark.parametrize(
        ("family", "changes"),
        [("llama", {}), ("llama", {"beta": 0.04, **SYNCED}), ("mixtral", {})],
        ids=["plain", "reference", "experts"],
    )
    def test_is_loaded_at_the_end(self, tmp_path, checkpoint_format, family, changes):
        base = saved(tmp_path / "base", tiny(family, 4))

        def falling(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
            penalty = 100 * abs(trainer_state.global_step - 2)
            return [value - penalty for value in reward(completions)]

        trainer = trainer_on(
            base,
            tmp_path / "out",
            max_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_reward",
            greater_is_better=True,
            save_total_limit=2,
            arguments={
                "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]}),
                "reward_funcs": falling,
                "checkpoint_format": checkpoint_format,
            },
            **changes,
        )
        moments: list[dict[str, Tensor]] = []
        save = trainer._save_checkpoint

        def noting(*args: Any, **kwargs: Any) -> None:
            moments.append(bits(trainer.model))
            save(*args, **kwargs)

        trainer._save_checkpoint = noting
        trainer.train()
        best, last = moments[1], moments[3]
        assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
        trained = trainer.selection.parameters(trainer.model)
        assert not any(torch.equal(best[name], last[name]) for name in trained)
        assert_close(bits(trainer.model), best, rtol=0, atol=0)
        assert checkpoints(tmp_path / "out") == {"checkpoint-2", "checkpoint-4"}

    def test_of_a_run_that_has_moved_is_left_out_as_in_trl(self, base, tmp_path, caplog):
        trainer = trainer_on(
            base,
            tmp_path / "out",
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            arguments={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})},
        )
        trainer.add_callback(BestIsElsewhere())
        trainer.train()
        assert "Could not locate the best model" in caplog.text


class BestIsElsewhere(TrainerCallback):
    """As in a run that was resumed on another machine, and found no better one there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.best_metric, state.best_model_checkpoint = -1e9, "/nowhere/checkpoint-1"
        state.best_global_step = None


class TestRefused:
    def refuse(self, base: Path, out: Path, checkpoint: Path, match: str, **changes: Any) -> None:
        """Resuming raises, and leaves the model and the reference as they were."""
        trainer = trainer_on(base, out, **changes)
        before = bits(trainer.model)
        reference = {}
        if trainer.ref_model is not None:
            reference = {n: t.detach().clone() for n, t in trainer.ref_model.tensors.items()}
        with pytest.raises(DeltaError, match=match):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_close(bits(trainer.model), before, rtol=0, atol=0)
        if reference:
            assert_close(dict(trainer.ref_model.tensors), reference, rtol=0, atol=0)

    @pytest.fixture
    def checkpoint(self, base: Path, tmp_path: Path) -> Path:
        trainer_on(base, tmp_path / "out", beta=0.04).train()
        return tmp_path / "out" / "checkpoint-2"

    @pytest.mark.parametrize(
        ("layers", "match"),
        [
            (1, r"trained layer 2 of 4; this run trains layer 1 of 4"),
            ([1, 2], r"trained layer 2 of 4; this run trains layers 1-2 of 4"),
        ],
        ids=["another-layer", "one-more-layer"],
    )
    def test_a_checkpoint_of_another_selection(self, base, tmp_path, checkpoint, layers, match):
        self.refuse(base, tmp_path / "new", checkpoint, match, selection=layers, beta=0.04)

    @pytest.mark.parametrize("given", [3, "", b"out", ["out"]])
    def test_what_is_no_path(self, base, tmp_path, given):
        with pytest.raises(DeltaError, match=r"resume_from_checkpoint is .*expected a path"):
            trainer_on(base, tmp_path / "out").train(resume_from_checkpoint=given)

    def test_a_checkpoint_of_another_choice_of_modules(self, base, tmp_path, checkpoint):
        selection = select_layers(load(base), 2, modules="mlp.*")
        match = r"trained layer 2 of 4; this run trains layer 2 of 4, modules mlp\.\*"
        self.refuse(base, tmp_path / "new", checkpoint, match, selection=selection, beta=0.04)

    def test_a_checkpoint_of_another_base(self, tmp_path, checkpoint):
        other = saved(tmp_path / "other", tiny("llama", 4, seed=1))
        description = json.loads((checkpoint / "delta.json").read_text())
        was = {t["base_fingerprint"] for t in description["tensors"].values()}
        with pytest.raises(DeltaError) as caught:
            trainer_on(other, tmp_path / "new", beta=0.04).train(
                resume_from_checkpoint=str(checkpoint)
            )
        assert any(fingerprint in str(caught.value) for fingerprint in was)
        self.refuse(other, tmp_path / "new", checkpoint, "made from another base", beta=0.04)

    def test_a_whole_model_of_another_base(self, base, tmp_path):
        other = saved(tmp_path / "other", tiny("llama", 4, seed=1))
        full = {"arguments": {"checkpoint_format": "full"}}
        trainer_on(other, tmp_path / "out", **full).train()
        trainer = trainer_on(base, tmp_path / "new")
        with pytest.raises(FrozenTensorError, match="another base's checkpoint"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))

    def test_a_base_of_which_only_one_trained_tensor_differs(self, base, tmp_path, checkpoint):
        model = load(base)
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
        other = saved(tmp_path / "other", model)
        self.refuse(other, tmp_path / "new", checkpoint, f"fingerprint of '{WEIGHT}'", beta=0.04)

    @pytest.mark.parametrize("checkpoint_format", ["delta", "full"])
    @pytest.mark.parametrize(
        ("first", "then", "needed"),
        [
            ("adamw_torch", "sgd", "dampening, momentum"),
            ("sgd", "adamw_torch", "betas, eps"),
            ("adamw_torch", "adafactor", "beta1, clip_threshold, decay_rate"),
        ],
    )
    def test_the_state_of_another_optimizer(
        self, base, tmp_path, first, then, needed, checkpoint_format
    ):
        given = {"arguments": {"checkpoint_format": checkpoint_format}}
        trainer_on(base, tmp_path / "out", max_steps=1, optim=first, **given).train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        again = trainer_on(base, tmp_path / "again", optim=then, **given)
        before = bits(again.model)
        match = (
            rf"optimizer\.pt is of another optimizer than this run's .*, and not {needed}\. Noth"
        )
        with pytest.raises(DeltaError, match=match):
            again.train(resume_from_checkpoint=str(checkpoint))
        assert_close(bits(again.model), before, rtol=0, atol=0)
        assert again.optimizer is None
        (checkpoint / "optimizer.pt").unlink()  # as the message says
        with pytest.warns(UserWarning, match="start anew"):
            again.train(resume_from_checkpoint=str(checkpoint))
        assert again.state.global_step == 2

    def test_the_state_of_another_optimizer_beside_a_whole_model(self, base, tmp_path):
        full = {"selection": "full", "max_steps": 1}
        trainer_on(base, tmp_path / "out", **full).train()
        again = trainer_on(base, tmp_path / "again", optim="sgd", **full)
        with pytest.raises(
            DeltaError, match=r"momentum\. The model has the checkpoint's weights now\."
        ):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))

    def test_a_state_that_an_optimizer_with_the_same_options_cannot_read(self, base, tmp_path):
        class Sign(torch.optim.Optimizer):
            def __init__(self, params: Any, lr: float) -> None:
                super().__init__(params, {"lr": lr})

            def step(self, closure: Any = None) -> None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        state = self.state[parameter] or {"sum": torch.zeros_like(parameter)}
                        self.state[parameter] = state
                        state["sum"] += parameter.grad
                        parameter.data -= group["lr"] * state["sum"].sign()

        trainer_on(base, tmp_path / "out", max_steps=1).train()
        again = trainer_on(base, tmp_path / "again")
        again.optimizer_cls_and_kwargs = (Sign, {"lr": 1e-3})
        with pytest.raises(DeltaError, match=r"Sign cannot step from the state .*'sum'"):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))

    def test_a_state_with_other_groups(self, base, tmp_path):
        trainer_on(base, tmp_path / "out", max_steps=1).train()
        again = trainer_on(base, tmp_path / "again")
        before = bits(again.model)
        held = again.selection.parameters(again.model).values()
        again.optimizer = torch.optim.AdamW(held, lr=1e-3)
        with pytest.raises(DeltaError, match=r"groups of \[7, 2\] tensors, .* AdamW of \[9\]\."):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert_close(bits(again.model), before, rtol=0, atol=0)

    def test_a_state_with_other_groups_of_an_optimizer_that_comes_late(self, base, tmp_path):
        class Late(LayerMaskedGRPOTrainer):
            def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
                held = self.selection.parameters(self.model).values()
                self.optimizer = torch.optim.AdamW(held, lr=1e-3)
                return super().create_scheduler(*args, **kwargs)

        trainer_on(base, tmp_path / "out", max_steps=1).train()
        again = trainer_on(base, tmp_path / "again", trainer=Late)
        with pytest.raises(DeltaError, match=r"groups of \[7, 2\] tensors, .* AdamW of \[9\]\."):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))

    def test_no_state_of_an_optimizer_whose_newer_version_has_more_options(self, base, tmp_path):
        straight = trainer_on(base, tmp_path / "out")
        train(straight)
        file = tmp_path / "out" / "checkpoint-1" / "optimizer.pt"
        state = torch.load(file)
        for group in state["param_groups"]:
            del group["decoupled_weight_decay"], group["maximize"]  # AdamW of torch 1.11 to 2.6
        torch.save(state, file)
        (file.parent / "checksums.json").unlink()
        again = trainer_on(base, tmp_path / "again")
        again.train(resume_from_checkpoint=str(file.parent))
        assert_same_but_summary(again, straight)

    def test_keywords_of_an_optimizer_are_there_for_the_one_that_trains(self, base, tmp_path):
        runs = []
        for resumes in (False, True):
            trainer = trainer_on(base, tmp_path / str(resumes))
            held = trainer.selection.parameters(trainer.model).values()
            groups = [{"params": [*held], "lr": 1e-3}]
            trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups})
            resume = {"resume_from_checkpoint": str(tmp_path / "False" / "checkpoint-1")}
            train(trainer, **(resume if resumes else {}))
            runs.append(trainer)
        assert_same_but_summary(runs[1], runs[0])

    @pytest.mark.parametrize("refused", [False, True])
    def test_one_optimizer_is_made_and_the_weights_are_there_before_it(
        self, base, tmp_path, refused
    ):
        class Counting(LayerMaskedGRPOTrainer):
            made = 0

            def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
                self.made += 1
                self.seen = trained(self)
                return super().create_optimizer(*args, **kwargs)

        trainer_on(base, tmp_path / "out", max_steps=1).train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        optim = "sgd" if refused else "adamw_torch"
        again = trainer_on(base, tmp_path / "again", trainer=Counting, optim=optim)
        before = bits(again.model)
        if refused:
            with pytest.raises(DeltaError, match="is of another optimizer than this run's"):
                again.train(resume_from_checkpoint=str(checkpoint))
            assert_close(bits(again.model), before, rtol=0, atol=0)
        else:
            again.train(resume_from_checkpoint=str(checkpoint))
        assert again.made == 1
        assert_close(again.seen, delta_of(checkpoint), rtol=0, atol=0)

    def test_nothing_stays_of_a_try_that_failed_before_the_state_was_loaded(self, base, tmp_path):
        class Failing(LayerMaskedGRPOTrainer):
            def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
                raise ValueError("of the scheduler")

        trainer_on(base, tmp_path / "out", max_steps=1).train()
        again = trainer_on(base, tmp_path / "again", trainer=Failing)
        before = bits(again.model)
        with pytest.raises(ValueError, match="of the scheduler"):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert_close(bits(again.model), before, rtol=0, atol=0)
        assert again.optimizer is None

    def test_a_torch_that_transformers_does_not_let_read_it(self, base, tmp_path, monkeypatch):
        def check() -> None:
            raise ValueError("Due to a vulnerability in `torch.load`, we require torch 2.6.")

        trainer_on(base, tmp_path / "out", max_steps=1).train()
        again = trainer_on(base, tmp_path / "again")
        before = bits(again.model)
        monkeypatch.setattr("transformers.trainer.check_torch_load_is_safe", check)
        match = r"does not read .* with torch 2.* require torch 2\.6\. The file is not at fault"
        with pytest.raises(FrameworkError, match=match):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert_close(bits(again.model), before, rtol=0, atol=0)

    def test_a_damaged_delta(self, base, tmp_path, checkpoint):
        damage(checkpoint / "delta.safetensors")
        self.refuse(base, tmp_path / "new", checkpoint, "is damaged: fingerprint", beta=0.04)

    def test_a_delta_without_its_tensors(self, base, tmp_path, checkpoint):
        (checkpoint / "delta.safetensors").unlink()
        match = r"delta\.safetensors is missing"
        self.refuse(base, tmp_path / "new", checkpoint, match, beta=0.04)

    def test_a_changed_description(self, base, tmp_path, checkpoint):
        file = checkpoint / "delta.json"
        file.write_text(file.read_text().replace('"layers": [\n   2', '"layers": [\n   1'))
        self.refuse(base, tmp_path / "new", checkpoint, "checksum differs", beta=0.04)

    def test_a_checkpoint_without_a_reference_where_one_is_needed(self, base, tmp_path):
        trainer_on(base, tmp_path / "out").train()
        checkpoint = tmp_path / "out" / "checkpoint-2"
        self.refuse(base, tmp_path / "new", checkpoint, r"holds no .*reference", beta=0.04)

    def test_a_checkpoint_with_a_reference_serves_a_run_without(self, base, tmp_path, checkpoint):
        trainer = trainer_on(base, tmp_path / "new", max_steps=2)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_close(trained(trainer), delta_of(checkpoint), rtol=0, atol=0)

    @pytest.mark.parametrize("given", ["deltas", "", None])
    def test_an_unknown_format(self, base, tmp_path, given):
        arguments = {"checkpoint_format": given}
        with pytest.raises(SelectionError, match=f'checkpoint_format is {given!r}, expected "del'):
            make(load(base), tmp_path / "out", selection=2, arguments=arguments)


class TestFullFormat:
    def test_writes_what_trl_writes(self, base, tmp_path):
        changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        plain, masked = pair(base, masked={"checkpoint_format": "full"}, **changes)
        train(plain, masked)
        folders = [Path(t.args.output_dir) / "checkpoint-2" for t in (plain, masked)]
        assert files(folders[0]) | {"checksums.json"} == files(folders[1])
        weights = [load_file(folder / "model.safetensors") for folder in folders]
        assert_close(weights[1], weights[0], rtol=0, atol=0)

    def test_is_what_a_selection_of_everything_writes(self, base, tmp_path):
        trainer = trainer_on(base, tmp_path / "out", selection="full", max_steps=1)
        trainer.train()
        found = files(tmp_path / "out" / "checkpoint-1")
        assert "model.safetensors" in found
        assert not any("delta" in name for name in found)

    def test_arguments_may_be_made_by_hand(self, base, tmp_path):
        given = config(tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=1)
        trainer = make(load(base), tmp_path, selection=2, arguments={"args": given})
        trainer.train()
        assert files(tmp_path / "out" / "checkpoint-1") >= {"delta.safetensors"}


class TestRestoreDelta:
    @pytest.fixture
    def run(self, tmp_path: Path) -> tuple[Any, Any, DeltaBase, Path]:
        """A model after training, its selection, what it was, and its delta."""
        model = tiny("llama", 4)
        selection = select_layers(model, [1, 3])
        base = DeltaBase.of(model, selection)
        change(model, selection, 0.5)
        path = save_delta(model, tmp_path / "delta", selection=selection, base=base)
        return model, selection, base, path

    @pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_vl"])
    def test_gives_the_model_back_whatever_it_holds_now(self, tmp_path, family):
        model = tiny(family, 4)
        selection = select_layers(model, [1, 3])
        base = DeltaBase.of(model, selection)
        change(model, selection, 0.5)
        path = save_delta(model, tmp_path / "delta", selection=selection, base=base)
        expected = bits(model)
        change(model, selection, 7.0)
        restore_delta(model, path, selection=selection, base=base)
        assert_close(bits(model), expected, rtol=0, atol=0)
        restore_delta(model, path, selection=selection, base=base)
        assert_close(bits(model), expected, rtol=0, atol=0)

    def test_keeps_the_parameters_themselves(self, run):
        model, selection, base, path = run
        parameters = dict(model.named_parameters())
        restore_delta(model, path, selection=selection, base=base)
        assert all(p is parameters[name] for name, p in model.named_parameters())

    def test_refuses_another_selection_by_value(self, run):
        model, _, base, path = run
        other = select_layers(model, [1, 3], boost={3: 2.0, "mlp": 0.5})
        before = bits(model)
        match = r"this run trains layers 1, 3 of 4, .*\{3: 2\.0, 'mlp': 0\.5\}"
        with pytest.raises(DeltaError, match=match):
            restore_delta(model, path, selection=other, base=base)
        assert_close(bits(model), before, rtol=0, atol=0)

    def test_refuses_another_base_by_fingerprint(self, run):
        model, selection, base, path = run
        other = DeltaBase.of(tiny("llama", 4, seed=1), selection)
        name = "model.layers.1.mlp.up_proj.weight"
        found, expected = other.fingerprints[name], base.fingerprints[name]
        assert found != expected
        before = bits(model)
        with pytest.raises(DeltaError, match=r"another base than this run's"):
            restore_delta(model, path, selection=selection, base=other)
        assert_close(bits(model), before, rtol=0, atol=0)

    def test_refuses_a_missing_and_a_damaged_delta(self, run, tmp_path):
        model, selection, base, path = run
        before = bits(model)
        with pytest.raises(DeltaError, match=r"no delta at .*nowhere"):
            restore_delta(model, tmp_path / "nowhere", selection=selection, base=base)
        damage(path / "delta.safetensors")
        with pytest.raises(DeltaError, match="is damaged: fingerprint"):
            restore_delta(model, path, selection=selection, base=base)
        assert_close(bits(model), before, rtol=0, atol=0)


def change(model: Any, selection: Any, by: float) -> None:
    with torch.no_grad():
        for parameter in selection.parameters(model).values():
            parameter.add_(by)


def test_pushing_to_the_hub_saves_a_whole_model(base, tmp_path):
    """Transformers' `push_to_hub` saves by an internal call that names no folder."""
    trainer = trainer_on(base, tmp_path / "out", save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.save_model(_internal_call=True)
    pushed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(bits(pushed), bits(trainer.model), rtol=0, atol=0)
    assert not (tmp_path / "out" / "delta").exists()
