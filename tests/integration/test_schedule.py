"""Layers that take turns: one set at a time, exactly, and resumed in the middle."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback, set_seed

from layerrl.errors import SelectionError
from layerrl.trainer.schedule import LayerSchedule
from tests.grpo import make
from tests.models import tiny
from tests.runs import assert_same_run, bits, in_layers, optimizer_state, train

LAYERS = [0, 1, 2]


class Watch(TrainerCallback):
    """What moved in each step, and what the optimizer held after it."""

    def __init__(self, model: Any) -> None:
        self.model, self.before = model, bits(model)
        self.moved: list[set[int]] = []
        self.held: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any):
        now = bits(self.model)
        names = {name for name in now if not torch.equal(now[name], self.before[name])}
        self.moved.append({k for k in range(4) if any(in_layers(n, [k]) for n in names)})
        assert all(in_layers(name, range(4)) for name in names)
        self.held.append(sum(v.nbytes for s in optimizer.state.values() for v in s.values()))
        self.before = now


def scheduled(folder: Any, schedule: LayerSchedule, **changes: Any) -> tuple[Any, Watch]:
    model = tiny("llama", 4)
    watch = Watch(model)
    trainer = make(
        model,
        folder,
        selection=LAYERS,
        arguments={"callbacks": [schedule, watch]},
        **{"max_steps": 6, **changes},
    )
    return trainer, watch


def one_layers_state(folder: Any) -> int:
    trainer, watch = scheduled(folder, LayerSchedule([[0, 1, 2]], every=1), max_steps=1)
    trainer.train()
    return watch.held[0] // 3


class TestTurns:
    def test_go_round(self):
        schedule = LayerSchedule([4, [2, 0], 7], every=2)
        turns = [schedule.at(step) for step in range(8)]
        assert turns == [(4,), (4,), (0, 2), (0, 2), (7,), (7,), (4,), (4,)]

    def test_at_random_come_once_in_a_round(self):
        schedule = LayerSchedule(range(5), every=1, order="random", seed=3)
        rounds = [[schedule.at(step)[0] for step in range(i, i + 5)] for i in range(0, 100, 5)]
        assert all(sorted(turns) == [0, 1, 2, 3, 4] for turns in rounds)
        assert len({tuple(turns) for turns in rounds}) > 10
        again = LayerSchedule(range(5), every=1, order="random", seed=3)
        assert [again.at(step)[0] for step in range(5)] == rounds[0]

    def test_by_weight_come_as_often_as_they_weigh(self):
        schedule = LayerSchedule([0, 1], every=1, order="random", weights=[3.0, 1.0])
        assert 2800 < sum(schedule.at(step) == (0,) for step in range(4000)) < 3200


class TestTraining:
    @pytest.mark.parametrize("keep_state", [False, True])
    def test_moves_only_the_layers_whose_turn_it_is(self, tmp_path, keep_state):
        schedule = LayerSchedule(LAYERS, every=2, keep_state=keep_state)
        trainer, watch = scheduled(tmp_path / "run", schedule)
        trainer.train()
        assert watch.moved == [{0}, {0}, {1}, {1}, {2}, {2}]
        one = one_layers_state(tmp_path / "one")
        kept = [1, 1, 2, 2, 3, 3] if keep_state else [1] * 6
        assert watch.held == [one * layers for layers in kept]
        trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert trained == {n for n in trained if in_layers(n, LAYERS)}
        assert {k for k in range(4) if any(in_layers(n, [k]) for n in trained)} == {*LAYERS}

    def test_a_set_that_never_changes_is_no_schedule(self, tmp_path):
        fixed, _ = scheduled(tmp_path / "fixed", LayerSchedule([LAYERS], every=2))
        plain = make(tiny("llama", 4), tmp_path / "plain", selection=LAYERS, max_steps=6)
        train(fixed, plain)
        assert_same_run(fixed, plain)

    def test_a_set_keeps_its_state_through_the_others_turns(self, tmp_path):
        """Two layers that alternate with kept state: Adam counts each one's own steps."""
        schedule = LayerSchedule([0, 1], every=1, keep_state=True)
        model = tiny("llama", 4)
        trainer = make(
            model, tmp_path, selection=[0, 1], arguments={"callbacks": [schedule]}, max_steps=5
        )
        trainer.train()
        steps = {n: int(v) for n, v in optimizer_state(trainer).items() if n.endswith("step")}
        assert {v for n, v in steps.items() if in_layers(n, [0])} == {3}
        assert {v for n, v in steps.items() if in_layers(n, [1])} == {2}

    @pytest.mark.parametrize("keep_state", [False, True])
    @pytest.mark.parametrize("stop", [2, 3])
    def test_resumes_in_the_middle(self, tmp_path, keep_state, stop):
        def make_one(folder: Any) -> Any:
            schedule = LayerSchedule(LAYERS, every=2, order="random", keep_state=keep_state)
            changes = {"save_strategy": "steps", "save_steps": stop}
            return scheduled(folder, schedule, **changes)[0]

        whole, resumed = make_one(tmp_path / "whole"), make_one(tmp_path / "resumed")
        train(whole)
        set_seed(resumed.args.seed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert_close(bits(resumed.model), bits(whole.model), rtol=0, atol=0)
        assert_close(optimizer_state(resumed), optimizer_state(whole), rtol=0, atol=0)


class TestBadInput:
    @pytest.mark.parametrize("layers", [[], [[]], [0, []], ["a"], [1.0], [True]])
    def test_layers_that_are_none(self, layers):
        with pytest.raises(SelectionError, match="expected layers or lists of layers"):
            LayerSchedule(layers, every=1)

    @pytest.mark.parametrize("every", [0, -1, 1.5, True])
    def test_turns_that_are_none(self, every):
        with pytest.raises(SelectionError, match=f"every is {every}, expected a number of steps"):
            LayerSchedule([0], every=every)

    def test_an_order_that_is_none(self):
        with pytest.raises(SelectionError, match="order is 'up', expected"):
            LayerSchedule([0], every=1, order="up")  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        ("order", "weights"), [("rotate", [1, 1]), ("random", [1]), ("random", [1, 0])]
    )
    def test_weights_that_do_not_fit(self, order, weights):
        with pytest.raises(SelectionError, match=r"weights is \[.*a number above 0 for each of 2"):
            LayerSchedule([0, 1], every=1, order=order, weights=weights)

    @pytest.mark.parametrize("layers", [[0, 1], [0, 1, 2, 3], [0, 1, 7]])
    def test_layers_that_the_selection_does_not_have(self, tmp_path, layers):
        trainer, _ = scheduled(tmp_path, LayerSchedule(layers, every=1))
        with pytest.raises(
            SelectionError, match=r"the trainer's selection trains \[0, 1, 2\] of 4"
        ):
            trainer.train()
        assert all(p.requires_grad for p in trainer.model.parameters())

    def test_a_set_that_gets_no_turn(self, tmp_path):
        trainer, _ = scheduled(tmp_path, LayerSchedule(LAYERS, every=4))
        with pytest.raises(SelectionError, match=r"in 6 steps with turns of 4, \[\(2,\)\] would"):
            trainer.train()
