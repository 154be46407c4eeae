"""Half-precision weights are updated in float32, and bit for bit as a float32 run would."""

import copy
import pickle
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from layerrl.errors import SelectionError
from layerrl.precision import step_in_float32
from tests.devices import DEVICE, on_any_device
from tests.grpo import make
from tests.models import tiny
from tests.runs import assert_same_run, bits, metric, optimizer_state, pair, saved, train

pytestmark = on_any_device

SMALL_STEP = 1e-6
HALVES = [torch.bfloat16, torch.float16]


def weights(dtype: torch.dtype) -> nn.Parameter:
    draws = torch.Generator().manual_seed(0)
    return nn.Parameter((0.02 * torch.randn(40, 30, generator=draws)).to(DEVICE, dtype))


def gradient(step: int, dtype: torch.dtype) -> Tensor:
    draws = torch.Generator().manual_seed(step + 1)
    return torch.randn(40, 30, generator=draws).to(DEVICE, dtype)


def steps(optimizer: Optimizer, num: int, first: int = 0) -> None:
    [parameter] = optimizer.param_groups[0]["params"]
    for step in range(first, first + num):
        parameter.grad = gradient(step, torch.bfloat16).to(parameter.dtype)
        optimizer.step()


def master(optimizer: Optimizer) -> Tensor:
    [parameter] = optimizer.param_groups[0]["params"]
    return optimizer.state[parameter]["master"]


def in_float32(parameter: nn.Parameter, cls: Any = AdamW, **options: Any) -> Optimizer:
    optimizer = cls([parameter], **{"lr": SMALL_STEP, **options})
    step_in_float32(optimizer)
    return optimizer


def pickled(optimizer: Optimizer) -> Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("cls", [AdamW, SGD, Adafactor])
    @pytest.mark.parametrize("first", [0, 2])
    def test_step_as_the_optimizer_would_have_and_leave_it_alone(self, copied, dtype, cls, first):
        optimizer, expected = in_float32(weights(dtype), cls), in_float32(weights(dtype), cls)
        steps(optimizer, first)
        [own] = optimizer.param_groups[0]["params"]
        before = own.detach().clone()
        other = copied(optimizer)
        steps(expected, first + 2)
        steps(other, 2, first)
        assert_close(master(other), master(expected), rtol=0, atol=0)
        [theirs] = other.param_groups[0]["params"]
        assert theirs is not own
        assert_close(own.detach(), before, rtol=0, atol=0)
        steps(copied(other), 1, first + 2)
        steps(optimizer, 2, first)
        assert_close(master(optimizer), master(expected), rtol=0, atol=0)

    def test_beside_the_model_are_of_its_copy(self):
        model = nn.ParameterList([weights(torch.bfloat16)])
        optimizer = Accelerator(cpu=DEVICE.type == "cpu").prepare(in_float32(model[0]))
        other, others = copy.deepcopy((model, optimizer))
        steps(others, 1)
        assert others.param_groups[0]["params"][0] is other[0]
        assert torch.equal(other[0].data, master(others).to(torch.bfloat16))

    def test_of_an_optimizer_that_gives_all_of_its_attributes(self):
        half = weights(torch.bfloat16)
        optimizer = in_float32(half, Everything)
        steps(optimizer, 1)
        before = half.detach().clone()
        other = copy.deepcopy(optimizer)
        steps(other, 1, 1)
        assert_close(half.detach(), before, rtol=0, atol=0)


class Everything(SGD):
    def __getstate__(self) -> Any:
        return {**self.__dict__}


class TestStepInFloat32:
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("cls", [AdamW, SGD, Adafactor])
    def test_is_the_step_of_a_float32_run(self, cls, dtype):
        half = weights(dtype)
        plain = nn.Parameter(half.detach().float())
        optimizer, expected = in_float32(half, cls), cls([plain], lr=SMALL_STEP)
        steps(optimizer, 20)
        steps(expected, 20)
        assert_close(master(optimizer), plain.data, rtol=0, atol=0)
        assert_close(half.data, plain.data.to(dtype), rtol=0, atol=0)
        assert half.grad is not None
        assert half.grad.dtype == dtype

    def test_keeps_steps_that_rounding_would_lose(self):
        start = weights(torch.bfloat16).data.clone()
        lossy, kept = weights(torch.bfloat16), weights(torch.bfloat16)
        steps(AdamW([lossy], lr=SMALL_STEP), 50)
        optimizer = in_float32(kept)
        steps(optimizer, 50)
        assert (lossy.data == start).float().mean() > 0.9
        assert (master(optimizer) == start.float()).float().mean() < 0.01

    @pytest.mark.parametrize("cls", [AdamW, SGD])
    def test_resumes_from_its_state_bit_for_bit(self, cls, tmp_path):
        through, stopped = weights(torch.bfloat16), weights(torch.bfloat16)
        steps(in_float32(through, cls), 20)
        optimizer = in_float32(stopped, cls)
        steps(optimizer, 10)
        torch.save(optimizer.state_dict(), tmp_path / "state")
        resumed = in_float32(nn.Parameter(stopped.detach().clone()), cls)
        resumed.load_state_dict(torch.load(tmp_path / "state"))
        steps(resumed, 10, first=10)
        assert_close(resumed.param_groups[0]["params"][0].data, through.data, rtol=0, atol=0)
        assert master(resumed).dtype == torch.float32

    def test_a_value_written_by_others_counts(self):
        parameter = weights(torch.bfloat16)
        optimizer = in_float32(parameter, SGD, lr=0.0)
        steps(optimizer, 1)
        with torch.no_grad():
            parameter[0] = 0.5
        steps(optimizer, 1)
        assert (master(optimizer)[0] == 0.5).all()
        assert (parameter[0] == 0.5).all()

    def test_a_parameter_without_a_gradient_is_left_alone(self):
        parameter = weights(torch.bfloat16)
        optimizer = in_float32(parameter)
        optimizer.step()
        assert not optimizer.state[parameter]
        steps(optimizer, 1)
        assert "exp_avg" in optimizer.state[parameter]

    def test_float32_needs_no_master(self):
        parameter = weights(torch.float32)
        optimizer = in_float32(parameter)
        steps(optimizer, 2)
        assert "master" not in optimizer.state[parameter]

    def test_after_an_exception_in_the_step_the_dtype_is_back(self):
        class Failing(SGD):
            def step(self, closure=None):
                super().step()
                raise OSError("out of cheese")

        parameter = weights(torch.bfloat16)
        optimizer = in_float32(parameter, Failing)
        with pytest.raises(OSError, match="cheese"):
            steps(optimizer, 1)
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.bfloat16

    def test_a_first_step_that_failed_can_be_tried_again(self):
        class Failing(AdamW):
            fails = True

            def step(self, closure=None):
                if self.fails:
                    raise OSError("out of cheese")
                return super().step(closure)

        parameter = weights(torch.bfloat16)
        optimizer = in_float32(parameter, Failing)
        with pytest.raises(OSError, match="cheese"):
            steps(optimizer, 1)
        assert not optimizer.state
        Failing.fails = False
        steps(optimizer, 1)
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq", "master"}

    def test_a_load_that_failed_leaves_the_state(self):
        parameter = weights(torch.bfloat16)
        optimizer = in_float32(parameter)
        steps(optimizer, 2)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises((KeyError, ValueError)):
            optimizer.load_state_dict({"state": {}, "param_groups": []})
        assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
        assert optimizer.param_groups[0]["params"] == [parameter]

    def test_twice_is_once(self):
        optimizer = in_float32(weights(torch.bfloat16))
        step = optimizer.step
        step_in_float32(optimizer)
        assert optimizer.step == step

    @pytest.mark.parametrize("scheduler_first", [True, False])
    def test_with_a_scheduler_made_before_or_after(self, scheduler_first):
        parameter, start = weights(torch.bfloat16), weights(torch.bfloat16)
        optimizer = AdamW([parameter], lr=SMALL_STEP)
        if scheduler_first:
            scheduler = LambdaLR(optimizer, lambda _: 1.0)
            step_in_float32(optimizer)
        else:
            step_in_float32(optimizer)
            scheduler = LambdaLR(optimizer, lambda _: 1.0)
        steps(optimizer, 3)
        scheduler.step()
        assert (master(optimizer) == start.float()).float().mean() < 0.05

    def test_inside_accelerates_wrapper(self):
        parameter = weights(torch.bfloat16)
        optimizer = Accelerator(cpu=DEVICE.type == "cpu").prepare(AdamW([parameter], lr=SMALL_STEP))
        step_in_float32(optimizer)
        steps(optimizer, 2)
        assert master(optimizer).dtype == torch.float32

    def test_hooks_on_steps_run_once(self):
        optimizer = in_float32(weights(torch.bfloat16))
        optimizer.load_state_dict(optimizer.state_dict())
        calls = []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        steps(optimizer, 3)
        assert len(calls) == 3

    def test_hooks_on_gradients_stay(self):
        """DDP's hang on this node; a parameter that changes its dtype gets another one."""
        parameter = weights(torch.bfloat16)
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        steps(in_float32(parameter), 1)
        assert parameter.expand_as(parameter).grad_fn.next_functions[0][0] is node

    def test_a_closure_sees_the_models_own_weights(self):
        parameter = weights(torch.bfloat16)
        optimizer = in_float32(parameter)
        parameter.grad = gradient(0, torch.bfloat16)
        assert optimizer.step(lambda: parameter.dtype) == torch.bfloat16


class TestTrainer:
    def run(self, folder, dtype: torch.dtype, **changes: Any) -> Any:
        # Everyone starts from the same, rounded values.
        model = tiny("llama", 4).to(torch.bfloat16).to(dtype)
        arguments = {"selection": 2, **changes.pop("arguments", {})}
        values = {"learning_rate": SMALL_STEP, "max_steps": 10, "lr_scheduler_type": "constant"}
        return make(model, folder, selection=2, arguments=arguments, **(values | changes))

    def test_tracks_a_float32_run_where_bf16_loses_most_updates(self, tmp_path):
        runs = {
            "float32": self.run(tmp_path, torch.float32),
            "masters": self.run(tmp_path, torch.bfloat16),
            "lossy": self.run(tmp_path, torch.bfloat16, arguments={"master_weights": False}),
        }
        start = {
            n: p.detach().float().clone()
            for n, p in runs["masters"].masked_run.layers.parameters.items()
        }
        train(*runs.values())
        state = runs["masters"].optimizer.optimizer.state
        moved = {
            "float32": {
                n: p.data - start[n]
                for n, p in runs["float32"].masked_run.layers.parameters.items()
            },
            "masters": {
                n: state[p]["master"] - start[n]
                for n, p in runs["masters"].masked_run.layers.parameters.items()
            },
            "lossy": {
                n: p.float() - start[n]
                for n, p in runs["lossy"].masked_run.layers.parameters.items()
            },
        }
        flat = {run: torch.cat([d.flatten() for d in by.values()]) for run, by in moved.items()}
        assert (flat["lossy"] == 0).float().mean() > 0.9
        assert (flat["masters"] == 0).float().mean() < 0.1
        agree = torch.nn.functional.cosine_similarity(flat["masters"], flat["float32"], dim=0)
        assert agree > 0.9
        assert (flat["masters"].norm() / flat["float32"].norm()).item() == pytest.approx(1, abs=0.1)

    def test_weights_stay_in_half_precision_and_only_the_layer_has_masters(self, tmp_path):
        trainer = self.run(tmp_path, torch.bfloat16)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
        state = trainer.optimizer.optimizer.state
        assert set(state) == set(trainer.masked_run.layers.parameters.values())
        assert all(held["master"].dtype == torch.float32 for held in state.values())

    def test_resume_is_exact(self, tmp_path):
        saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "learning_rate": 1e-3}
        whole = self.run(tmp_path / "whole", torch.bfloat16, **saving)
        train(whole)
        resumed = self.run(tmp_path / "resumed", torch.bfloat16, **saving)
        train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert_close(bits(resumed.model), bits(whole.model), rtol=0, atol=0)
        assert_close(optimizer_state(resumed), optimizer_state(whole), rtol=0, atol=0)

    def test_without_masters_is_layers_frozen_by_hand(self, tmp_path):
        folder = saved(tmp_path / "base", tiny("llama", 4).to(torch.bfloat16))
        trainers = pair(folder, dtype=torch.bfloat16, masked={"master_weights": False})
        train(*trainers)
        assert_same_run(*trainers)

    def test_a_second_training_steps_in_float32_too(self, tmp_path):
        trainer = self.run(tmp_path, torch.bfloat16, max_steps=2)
        trainer.train()
        state = trainer.optimizer.optimizer.state
        before = {p: held["master"].clone() for p, held in state.items()}
        trainer.train()
        state = trainer.optimizer.optimizer.state
        changed = [(state[p]["master"] != was).float().mean() for p, was in before.items()]
        assert min(changed) > 0.5

    def test_the_relative_update_is_that_of_the_masters(self, tmp_path):
        trainer = self.run(tmp_path, torch.bfloat16)
        trainer.train()
        [*_, last] = metric(trainer, "layerrl/relative_update/layer_2")
        state, start = trainer.optimizer.optimizer.state, trainer.masked_run.initial
        moved = [
            state[p]["master"] - start[n] for n, p in trainer.masked_run.layers.parameters.items()
        ]
        size = torch.cat([t.float().flatten() for t in start.values()]).norm()
        expected = torch.cat([m.flatten() for m in moved]).norm() / size
        assert last == pytest.approx(expected.item(), rel=1e-3)
        assert last > 0

    def test_an_optimizer_that_updates_layer_by_layer_is_refused(self, tmp_path):
        trainer = self.run(tmp_path, torch.bfloat16)
        trainer.args.optim = "galore_adamw_layerwise"
        from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

        trainer.optimizer = LayerWiseDummyOptimizer({})
        with pytest.raises(SelectionError, match="master_weights=False"):
            trainer.masked_run.optimizer.fit_another(trainer)
