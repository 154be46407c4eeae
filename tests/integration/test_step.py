"""The gain of a step in each layer alone, against plain code."""

import functools
import itertools
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from layerrl import LayerMaskedGRPOTrainer, select_layers
from layerrl.errors import ProbeError
from layerrl.scores import step
from layerrl.scores.base_pass import shares_of_passes
from layerrl.scores.rollouts import Rollouts
from layerrl.trained import TrainedLayers
from tests.grpo import make
from tests.integration.test_probe_methods import TRAIN, gradient, letters
from tests.models import tiny
from tests.runs import bits

PROMPTS = 16


@pytest.fixture(params=["llama", "gpt_neox"])
def model(request):
    return tiny(request.param, 3)


def gains(model, folder, rate, *, prompts=PROMPTS, selection="all", **changes):
    """Gains of prompts and layers in a model that a trainer has not touched."""
    torch.manual_seed(0)
    trainer = make(
        model,
        folder,
        selection=selection,
        arguments={"reward_funcs": letters, "train_dataset": TRAIN},
        learning_rate=rate,
        **changes,
    )
    rollouts = Rollouts(trainer, prompts, twice=False)
    found = step._gains(rollouts, trainer.masked_run.selection, trainer.args)
    return trainer, rollouts, found.gains_PL


def logps_of(model, batch, temperature):
    """Log-probabilities of completions, shape (B, T)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def plainly(model, trainer, batches, rate):
    """The same of GRPO's loss over prompts, with a copied model for each step."""
    args = trainer.args

    def objective(moved, batch):
        mask = batch["completion_mask"]
        weights = batch["advantages"][:, None] * mask / mask.sum(1, keepdim=True)
        return (weights * logps_of(moved, batch, args.temperature)).sum()

    found = torch.zeros(len(batches), 3, dtype=torch.double)
    for half in (0, 1):
        for layer in range(3):
            moved = deepcopy(model).eval()
            parameters = TrainedLayers(moved, select_layers(moved, [layer])).by_layer[layer]
            total = sum(objective(moved, batch) for batch in batches[half::2])
            gradients = torch.autograd.grad(total, parameters)
            with torch.no_grad():
                before = [objective(moved, batch) for batch in batches[1 - half :: 2]]
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter += 3 * rate * gradient.sign()
                after = [objective(moved, batch) for batch in batches[1 - half :: 2]]
            found[1 - half :: 2, layer] = torch.stack(after).double() - torch.stack(before)
    return found


def test_is_the_change_of_the_objective_after_a_step(model, tmp_path):
    batches = []
    base = deepcopy(model)
    parts_of = step._parts

    def noting(trainer, micro_batches):
        batches.append(micro_batches)
        return parts_of(trainer, micro_batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_parts", noting)
        trainer, rollouts, found = gains(
            model, tmp_path, 1e-3, loss_type="grpo", per_device_train_batch_size=4
        )
    assert all(rollouts.with_signal)
    expected = plainly(base, trainer, [batch for [batch] in batches], 1e-3)
    scale = (expected * found).sum() / expected.square().sum()  # a share of a generation batch
    assert_close(found, expected * scale, rtol=1e-3, atol=1e-3 * found.abs().max().item())


def test_layers_that_share_a_tensor_gain_the_same_by_it(tmp_path):
    model = tiny("llama", 3)
    first, second, _ = model.model.layers
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    selection = select_layers(model, "all", modules="mlp.down_proj.weight")
    found = gains(model, tmp_path, 1e-3, selection=selection)[-1]
    assert found[:, 0].any()
    assert torch.equal(found[:, 0], found[:, 1])


def test_gains_of_short_steps_are_in_proportion(tmp_path):
    """Of longer ones they are not, which is what they are measured for."""
    found = {}
    for rate in (2e-5, 4e-5, 1e-1):
        found[rate] = gains(tiny("llama", 3), tmp_path, rate)[-1].mean(dim=0) / rate
    assert_close(found[2e-5], found[4e-5], rtol=0.03, atol=0.01)
    assert not torch.allclose(found[2e-5], found[1e-1], rtol=0.3)


@pytest.mark.parametrize("amp", [False, True])
def test_half_precision_rounds_no_step_away(tmp_path, monkeypatch, amp):
    """Weights of 0.02 are 1e-4 apart in bfloat16, thirty times this step."""
    half: Any = tiny("llama", 3)
    half.to(torch.bfloat16)
    model = half.float() if amp else half
    before, in_float32, computed = bits(model), step._in_float32, []

    @contextmanager
    def watched(trainer):
        layer = model.model.layers[1].mlp.down_proj
        hook = layer.register_forward_hook(lambda *call: computed.append(call[-1].dtype))
        with in_float32(trainer):
            yield
        hook.remove()

    monkeypatch.setattr(step, "_in_float32", watched)
    _, _, found = gains(model, tmp_path, 1e-6, bf16=amp)
    assert {*computed} == {torch.float32}
    assert (found != 0).double().mean() > 0.9  # of the smallest ones float32 leaves nothing, too
    assert_close(bits(model), before, rtol=0, atol=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32 if amp else torch.bfloat16}


def test_packed_tensors_of_half_precision_stay(model, tmp_path, monkeypatch):
    """As bitsandbytes keeps 4-bit numbers for FSDP: bytes that are no numbers."""
    packed = model.get_input_embeddings().weight
    packed.data = packed.data.to(torch.bfloat16)
    packed.quant_state = None
    before = packed.data.clone()
    seen = []

    class Trainer:
        accelerator = SimpleNamespace(autocast=nullcontext)

    trainer: Any = Trainer()
    trainer.model = model
    with step._in_float32(trainer):
        seen.append(packed.dtype)
    assert seen == [torch.bfloat16]
    assert_close(packed.data, before, rtol=0, atol=0)


def test_half_of_the_prompts_without_signal(model, tmp_path):
    """Each half's steps are measured on the other."""
    count = itertools.count()

    def every_other(completions, **_):
        even = next(count) % 2 == 0
        return [float(index) * even for index, _ in enumerate(completions)]

    trainer = make(
        model,
        tmp_path,
        selection="all",
        arguments={"reward_funcs": every_other, "train_dataset": TRAIN},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    rollouts = Rollouts(trainer, PROMPTS, twice=False)
    with pytest.raises(ProbeError, match=r"8 of the first and 0 of the second half .* Expected 2"):
        step._gains(rollouts, trainer.masked_run.selection, trainer.args)


@pytest.mark.parametrize("rate", [1e20, float("inf")])
def test_gains_that_are_not_finite(model, tmp_path, rate):
    with pytest.raises(ProbeError, match=r"gains in each of the layers \[0, 1, 2\] is not finite"):
        gains(model, tmp_path, rate)


def test_another_optimizer_is_warned_of(model, tmp_path):
    with pytest.warns(UserWarning, match="Adam's first step, .* optim='sgd' may step elsewhere"):
        gains(model, tmp_path, 1e-3, optim="sgd")


def test_attention_that_is_for_half_precision(model, tmp_path):
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ProbeError, match="float32, which flash_attention_2 does not compute"):
        gains(model, tmp_path, 1e-3)


@pytest.mark.parametrize("first", ["evaluate", "wrap"])
def test_a_forward_that_was_replaced_after_an_evaluation(model, tmp_path, first):
    """In it lies accelerate's, which computes in half precision."""

    def wrap() -> None:
        forward = model.forward
        model.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))

    arguments = {"reward_funcs": letters, "train_dataset": TRAIN, "eval_dataset": TRAIN}
    trainer = make(model, tmp_path, selection="all", arguments=arguments, bf16=True, max_steps=1)
    for do in (wrap, trainer.evaluate) if first == "wrap" else (trainer.evaluate, wrap):
        do()
    rollouts = Rollouts(trainer, PROMPTS, twice=False)
    measure = partial(step._gains, rollouts, trainer.masked_run.selection, trainer.args)
    if first == "wrap":
        assert measure().gains_PL.any()
        return
    match = r"forward of .*CausalLM was replaced, by <function .* after accelerate had put mixed"
    with pytest.raises(ProbeError, match=match):
        measure()
    assert rollouts.num_tokens == 0


@pytest.mark.parametrize("stage", [1, 9, 10, 12])  # backward, at the base, after steps
def test_an_interruption_leaves_no_step_behind(model, tmp_path, monkeypatch, stage):
    before, calls, training = bits(model), [], model.training
    objective = step._Part.objective

    def failing(part):
        calls.append(1)
        if len(calls) == stage:
            raise KeyboardInterrupt
        return objective(part)

    monkeypatch.setattr(step._Part, "objective", failing)
    with pytest.raises(KeyboardInterrupt):
        gradient(model, tmp_path, method="step", budget=PROMPTS)
    assert_close(bits(model), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.training == training


def test_says_what_it_cost(model, tmp_path):
    report = gradient(model, tmp_path, method="step", budget=PROMPTS)
    found = report.settings["prompts_with_signal"]
    assert report.settings["error_times"] == step.ERROR_TIMES
    layers = select_layers(model, "all").blocks(model).modules
    more = 2 + sum(shares_of_passes(model, layers)) + 3 / found  # the first of them whole, too
    assert report.cost.forwards == pytest.approx(found * 4 * (1 + more), abs=1)
    assert report.cost.backwards == found * 4
    passed = PROMPTS * 4 + found * 4 * (4 + more)  # generated; activations are recomputed
    assert report.cost.fraction == pytest.approx(passed / (800 * (1 + 4)))


def test_scores_on_prompts_are_further_apart_than_measured(model, tmp_path, monkeypatch):
    found = gradient(model, tmp_path, method="step", budget=PROMPTS)
    score: Any = step.METHOD.score
    as_measured = replace(score.keywords["gain"], error_times=1.0)
    monkeypatch.setattr(
        step, "METHOD", replace(step.METHOD, score=partial(score, gain=as_measured))
    )
    measured = gradient(model, tmp_path, method="step", budget=PROMPTS)
    for one, other in zip(found.layers, measured.layers, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-12)
        further = [1.5 * (value - other.score) for value in other.scores[0]]
        assert [value - one.score for value in one.scores[0]] == pytest.approx(further)
    widths = [report.interval(1).high - report.interval(1).low for report in (found, measured)]
    assert widths[0] > 1.3 * widths[1]


def test_no_learning_rate(model, tmp_path):
    with pytest.raises(ProbeError, match=r"learning_rate is 0.0: method='step' takes steps of 3"):
        gains(model, tmp_path, 0.0)


def test_a_loss_without_log_probabilities(model, tmp_path):
    class OwnLoss(LayerMaskedGRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(input_ids=inputs["completion_ids"]).logits.mean()

    with pytest.raises(ProbeError, match="that of OwnLoss asks its trainer for none"):
        gradient(model, tmp_path, method="step", budget=PROMPTS, trainer_class=OwnLoss)
