"""The backward ends at the first trained layer, with checkpointing and without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from layerrl import select_layers
from layerrl.activations import backward_from_first_trained
from layerrl.blocks import find_blocks
from tests.devices import DEVICE, on_any_device
from tests.grpo import make
from tests.models import tiny
from tests.runs import NO_CHECKPOINTING, REENTRANT, bits, freeze_by_hand, moved

pytestmark = on_any_device

IDS = torch.tensor([[5, 9, 11, 3], [7, 8, 3, 12]], device=DEVICE)
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "default": {},
    "non-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": REENTRANT,
    "off": NO_CHECKPOINTING,
}
FAMILIES = ["llama", "gpt2", "falcon", "gemma3_text", "qwen3_vl"]
FLAG = "gradient_checkpointing"


class Visits:
    """Counts what happens in each layer: its insides computed, and the backward passing through."""

    def __init__(self, model: PreTrainedModel) -> None:
        layers = find_blocks(model).modules
        self.computed, self.visited = [0] * len(layers), [0] * len(layers)
        self.embedding_gradients = 0
        for index, layer in enumerate(layers):
            inner = next(layer.children())
            count = _as_ours(lambda *_, i=index: self._count(self.computed, i))
            visit = _as_ours(lambda *_, i=index: self._count(self.visited, i))
            inner.register_forward_pre_hook(count)
            layer.register_full_backward_hook(visit)
        model.get_input_embeddings().register_forward_hook(self._watch)
        # A hook of transformers may let the output require a gradient after this one has seen it.
        watch = _as_ours(lambda *args: self._watch_input(*args))
        layers[0].register_forward_pre_hook(watch, with_kwargs=True)

    def clear(self) -> None:
        self.computed[:], self.visited[:] = [0] * len(self.computed), [0] * len(self.visited)
        self.embedding_gradients = 0

    def _count(self, counts: list[int], index: int) -> None:
        counts[index] += 1

    def _watch(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._embedding_gradient)

    def _watch_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # Before 5.23, transformers runs this hook inside the checkpoint: again where the backward
        # recomputes the layer, and on the copy that layerrl gives a reentrant one.
        recomputed = torch._C._current_graph_task_id() != -1
        copied = type(hidden.grad_fn).__name__ == "CloneBackward0"
        if hidden.requires_grad and not (recomputed or copied):
            hidden.register_hook(self._embedding_gradient)

    def _embedding_gradient(self, _: Tensor) -> None:
        self.embedding_gradients += 1


def _as_ours(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that replay takes for one of layerrl's: layers that carry others always run."""
    hook.__module__ = "layerrl.tests"
    return hook


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    """How many hooks of each kind each module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


def flags(model: nn.Module) -> list[bool | None]:
    """Which modules are checkpointed."""
    return [getattr(module, FLAG, None) for module in model.modules()]


def required(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def checkpointed(model: PreTrainedModel, kind: str, times: int = 1) -> PreTrainedModel:
    """The model in training mode, with checkpointing enabled as often as TRL does in a run."""
    model.to(DEVICE).train()
    if kind != "off":
        for _ in range(times):
            reentrant = {"use_reentrant": kind == "reentrant"}
            model.gradient_checkpointing_enable(reentrant)
    return model


def no_dropout(family: str) -> PreTrainedModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tiny(family, 4, **(dropout if family == "gpt2" else {}))


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """One backward pass: gradient of each tensor that trains."""
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestBackwardFromFirstTrained:
    @pytest.mark.parametrize("times", [1, 3])
    @pytest.mark.parametrize("kind", ["default", "reentrant", "off"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_leaves_the_frozen_prefix_alone(self, family, kind, times):
        model = checkpointed(no_dropout(family), kind, times)
        selection = select_layers(model, 2)
        with selection.masked(model) as trained:
            expected = gradients(model)
            visits = Visits(model)
            with backward_from_first_trained(model, selection):
                found = gradients(model)
        assert visits.visited == [0, 0, 1, 1]
        assert visits.embedding_gradients == 0
        assert visits.computed == ([1, 1, 1, 1] if kind == "off" else [1, 1, 2, 2])
        assert set(found) == set(trained)
        assert all(gradient.abs().sum() > 0 for gradient in found.values())
        assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["default", "reentrant"])
    def test_without_it_every_layer_is_visited_and_computed_twice(self, kind):
        model = checkpointed(no_dropout("llama"), kind)
        freeze_by_hand(model, [2])
        visits = Visits(model)
        gradients(model)
        assert visits.visited == [1, 1, 1, 1]
        assert visits.computed == [2, 2, 2, 2]
        assert visits.embedding_gradients > 0

    @pytest.mark.parametrize("kind", ["default", "reentrant", "off"])
    @pytest.mark.parametrize(
        ("layers", "modules", "visited"),
        [
            ([1, 3], None, [0, 1, 1, 1]),
            (0, None, [1, 1, 1, 1]),
            (3, None, [0, 0, 0, 1]),
            ("all", None, [1, 1, 1, 1]),
            (1, "mlp.*", [0, 1, 1, 1]),
            ([2, 3], "self_attn.q_proj", [0, 0, 1, 1]),
            (2, "mlp.down_proj.weight", [0, 0, 1, 1]),
        ],
        ids=str,
    )
    def test_starts_at_the_first_of_any_selection(self, kind, layers, modules, visited):
        model = checkpointed(no_dropout("llama"), kind)
        selection = select_layers(model, layers, modules=modules)
        with selection.masked(model) as trained:
            expected = gradients(model)
            visits = Visits(model)
            with backward_from_first_trained(model, selection):
                found = gradients(model)
        assert visits.visited == visited
        assert visits.embedding_gradients == 0
        assert set(found) == set(trained)
        assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["default", "reentrant", "off"])
    def test_full_changes_nothing(self, kind):
        model = checkpointed(no_dropout("llama"), kind)
        before = hooks(model), flags(model)
        selection = select_layers(model, "full")
        with backward_from_first_trained(model, selection):
            assert (hooks(model), flags(model)) == before
            visits = Visits(model)
            found = gradients(model)
        assert visits.visited == [1, 1, 1, 1]
        assert visits.embedding_gradients > 0
        assert all(gradient.abs().sum() > 0 for gradient in found.values())

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("kind", ["default", "reentrant", "off"])
    def test_leaves_flags_and_hooks_as_it_found_them(self, kind, fails):
        model = checkpointed(no_dropout("llama"), kind)
        if kind != "off":
            model.model.layers[1].gradient_checkpointing = False  # as `every_n_layers` does
        selection = select_layers(model, 2)
        before = hooks(model), flags(model), required(model)
        try:
            with backward_from_first_trained(model, selection):
                gradients(model)
                if fails:
                    raise OSError("out of cheese")
        except OSError:
            assert fails
        assert (hooks(model), flags(model), required(model)) == before

    @pytest.mark.parametrize("layers", [2, "all", "full"])
    def test_hooks_do_not_grow_with_the_generations(self, layers):
        model = checkpointed(no_dropout("llama"), "default", times=3)
        with backward_from_first_trained(model, select_layers(model, layers)):
            pass
        assert hooks(model) == hooks(checkpointed(no_dropout("llama"), "default"))
        model.disable_input_require_grads()  # removes the one that is left
        assert not model.get_input_embeddings()._forward_hooks

    def test_removes_no_hook_of_somebody_else(self):
        model = checkpointed(no_dropout("llama"), "default")
        calls: list[int] = []
        model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
        with backward_from_first_trained(model, select_layers(model, 2)):
            gradients(model)
        gradients(model)
        assert calls == [1, 1]

    def test_checkpointing_can_be_enabled_for_everything_again(self):
        model = checkpointed(no_dropout("llama"), "default")
        expected = gradients(model)
        with backward_from_first_trained(model, select_layers(model, 2)):
            gradients(model)
        checkpointed(model, "default")
        visits = Visits(model)
        assert_close(gradients(model), expected, rtol=0, atol=0)
        assert visits.visited == [1, 1, 1, 1]
        assert visits.computed == [2, 2, 2, 2]

    def test_frozen_layers_above_are_still_checkpointed(self):
        model = checkpointed(no_dropout("llama"), "default")
        selection = select_layers(model, 1)
        with selection.masked(model), backward_from_first_trained(model, selection):
            flagged = [layer.gradient_checkpointing for layer in model.model.layers]
        assert flagged == [False, True, True, True]

    @pytest.mark.parametrize("kind", ["default", "reentrant"])
    def test_inside_torch_no_grad_nothing_requires_a_gradient(self, kind):
        model = checkpointed(no_dropout("llama"), kind)
        selection = select_layers(model, 2)
        with (
            selection.masked(model),
            backward_from_first_trained(model, selection),
            torch.no_grad(),
        ):
            logits = model(input_ids=IDS, use_cache=False).logits
        assert not logits.requires_grad

    @pytest.mark.parametrize("kind", ["default", "reentrant"])
    def test_reaches_the_model_inside_a_wrapper(self, kind):
        model = checkpointed(no_dropout("llama"), kind)
        selection = select_layers(model, 2)
        visits = Visits(model)

        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = model

        with selection.masked(model), backward_from_first_trained(Wrapper(), selection):
            gradients(model)
        assert visits.visited == [0, 0, 1, 1]


@contextmanager
def each_step(trainer: Any, visits: Visits) -> Iterator[list[tuple[list[int], list[int], int]]]:
    """Lists, for each step, what the loss and its backward computed and visited."""
    steps: list[tuple[list[int], list[int], int]] = []
    loss, step = trainer.compute_loss, trainer.training_step

    def from_here(*args: Any, **kwargs: Any) -> Any:
        visits.clear()
        return loss(*args, **kwargs)

    def until_here(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        steps.append(([*visits.computed], [*visits.visited], visits.embedding_gradients))
        return result

    trainer.compute_loss, trainer.training_step = from_here, until_here
    yield steps


class TestTrainer:
    @pytest.mark.parametrize("num_iterations", [1, 2])
    @pytest.mark.parametrize("kind", CHECKPOINTING)
    def test_no_step_visits_or_recomputes_the_frozen_prefix(self, tmp_path, kind, num_iterations):
        trainer = make(
            no_dropout("llama"),
            tmp_path,
            selection=2,
            max_steps=4,
            num_iterations=num_iterations,
            **CHECKPOINTING[kind],
        )
        before = bits(trainer.model)
        with each_step(trainer, Visits(trainer.model)) as steps:
            trainer.train()
        above = 1 if kind == "off" else 2
        plain = ([1, 1, above, above], [0, 0, 1, 1], 0)
        replayed = ([0, 0, above, above], [0, 0, 1, 1], 0)
        if num_iterations == 1:
            assert steps == [plain] * 4
        else:
            # The first pass that could be replayed runs both ways, to be compared, with gradients
            # where those can be asked for without a whole backward.
            backwards = 1 if kind == "reentrant" else 3
            assert steps[0][1:] == ([0, 0, backwards, backwards], 0)
            assert steps[0][0][:2] == [1, 1]
            assert steps[1:] == [replayed] * 3
        assert all(".2." in name for name in moved(trainer, before))
        assert moved(trainer, before)

    @pytest.mark.parametrize("kind", ["default", "reentrant"])
    def test_in_plain_trl_every_step_does(self, tmp_path, kind):
        model = no_dropout("llama")
        freeze_by_hand(model, [2])
        trainer = make(model, tmp_path, max_steps=2, **CHECKPOINTING[kind])
        with each_step(trainer, Visits(model)) as steps:
            trainer.train()
        for computed, visited, embedding_gradients in steps:
            assert computed == [2, 2, 2, 2]
            assert visited == [1, 1, 1, 1]
            assert embedding_gradients > 0

    @pytest.mark.parametrize("kind", ["default", "reentrant"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_no_step_visits_the_frozen_prefix_of_other_families(self, tmp_path, family, kind):
        model = no_dropout(family)
        changes = {"max_steps": 2, "beta": 0.04, **CHECKPOINTING[kind]}
        trainer = make(model, tmp_path, selection=2, **changes)
        with each_step(trainer, Visits(model)) as steps:
            trainer.train()
        for _, visited, embedding_gradients in steps:
            assert visited[:2] == [0, 0]
            assert embedding_gradients == 0
        assert steps[1] == ([0, 0, 2, 2], [0, 0, 1, 1], 0)

    def test_accumulated_steps_and_evaluations_do_not_either(self, tmp_path):
        trainer = make(
            no_dropout("llama"), tmp_path, selection=2, max_steps=2, gradient_accumulation_steps=2
        )
        with each_step(trainer, Visits(trainer.model)) as steps:
            trainer.train()
        assert steps == [([1, 1, 2, 2], [0, 0, 1, 1], 0)] * 4

    @pytest.mark.parametrize("modules", ["mlp.*", "self_attn.q_proj"])
    def test_selections_of_modules_do_not_either(self, tmp_path, modules):
        model = no_dropout("llama")
        selection = select_layers(model, [1, 3], modules=modules)
        trainer = make(model, tmp_path, selection=selection, max_steps=2)
        before = bits(model)
        with each_step(trainer, Visits(model)) as steps:
            trainer.train()
        assert steps == [([1, 2, 2, 2], [0, 1, 1, 1], 0)] * 2
        assert moved(trainer, before) == set(selection.parameters(model))

    @pytest.mark.parametrize("fails", [None, "compute_loss", "training_step"])
    @pytest.mark.parametrize("kind", CHECKPOINTING)
    def test_leaves_hooks_and_flags_of_the_layers_as_they_were(self, tmp_path, kind, fails):
        model = no_dropout("llama")
        given = required(model)
        layers_before = hooks(model.model.layers)
        trainer = make(model, tmp_path, selection=2, max_steps=2, **CHECKPOINTING[kind])
        if fails is None:
            trainer.train()
        else:
            fail_second(trainer, fails)
            with pytest.raises(OSError, match="out of cheese"):
                trainer.train()
            assert required(model) == given
        assert hooks(model.model.layers) == layers_before
        layer_flags = {getattr(layer, FLAG) for layer in model.model.layers}
        assert layer_flags == {kind != "off"}
        assert not any("forward" in vars(module) for module in model.model.modules())


def fail_second(trainer: Any, name: str) -> None:
    """Let a method run and raise afterwards, the second time."""
    function: Callable[..., Any] = getattr(trainer, name)
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise OSError("out of cheese")
        return result

    setattr(trainer, name, failing)
