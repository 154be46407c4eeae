"""Layers that take turns: one set at a time, exactly, and resumed in the middle."""

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOConfig

from layerrl import ContributionReport, load_delta, select_layers
from layerrl.errors import SelectionError
from layerrl.report import Score
from layerrl.trainer.schedule import LayerSchedule
from tests.devices import on_any_device
from tests.engines import Engine, in_place_of_vllm
from tests.grpo import make
from tests.models import tiny
from tests.runs import (
    Passes,
    assert_same_run,
    bits,
    in_layers,
    metric,
    optimizer_state,
    train,
)

pytestmark = on_any_device

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
        held = (value for state in optimizer.state.values() for value in state.values())
        self.held.append(sum(value.nbytes for value in held if isinstance(value, torch.Tensor)))
        self.before = now


def scheduled(
    folder: Any, schedule: LayerSchedule, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, Watch]:
    model = tiny("llama", 4).to(dtype)
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

    @pytest.mark.parametrize("weights", [[3.0, 1.0], {4: 2.0, 0: 4.0, 7: 1.0}])
    def test_by_weight_come_as_often_as_they_weigh(self, weights):
        schedule = LayerSchedule([[4, 0], 7], every=1, order="random", weights=weights)
        assert 2800 < sum(schedule.at(step) == (0, 4) for step in range(4000)) < 3200

    def test_of_a_set_are_in_ascending_order(self):
        for layers in ({9, 10, 8}, {frozenset({10}), frozenset({9, 8})}):
            schedule = LayerSchedule(layers, every=1)
            turns = [schedule.at(step) for step in range(len(layers))]
            assert turns == sorted(turns)
        with pytest.raises(SelectionError, match=r"weights is \{.*\}, expected"):
            LayerSchedule([8, 9], every=1, order="random", weights={1.0, 2.0})

    def test_by_the_scores_of_a_report(self):
        report = ContributionReport(
            method="train", layers=tuple(Score(score=s) for s in (0.2, 0.1, 0.1))
        )
        schedule = LayerSchedule([0, 1, 2], every=1, order="random", weights=report.scores)
        assert 1800 < sum(schedule.at(step) == (0,) for step in range(4000)) < 2200


class TestTraining:
    def test_moves_only_the_layers_whose_turn_it_is(self, tmp_path):
        schedule = LayerSchedule(LAYERS, every=2)
        trainer, watch = scheduled(tmp_path / "run", schedule)
        trainer.train()
        assert watch.moved == [{0}, {0}, {1}, {1}, {2}, {2}]
        assert watch.held == [one_layers_state(tmp_path / "one")] * 6
        [first, *_] = trainer.model.model.layers
        size = sum(p.numel() for p in first.parameters())
        assert metric(trainer, "layerrl/trained_parameters") == [size] * 6
        assert all(p.requires_grad for p in trainer.model.parameters())

    def test_a_set_that_never_changes_is_no_schedule(self, tmp_path):
        fixed, _ = scheduled(tmp_path / "fixed", LayerSchedule([LAYERS], every=2))
        plain = make(tiny("llama", 4), tmp_path / "plain", selection=LAYERS, max_steps=6)
        train(fixed, plain)
        assert_same_run(fixed, plain)

    def test_replays_below_the_first_layer_and_ends_there(self, tmp_path):
        """The fast path under a schedule, against the plain one."""
        found = {}
        for name, cache in (("fast", 2**30), ("plain", 0)):
            trainer = make(
                tiny("llama", 4),
                tmp_path / name,
                selection=[1, 2],
                arguments={
                    "callbacks": [LayerSchedule([1, 2], every=1)],
                    "prefix_cache_bytes": cache,
                },
                beta=0.1,
                num_iterations=2,
                max_steps=6,
            )
            passes = Passes(trainer, trainer.model.model.layers[0])
            train(trainer)
            found[name] = trainer
            assert (passes.ran.count(False) >= 3) is (name == "fast")
        assert_same_run(found["fast"], found["plain"])

    def test_a_delta_has_the_whole_selection(self, tmp_path):
        arguments = {"callbacks": [LayerSchedule([1, 2], every=1)]}
        trainer = make(tiny("llama", 4), tmp_path / "run", selection=[1, 2], arguments=arguments)
        train(trainer)
        trainer.save_delta(tmp_path / "delta")
        again = tiny("llama", 4)
        load_delta(again, tmp_path / "delta")
        assert_close(bits(again), bits(trainer.model), rtol=0, atol=0)

    def test_vllm_gets_the_whole_selection(self, tmp_path, monkeypatch):
        arguments = {"callbacks": [LayerSchedule([1, 2], every=1)]}
        with in_place_of_vllm(monkeypatch):
            trainer = make(
                tiny("llama", 4),
                tmp_path,
                selection=[1, 2],
                use_vllm=True,
                vllm_mode="colocate",
                max_steps=4,
                arguments=arguments,
            )
            trainer.train()
        _, *later = Engine.latest.syncs
        assert all({k for k in range(4) for n in s if in_layers(n, [k])} == {1, 2} for s in later)
        assert len(later) == 3

    def test_half_precision_keeps_what_was_rounded_away(self, tmp_path):
        """Steps too small for bfloat16 add up over turns."""
        found = {}
        sets: dict[str, list[Any]] = {"turns": [0, 1], "together": [[0, 1]]}
        for name, layers in sets.items():
            trainer = make(
                tiny("llama", 4).to(torch.bfloat16),
                tmp_path / name,
                selection=[0, 1],
                arguments={"callbacks": [LayerSchedule(layers, every=1)]},
                learning_rate=2e-6,
                lr_scheduler_type="constant",
                max_steps=16,
            )
            trainer.train()
            logs = [log for log in trainer.state.log_history if "loss" in log]
            found[name] = logs[-1]["layerrl/relative_update/layer_0"]
        # Half of the steps: without the masters it would be those of one turn, a sixteenth.
        assert found["turns"] > 0.3 * found["together"]

    def test_an_interrupt_leaves_no_layer_frozen(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

        model = tiny("llama", 4)
        callbacks = [LayerSchedule([1, 2], every=1), Stop()]
        trainer = make(model, tmp_path, selection=[1, 2], arguments={"callbacks": callbacks})
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("stop", [2, 3])
    @pytest.mark.parametrize(
        ("dtype", "optim"),
        [
            (torch.float32, "adamw_torch"),
            (torch.bfloat16, "adamw_torch"),
            (torch.bfloat16, "adamw_torch_fused"),
            (torch.bfloat16, "rmsprop"),
            (torch.bfloat16, "adagrad"),
            (torch.bfloat16, "adafactor"),
            (torch.bfloat16, "sgd"),
            (torch.float16, "adamw_torch"),
        ],
    )
    def test_resumes_in_the_middle(self, tmp_path, stop, dtype, optim):
        def make_one(folder: Any) -> Any:
            schedule = LayerSchedule(LAYERS, every=2, order="random")
            changes = {"save_strategy": "steps", "save_steps": stop, "optim": optim}
            return scheduled(folder, schedule, dtype=dtype, **changes)[0]

        whole, resumed = make_one(tmp_path / "whole"), make_one(tmp_path / "resumed")
        train(whole)
        set_seed(resumed.args.seed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert_close(bits(resumed.model), bits(whole.model), rtol=0, atol=0)
        assert_close(optimizer_state(resumed), optimizer_state(whole), rtol=0, atol=0)


class TestBadInput:
    @pytest.mark.parametrize("layers", [[], [[]], [0, []], ["a"], [1.0], [True], 3, [[0, "a"], 1]])
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
        ("order", "weights"),
        [
            ("rotate", [1, 1]),
            *(
                ("random", weights)
                for weights in (
                    *([1], [1, 0], [1, float("nan")], [1, float("inf")], 3.0, {0: 1.0}),
                    *([1e308, 1e308], {0: 1e308, 1: 1e308}),  # whose sum is infinite
                )
            ),
        ],
    )
    def test_weights_that_do_not_fit(self, order, weights):
        with pytest.raises(SelectionError, match=r"weights is .*a finite number above 0 for each"):
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

    def test_more_than_layers(self, tmp_path):
        arguments = {"callbacks": [LayerSchedule(range(4), every=1)]}
        trainer = make(tiny("llama", 4), tmp_path, selection="full", arguments=arguments)
        with pytest.raises(SelectionError, match=r"'model.embed_tokens.weight' and 2 other tens"):
            trainer.train()

    def test_a_trainer_without_a_mask(self, tmp_path):
        arguments = {"callbacks": [LayerSchedule(range(4), every=1)]}
        trainer = make(tiny("llama", 4), tmp_path, trainer=GRPOTrainer, arguments=arguments)
        with pytest.raises(SelectionError, match="use a masked trainer"):
            trainer.train()

    def test_two_schedules(self, tmp_path):
        arguments = {"callbacks": [LayerSchedule([1, 2], every=n) for n in (1, 2)]}
        trainer = make(tiny("llama", 4), tmp_path, selection=[1, 2], arguments=arguments)
        with pytest.raises(SelectionError, match="the trainer has 2 schedules, expected one"):
            trainer.train()

    @pytest.mark.parametrize("kept", [False, True])
    def test_resuming_what_was_written_when_state_could_be_kept(self, tmp_path, kept):
        def make_one() -> Any:
            changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
            return scheduled(tmp_path, LayerSchedule(LAYERS, every=1), **changes)[0]

        make_one().train()
        file = tmp_path / "checkpoint-2" / "trainer_state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        state["stateful_callbacks"]["LayerSchedule"]["args"]["keep_state"] = kept
        file.write_text(json.dumps(state), encoding="utf-8")
        (tmp_path / "checkpoint-2" / "checksums.json").unlink()  # which those of then had not
        refused = (
            pytest.raises(SelectionError, match="'keep_state': True") if kept else nullcontext()
        )
        with refused:
            make_one().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def test_resuming_with_another_one(self, tmp_path):
        def make_one(every: int) -> Any:
            changes = {"save_strategy": "steps", "save_steps": 3}
            return scheduled(tmp_path, LayerSchedule(LAYERS, every=every), **changes)[0]

        make_one(2).train()
        checkpoint = str(tmp_path / "checkpoint-3")
        with pytest.raises(SelectionError, match=r"another schedule, .*'every': 2.*'every': 1"):
            make_one(1).train(resume_from_checkpoint=checkpoint)
        make_one(2).train(resume_from_checkpoint=checkpoint)

    def test_an_optimizer_that_updates_layer_by_layer(self, tmp_path):
        model = tiny("llama", 1)
        trainer = make(model, tmp_path, selection="all")
        with pytest.raises(SelectionError, match=r"Dummy.*holds nothing"):
            LayerSchedule([0], every=1).on_train_begin(
                trainer.args,
                TrainerState(max_steps=1),
                None,
                model=model,
                optimizer=LayerWiseDummyOptimizer(),
            )

    def test_a_trainer_that_has_told_vllm_what_it_will_send(self, tmp_path):
        schedule, model = LayerSchedule([0], every=1), tiny("llama", 1)
        args = AsyncGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        with (
            select_layers(model, "all").masked(model),
            pytest.raises(SelectionError, match="AsyncGRPOConfig: the trainer told vLLM"),
        ):
            schedule.on_train_begin(
                args,
                TrainerState(max_steps=1),
                None,
                model=model,
                optimizer=torch.optim.SGD(model.parameters()),
            )
