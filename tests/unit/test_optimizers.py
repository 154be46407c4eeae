"""Optimizers of every kind step what trains: as a float32 run would, or with an error."""

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, RAdam, RMSprop
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from transformers.optimization import Adafactor as TransformersAdafactor

from layerrl import LayerMaskedGRPOTrainer, select_layers
from layerrl.errors import SelectionError
from layerrl.optimizer import check_steps, keep_only, nested
from layerrl.precision import step_in_float32, stepped_value
from layerrl.trainer.schedule import LayerSchedule
from tests.devices import DEVICE, on_any_device, on_cpu
from tests.grpo import make
from tests.models import tiny
from tests.optimizers import (
    Averaging,
    Both,
    Delegating,
    Flat,
    Lookahead,
    Merged,
    Nested,
    OnCopies,
    Perturbing,
    Saved,
)
from tests.runs import (
    assert_same_run,
    bits,
    evaluation,
    metric,
    optimizer_state,
    pair,
    saved,
    train,
)

pytestmark = on_any_device

SHAPES = [(6, 4), (4,), (5, 6)]


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    # Everyone starts from the same, rounded values.
    drawn = [0.02 * torch.randn(shape, generator=draws) for shape in SHAPES]
    return [nn.Parameter(value.bfloat16().to(DEVICE, dtype)) for value in drawn]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    draws = torch.Generator().manual_seed(step + 1)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=draws).bfloat16().to(p)


def closure(parameters: list[nn.Parameter]) -> Tensor:
    """Of the weights as the model sees them, rounded."""
    loss = torch.zeros((), device=DEVICE)
    for p in parameters:
        seen = p.detach().bfloat16()
        p.grad = (seen - 0.5).to(p.dtype)
        loss += (seen.float() - 0.5).square().sum() / 2
    return loss


def bitsandbytes(name: str) -> Any:
    return partial(getattr(pytest.importorskip("bitsandbytes").optim, name), min_8bit_size=0)


def schedule_free(name: str, **options: Any) -> Any:
    return partial(getattr(pytest.importorskip("schedulefree"), name), **options)


def wrapped_schedule_free() -> Any:
    wrapper = pytest.importorskip("schedulefree").ScheduleFreeWrapper
    return lambda params, lr: wrapper(SGD(params, lr=lr), momentum=0.9)


def galore(name: str, library: str = "galore_torch", **options: Any) -> Any:
    cls = getattr(pytest.importorskip(library), name)

    def build(params, lr):
        params = list(params)
        low_rank = {"rank": 2, "update_proj_gap": 2, "scale": 0.5, "proj_type": "std", **options}
        matrices = {"params": [p for p in params if p.ndim == 2], **low_rank}
        with warnings.catch_warnings(action="ignore"):
            return cls([{"params": [p for p in params if p.ndim != 2]}, matrices], lr=lr)

    return build


MUON = lambda params, lr: Muon([p for p in params if p.ndim == 2], lr=lr)  # noqa: E731
FACTOR = partial(TransformersAdafactor, scale_parameter=False, relative_step=False)
KINDS: dict[str, Any] = {
    "adamw": AdamW,
    "adamw, one by one": partial(AdamW, foreach=False),
    "adamw, foreach": partial(AdamW, foreach=True),
    "adamw, fused": partial(AdamW, fused=True),
    "adam, amsgrad": partial(Adam, amsgrad=True),
    "sgd": SGD,
    "sgd, momentum": partial(SGD, momentum=0.9, nesterov=True),
    "nadam": NAdam,
    "radam": RAdam,
    "rmsprop": partial(RMSprop, centered=True, momentum=0.9),
    "adagrad, state from the start": partial(Adagrad, initial_accumulator_value=0.5),
    "adafactor": Adafactor,
    "adafactor of transformers": FACTOR,
    "muon alone": MUON,
    "composite": Both,
    "composite, groups copied": partial(Both, shared=False),
    "composite, in a dict": partial(Both, keep=lambda inner: dict(enumerate(inner))),
    "composite, in a tuple": partial(Both, keep=tuple),
    "composite, nested": Nested,
    "composite, its own state dict": Saved,
    "delegating": Delegating,
    "no Optimizer, state made anew": Merged,
    "lookahead": Lookahead,
    "lookahead, later": partial(Lookahead, eager=False),
    "averaging": Averaging,
    "8-bit lion": lambda *args, **kwargs: bitsandbytes("Lion8bit")(*args, **kwargs),
    "8-bit adamw": lambda *args, **kwargs: bitsandbytes("AdamW8bit")(*args, **kwargs),
    "schedule-free adamw": lambda *a, **k: schedule_free("AdamWScheduleFree")(*a, **k),
    "schedule-free adamw, no foreach": lambda *a, **k: schedule_free(
        "AdamWScheduleFree", foreach=False
    )(*a, **k),
    "schedule-free sgd": lambda *a, **k: schedule_free("SGDScheduleFree", warmup_steps=2)(*a, **k),
    "schedule-free radam": lambda *a, **k: schedule_free("RAdamScheduleFree")(*a, **k),
    "schedule-free wrapper": lambda *a, **k: wrapped_schedule_free()(*a, **k),
    "galore": lambda *a, **k: galore("GaLoreAdamW")(*a, **k),
    "apollo": lambda *a, **k: galore(
        "APOLLOAdamW", "apollo_torch", proj="random", scale_type="channel"
    )(*a, **k),
}
WITH_CLOSURE: dict[str, Any] = {
    "perturbing": Perturbing,
    "lbfgs": partial(torch.optim.LBFGS, max_iter=3),
    "lbfgs, line search": partial(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
    "adamw": AdamW,
}
LR = 1e-3


def in_float32(parameters: list[nn.Parameter], kind: Any) -> Any:
    optimizer = kind(parameters, lr=LR)
    step_in_float32(optimizer)
    check_steps(optimizer, lambda: stepped(optimizer, parameters))
    return optimizer


def stepped(optimizer: Any, parameters: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {str(i): p for i, p in enumerate(parameters) if id(p) in held}


def set_mode(optimizer: Any, mode: str) -> None:
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


def run(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> None:
    """Training with an evaluation after each second step."""
    for step in steps:
        set_mode(optimizer, "train")
        give_gradients(parameters, step)
        optimizer.step()
        if step % 2:
            set_mode(optimizer, "eval")


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def loaded(optimizer: Any) -> Any:
    """Another one, that was given its state."""
    other = copy.deepcopy(optimizer)
    other.state.clear()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def assert_rounds(optimizer: Any, halves: list[nn.Parameter], plain: list[nn.Parameter]) -> None:
    held = stepped(optimizer, halves)
    for i, (half, expected) in enumerate(zip(halves, plain, strict=True)):
        assert half.dtype == torch.bfloat16
        assert_close(half.data, expected.data.bfloat16(), rtol=0, atol=0)
        if str(i) in held:
            assert_close(stepped_value(optimizer, half), expected.data, rtol=0, atol=0)


class TestKinds:
    @pytest.mark.parametrize("name", KINDS)
    def test_is_the_step_of_a_float32_run(self, name):
        halves, plain = weights(torch.bfloat16), weights(torch.float32)
        optimizer, expected = in_float32(halves, KINDS[name]), KINDS[name](plain, lr=LR)
        before = [half.detach().float() for half in halves]
        for step in range(7):
            run(optimizer, halves, range(step, step + 1))
            run(expected, plain, range(step, step + 1))
            assert_rounds(optimizer, halves, plain)
        moved = sum(
            not torch.equal(stepped_value(optimizer, half), was)
            for half, was in zip(halves, before, strict=True)
        )
        assert moved == len(stepped(optimizer, halves))
        inner = [sum(len(one.state) for one in nested(o)) for o in (optimizer, expected)]
        assert inner[0] <= inner[1] + len(halves)  # the outermost also shows the masters

    @pytest.mark.parametrize("name", WITH_CLOSURE)
    def test_a_closure_runs_on_rounded_weights(self, name):
        halves, plain = weights(torch.bfloat16), weights(torch.float32)
        optimizer = in_float32(halves, WITH_CLOSURE[name])
        expected = WITH_CLOSURE[name](plain, lr=LR)
        for _ in range(4):
            losses = [
                one.step(partial(closure, held))
                for one, held in ((optimizer, halves), (expected, plain))
            ]
            assert_close(*losses, rtol=0, atol=0)
            assert_rounds(optimizer, halves, plain)
        assert all(
            (h.float() != w).any() for h, w in zip(halves, weights(torch.float32), strict=True)
        )

    @pytest.mark.parametrize("name", [name for name in KINDS if name not in {"galore", "apollo"}])
    def test_resumes_from_its_state_bit_for_bit(self, name, tmp_path):
        through, halves = weights(torch.bfloat16), weights(torch.bfloat16)
        whole = in_float32(through, KINDS[name])
        run(whole, through, range(4))
        optimizer = in_float32(halves, KINDS[name])
        run(optimizer, halves, range(4))
        torch.save(optimizer.state_dict(), tmp_path / "state")
        again = [nn.Parameter(half.detach().clone()) for half in halves]
        resumed = in_float32(again, KINDS[name])
        resumed.load_state_dict(torch.load(tmp_path / "state"))
        if self.keeps_all_its_state(resumed, whole):
            run(whole, through, range(4, 7))
            run(resumed, again, range(4, 7))
        for half, expected in zip(again, through, strict=True):
            found = stepped_value(resumed, half)
            assert_close(found, stepped_value(whole, expected), rtol=0, atol=0)

    def keeps_all_its_state(self, resumed: Any, whole: Any) -> bool:
        """Plain optimizers that hold others, or plain attributes, forget those in a state dict."""
        if isinstance(whole, Lookahead) or type(whole).__name__ == "ScheduleFreeWrapper":
            return False
        return [len(o.state) for o in nested(resumed)] == [len(o.state) for o in nested(whole)]

    def test_a_method_that_writes_between_steps_writes_to_masters(self):
        halves, plain = weights(torch.bfloat16), weights(torch.float32)
        optimizer, expected = in_float32(halves, Perturbing), Perturbing(plain, lr=LR)
        for step in range(4):
            for one, held in ((optimizer, halves), (expected, plain)):
                give_gradients(held, 2 * step)
                one.first_step()
                assert all(p.grad is None for p in held)
                give_gradients(held, 2 * step + 1)
                one.second_step()
            assert_rounds(optimizer, halves, plain)

    def test_one_with_a_dtype_of_its_own_is_refused(self):
        class Stubborn(SGD):
            @torch.no_grad()
            def step(self, closure=None):
                for p in self.param_groups[0]["params"]:
                    unit = torch.eye(p.numel(), dtype=torch.bfloat16, device=p.device)
                    p.copy_(p.flatten() @ unit)

        halves = weights(torch.bfloat16)
        optimizer = in_float32(halves, Stubborn)
        give_gradients(halves, 0)
        with pytest.raises(
            SelectionError, match=r"Stubborn cannot .*master_weights=False"
        ) as error:
            optimizer.step()
        assert isinstance(error.value.__cause__, RuntimeError)
        assert all(half.dtype == torch.bfloat16 for half in halves)

    def test_one_that_knows_weights_by_their_address_is_refused(self):
        class ByAddress(SGD):
            def __init__(self, params, **kwargs):
                super().__init__(params, **kwargs)
                self.rates = {p.data_ptr(): 0.1 for p in self.param_groups[0]["params"]}

            @torch.no_grad()
            def step(self, closure=None):
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad * self.rates[p.data_ptr()])

        halves = weights(torch.bfloat16)
        optimizer = in_float32(halves, ByAddress)
        give_gradients(halves, 0)
        with pytest.raises(SelectionError, match=r"ByAddress cannot .*master_weights=False"):
            optimizer.step()

    def test_attributes_and_weak_references_stay(self):
        halves = weights(torch.bfloat16)
        for half in halves:
            half.tag = "mine"  # pyright: ignore[reportAttributeAccessIssue]

        class Tagged(SGD):
            def step(self, closure=None):
                assert all(p.tag == "mine" for p in self.param_groups[0]["params"])
                super().step()

        run(in_float32(halves, Tagged), halves, range(2))
        assert all(half.grad is not None and half.grad.dtype == half.dtype for half in halves)

    def test_masters_are_loaded_to_where_the_weights_are(self):
        halves = weights(torch.bfloat16)
        optimizer = in_float32(halves, AdamW)
        run(optimizer, halves, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["master"] = state["master"].double()  # as if it were another device
        optimizer.load_state_dict(saved)
        assert {optimizer.state[p]["master"].dtype for p in halves} == {torch.float32}
        assert all("master" in state for state in saved["state"].values())

    @pytest.mark.parametrize("cls", [AdamW, RMSprop, Adagrad, SGD])
    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled, loaded])
    def test_a_master_may_be_all_that_is_kept_of_a_weight(self, copied, cls):
        halves = weights(torch.bfloat16)
        optimizer = in_float32(halves, cls)
        run(optimizer, halves, range(2))
        kept = optimizer.state[halves[0]]["master"]
        optimizer.state[halves[0]] = {"master": kept}
        other = copied(optimizer)
        first, *others = other.param_groups[0]["params"]
        assert other.state[first].keys() == {"master"}
        assert_close(other.state[first]["master"], kept, rtol=0, atol=0)
        assert all(other.state[p].keys() == optimizer.state[halves[1]].keys() for p in others)

    def test_bitsandbytes_finds_its_state_on_the_gpu_that_the_weights_are_on(self):
        """A checkpoint is read to the CPU, and it moves only what it knows itself."""
        bitsandbytes = pytest.importorskip("bitsandbytes")
        made = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device="cpu"))
        optimizer = in_float32([made], bitsandbytes.optim.AdamW8bit)
        made.grad = torch.ones_like(made)
        optimizer.step()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        saved = tree_map_only(Tensor, mode.from_tensor, optimizer.state_dict())
        with mode:
            half = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device="cuda:0"))
        resumed = bitsandbytes.optim.AdamW8bit([half], lr=LR)
        with mode:
            step_in_float32(resumed)
            resumed.load_state_dict(saved)
        state = {k: v for k, v in resumed.state[half].items() if isinstance(v, Tensor)}
        assert {"master", "state1", "state2", "absmax1"} <= {*state}
        assert {str(value.device) for value in state.values()} == {"cuda:0"}


class TestCheckSteps:
    def checked(self, kind: Any, dtype: torch.dtype = torch.float32, lr: Any = LR, **options: Any):
        parameters = weights(dtype)
        optimizer = kind(parameters, lr=lr, **options)
        if dtype == torch.bfloat16:
            step_in_float32(optimizer)
        check_steps(optimizer, lambda: {f"w{i}": p for i, p in enumerate(parameters)})
        return optimizer, parameters

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_an_optimizer_on_copies(self, dtype):
        optimizer, parameters = self.checked(OnCopies, dtype)
        give_gradients(parameters, 0)
        advice = "master_weights=False" if dtype == torch.bfloat16 else "not over copies"
        with pytest.raises(
            SelectionError,
            match=f"the step of OnCopies did not reach 3 of 3 .* w0, w1, w2.*{advice}",
        ):
            optimizer.step()

    def test_one_tensor_of_three(self):
        class Forgetful(SGD):
            def step(self, closure=None):
                self.param_groups[0]["params"][1].grad = None
                super().step()

        optimizer, parameters = self.checked(Forgetful)
        give_gradients(parameters, 0)
        with pytest.raises(SelectionError, match=r"did not reach 1 of 3 .*gradient: w1\."):
            optimizer.step()

    def test_a_buffer_that_masters_are_not_in(self):
        optimizer, parameters = self.checked(Flat, torch.bfloat16)
        give_gradients(parameters, 0)
        with pytest.raises(SelectionError, match=r"flat buffer.*master_weights=False"):
            optimizer.step()

    def test_a_buffer_in_float32_is_fine(self):
        optimizer, parameters = self.checked(Flat)
        run(optimizer, parameters, range(2))

    def test_parameters_that_were_replaced(self):
        parameters = weights(torch.float32)
        optimizer = SGD(parameters, lr=LR)
        trained = {str(i): p for i, p in enumerate(parameters)}
        check_steps(optimizer, lambda: trained)
        trained["1"] = nn.Parameter(trained["1"].detach().clone())
        give_gradients(list(trained.values()), 0)
        with pytest.raises(SelectionError, match="1 of 3 trained tensors that had a gradient: 1"):
            optimizer.step()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("lr", [0.0, 1e-12, torch.tensor(0.0)], ids=str)
    def test_no_alarm_where_nothing_could_move(self, dtype, lr):
        optimizer, parameters = self.checked(SGD, dtype, lr)
        run(optimizer, parameters, range(2))
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = LR
        optimizer.step()
        parameters[0].grad = torch.full_like(parameters[0], torch.inf)
        parameters[1].grad = None
        optimizer.step()

    def test_a_rate_of_0_delays_the_check(self):
        optimizer, parameters = self.checked(OnCopies, lr=0.0)
        run(optimizer, parameters, range(3))
        for one in nested(optimizer):
            for group in one.param_groups:
                group["lr"] = LR
        with pytest.raises(SelectionError, match="did not reach 3 of 3"):
            run(optimizer, parameters, range(1))

    def test_a_rate_of_0_inside_is_no_fault(self):
        optimizer, parameters = self.checked(partial(Both, shared=False))
        optimizer.inner[1] = SGD(optimizer.inner[1].param_groups[0]["params"], lr=0.0)
        run(optimizer, parameters, range(2))

    def test_a_step_too_small_for_half_precision_is_no_fault(self):
        parameters = weights(torch.bfloat16)
        optimizer = SGD(parameters, lr=1e-9)
        check_steps(optimizer, lambda: {f"w{i}": p for i, p in enumerate(parameters)})
        run(optimizer, parameters, range(2))

    def test_a_state_is_enough(self):
        """Some optimizers wait, or gather gradients, before they move."""

        class Waiting(SGD):
            def step(self, closure=None):
                for p in self.param_groups[0]["params"]:
                    self.state[p]["seen"] = p.grad.clone()

        optimizer, parameters = self.checked(Waiting)
        run(optimizer, parameters, range(2))

    def test_tensors_of_others_are_theirs(self):
        """DeepSpeed's optimizer holds its own copies, and its engine writes them back."""
        optimizer, parameters = self.checked(SGD)
        optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
        run(optimizer, parameters, range(2))

    def test_a_second_time_is_once(self):
        optimizer, parameters = self.checked(SGD)
        step = optimizer.step
        check_steps(optimizer, dict)
        assert optimizer.step == step
        run(optimizer, parameters, range(2))

    @pytest.mark.parametrize("early", [False, True])
    def test_an_error_in_a_first_step_is_the_optimizers_own(self, early):
        """Where nothing was loaded, whether its state was made with it or in the step."""

        class Missing(SGD):
            def __init__(self, params: Any) -> None:
                super().__init__(params, lr=1.0)
                if early:
                    self.state[self.param_groups[0]["params"][0]]["step"] = 0

            def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                self.state[self.param_groups[0]["params"][0]]["momentum"].add_(1)

        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        optimizer = Missing([parameter])
        check_steps(optimizer, lambda: {"w": parameter})
        with pytest.raises(KeyError, match="momentum"):
            optimizer.step()


class TestKeepOnly:
    def test_takes_frozen_tensors_out_at_every_depth(self):
        parameters = weights(torch.float32)
        optimizer = Both(parameters, shared=False)
        optimizer.state[parameters[0]]["seed"] = 1
        keep_only(optimizer, parameters[1:])
        held = [p for one in nested(optimizer) for g in one.param_groups for p in g["params"]]
        assert {id(p) for p in held} == {id(p) for p in parameters[1:]}
        assert not optimizer.state

    def test_names_a_projection_of_nothing(self):
        parameters = weights(torch.float32)
        groups: Any = [{"params": parameters[:1], "rank": 2}, {"params": parameters[1:]}]
        with pytest.raises(SelectionError, match="optim_target_modules matches, and none of them"):
            keep_only(SGD(groups, lr=LR), parameters[1:])


LOW_RANK = {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=2,update_proj_gap=2"}
BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "galore_adamw": LOW_RANK,
    "galore_adafactor": {"optim_target_modules": "all-linear"},
    "galore_adamw_layerwise": {"optim_target_modules": r".*\.mlp\..*"},
    "apollo_adamw": {**LOW_RANK, "optim_args": "rank=1"},
    "apollo_adamw_layerwise": {**LOW_RANK, "optim_args": "rank=1"},
    "lomo": {"max_grad_norm": 0.0},
    "schedule_free_adamw": {"lr_scheduler_type": "constant", **evaluation()},
    "schedule_free_sgd": {"lr_scheduler_type": "constant", **evaluation()},
    "schedule_free_radam": {"lr_scheduler_type": "constant", **evaluation(4), "max_steps": 8},
    "lion_8bit": {},
    "adafactor": {},
    "sgd": {"optim_args": "momentum=0.9", "gradient_accumulation_steps": 2},
}
LIBRARIES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "schedule": "schedulefree",
    "lion": "bitsandbytes",
}


def need(optim: str) -> None:
    library = LIBRARIES.get(optim.split("_", maxsplit=1)[0])
    if library:
        pytest.importorskip(library)


class AllOfIt:
    """A factory that takes the whole model, as one for Muon and AdamW may."""

    def __call__(self, model, **options):
        return Both(model.parameters(), **options)


class TestTrainer:
    def trainer(self, folder: Any, kind: Any = None, dtype: Any = torch.bfloat16, **changes: Any):
        model = tiny("llama", 4).to(dtype)
        arguments = {"selection": 2, **changes.pop("arguments", {})}
        if kind is not None:
            held = select_layers(model, arguments["selection"]).parameters(model).values()
            arguments["optimizers"] = (kind(held, lr=1e-2), None)
        return make(model, folder, arguments=arguments, selection=2, **changes)

    @pytest.mark.parametrize(
        ("optim", "dtype"),
        [
            *((optim, torch.float32) for optim in BY_TRANSFORMERS),
            *((optim, torch.bfloat16) for optim in ("schedule_free_adamw", "lomo", "lion_8bit")),
        ],
        ids=str,
    )
    def test_is_layers_frozen_by_hand(self, tmp_path, optim, dtype):
        need(optim)
        changes = {"max_steps": 3, **BY_TRANSFORMERS[optim]}
        folder = saved(tmp_path / "base", tiny("llama", 4).to(dtype))
        masked = {"master_weights": False}
        plain, trainer = pair(folder, dtype=dtype, masked=masked, optim=optim, **changes)
        before = bits(trainer.model)
        train(plain, trainer)
        for state in (*plain.optimizer.state.values(), *trainer.optimizer.state.values()):
            if "projector" in state:
                state["projector"] = state["projector"].ortho_matrix
        if optim.startswith("apollo") and "layerwise" not in optim:
            trained = [
                *trainer.masked_run.layers.parameters.values()
            ]  # of frozen ones, plain TRL has seeds as state
            assert {*trainer.optimizer.state} <= {*trained}
            for parameter in plain.model.parameters():
                if not parameter.requires_grad:
                    plain.optimizer.state.pop(parameter, None)
        assert_same_run(trainer, plain)
        changed = {n for n, now in bits(trainer.model).items() if not torch.equal(now, before[n])}
        assert changed
        assert changed <= {*trainer.masked_run.layers.parameters}

    @pytest.mark.parametrize(
        "optim", ["galore_adamw", "schedule_free_adamw", "schedule_free_radam"]
    )
    def test_steps_in_float32(self, tmp_path, optim):
        need(optim)
        changes = {**BY_TRANSFORMERS[optim], "max_steps": 12, "learning_rate": 1e-6}
        trainer = self.trainer(tmp_path, optim=optim, **changes)
        before = bits(trainer.model)
        trainer.train()
        state = trainer.optimizer.state
        for name, parameter in trainer.masked_run.layers.parameters.items():
            master = state[parameter]["master"]
            assert master.dtype == torch.float32
            assert (on_cpu(master) != before[name].float()).float().mean() > 0.3
            assert_close(parameter.data, master.bfloat16(), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", [Both, partial(Both, shared=False), Nested, Saved, Delegating])
    def test_a_composite_moves_every_tensor(self, tmp_path, kind, dtype):
        trainer = self.trainer(tmp_path, kind, dtype, warmup_steps=1)
        before = bits(trainer.model)
        trainer.train()
        after = bits(trainer.model)
        changed = {name for name, now in after.items() if not torch.equal(now, before[name])}
        assert changed == {*trainer.masked_run.layers.parameters}
        inner = [*nested(trainer.optimizer)]
        for one in inner:
            keys = [{*state} - {"master"} for state in one.state.values()]
            assert len(keys) <= len(trainer.masked_run.layers.parameters)
        moments = {id(p) for one in inner for p, s in one.state.items() if {*s} - {"master"}}
        assert moments == {id(p) for p in trainer.masked_run.layers.parameters.values()}

    def test_a_composite_resumes_from_its_own_state_dict(self, tmp_path):
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        whole, resumed = (self.trainer(tmp_path / n, Saved, **saving) for n in ("whole", "resumed"))
        train(whole)
        train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert_close(bits(resumed.model), bits(whole.model), rtol=0, atol=0)
        assert_close(optimizer_state(resumed), optimizer_state(whole), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_one_that_does_not_reach_its_tensors(self, tmp_path, dtype):
        trainer = self.trainer(tmp_path, OnCopies, dtype)
        with pytest.raises(SelectionError, match=r"OnCopies did not reach 9 of 9 .*\.layers\.2\."):
            trainer.train()

    def test_no_alarm_in_a_warmup_without_state(self, tmp_path):
        trainer = self.trainer(tmp_path, SGD, torch.float32, warmup_steps=2)
        trainer.train()
        assert metric(trainer, "learning_rate")[0] == 0.0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_factory_over_the_whole_model(self, tmp_path, dtype):
        trainer = self.trainer(tmp_path, dtype=dtype)
        trainer.optimizer_cls_and_kwargs = (AllOfIt, {"lr": 1e-2})  # GRPO has no argument for it
        before = bits(trainer.model)
        trainer.train()
        after = bits(trainer.model)
        changed = {name for name, now in after.items() if not torch.equal(now, before[name])}
        assert changed == {*trainer.masked_run.layers.parameters}

    @pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
    @pytest.mark.parametrize(
        ("dtype", "boost", "why"),
        [(torch.bfloat16, None, "master_weights=False"), (torch.float32, {2: 2.0}, "boost")],
    )
    def test_an_update_in_the_backward_is_refused_before_it_is_made(
        self, tmp_path, optim, dtype, boost, why
    ):
        need(optim)
        model = tiny("llama", 4).to(dtype)
        selection = select_layers(model, 2, boost=boost)
        trainer = make(model, tmp_path, selection=selection, optim=optim, **BY_TRANSFORMERS[optim])
        with pytest.raises(SelectionError, match=f"{optim}.*{why}"):
            trainer.train()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert not any(p._backward_hooks for p in model.parameters())
        assert trainer.optimizer is None

    def test_a_projection_of_frozen_layers_alone(self, tmp_path):
        need("galore_adamw")
        changes = {"optim_target_modules": r".*layers\.1\.mlp\..*"}
        trainer = self.trainer(tmp_path, optim="galore_adamw", **changes)
        with pytest.raises(SelectionError, match="optim_target_modules matches, and none of them"):
            trainer.train()

    @pytest.mark.parametrize("frozen", [False, True])
    def test_one_that_a_subclass_makes(self, tmp_path, frozen):
        class Own(LayerMaskedGRPOTrainer):
            def create_optimizer(self, model=None):
                held = [p for p in self.model.parameters() if frozen or p.requires_grad]
                self.optimizer = AdamW(held, lr=1e-6)
                return self.optimizer

        trainer = self.trainer(tmp_path, trainer=Own)
        if frozen:
            with pytest.raises(SelectionError, match=r"holds frozen .*a create_optimizer of"):
                trainer.train()
        else:
            trainer.train()
            state = trainer.optimizer.state
            assert all("master" in state[p] for p in trainer.masked_run.layers.parameters.values())

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("resumes", [False, True])
    def test_one_that_a_subclass_makes_with_its_scheduler(self, tmp_path, frozen, resumes):
        all_of_it = False

        class Own(LayerMaskedGRPOTrainer):
            def create_scheduler(self, num_training_steps, optimizer=None):
                held = [p for p in self.model.parameters() if all_of_it or p.requires_grad]
                self.optimizer = AdamW(held, lr=1e-6)
                self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
                return self.lr_scheduler

        saves = {"save_strategy": "steps", "save_steps": 1}
        resume = {}
        if resumes:
            self.trainer(tmp_path, trainer=Own, **saves).train()
            resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
        all_of_it = frozen
        trainer = self.trainer(tmp_path, trainer=Own)
        if frozen:
            with pytest.raises(SelectionError, match="holds frozen"):
                trainer.train(**resume)
        else:
            trainer.train(**resume)
            state = trainer.optimizer.state
            assert all("master" in state[p] for p in trainer.masked_run.layers.parameters.values())

    def test_one_that_takes_the_place_of_the_scaled_one(self, tmp_path):
        class Own(LayerMaskedGRPOTrainer):
            def create_optimizer(self, model=None):
                super().create_optimizer(model)
                held = [p for p in self.model.parameters() if p.requires_grad]
                self.optimizer = AdamW(held, lr=1e-6)
                return self.optimizer

        boosted = select_layers(tiny("llama", 4), 2, boost={2: 3.0})
        trainer = self.trainer(tmp_path, trainer=Own, arguments={"selection": boosted})
        with pytest.raises(SelectionError, match="scales cannot be put into AdamW"):
            trainer.train()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_layers_that_take_turns_start_anew_inside_of_a_composite(self, tmp_path, dtype):
        schedule = LayerSchedule([1, 2], every=2)
        arguments = {"selection": [1, 2], "callbacks": [schedule]}
        trainer = self.trainer(tmp_path, Both, dtype, arguments=arguments, max_steps=4)
        trainer.train()
        moments = {
            p
            for one in nested(trainer.optimizer)
            for p, state in one.state.items()
            if {*state} - {"master"}
        }
        assert moments <= {*trainer.model.model.layers[2].parameters()}
        assert len(moments) == 9
        masters = {p for p, state in trainer.optimizer.state.items() if "master" in state}
        assert len(masters) == (18 if dtype == torch.bfloat16 else 0)
