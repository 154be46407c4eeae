"""What leaves the frozen prefix is recorded once and replayed row by row, or not at all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from layerrl.blocks import find_blocks
from tests.devices import DEVICE, on_any_device
from tests.models import tiny
from tests.replays import (
    BUDGET,
    BYTES,
    FIRST,
    B,
    H,
    Pair,
    T,
    assert_unpatched,
    call,
    ids,
    layers_run,
    noting_hook,
    warnings,
)

pytestmark = [on_any_device, pytest.mark.usefixtures("made_on_device")]


@pytest.fixture
def pair() -> Pair:
    return Pair(tiny("llama", 4).eval())


def verified(**changes: Any) -> Pair:
    """A pair that has been found to be replayed, in both modes of gradients."""
    pair = Pair(tiny("llama", 4).eval(), **changes)
    with pair.batch():
        for grad in (False, True):
            pair.same(call(), grad=grad)
            assert pair.same(call(), grad=grad)
            assert pair.same(call(ids()[1:3]), grad=grad)
    return pair


def held(pair: Pair) -> list[Any]:
    """The hidden states in a pair's recordings, each once."""
    rows = [rows for of in pair.replay._batches.values() for rows in of._rows.values()]
    recordings = {id(r): r for places in rows for r, _ in places.values()}
    return [recording.hidden_BTH for recording in recordings.values()]


class Failing:
    """Lets a module raise on its n-th call from now."""

    def __init__(self, module: Any, on_call: int = 1) -> None:
        self.calls, self.on_call, self.forward = 0, on_call, module.forward
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.on_call:
            raise OSError("out of cheese")
        return self.forward(*args, **kwargs)


class TestRecordAndReplay:
    @pytest.mark.parametrize("chunk", [1, 4, B])
    @pytest.mark.parametrize("family", ["llama", "falcon", "gemma3_text", "qwen3_vl"])
    def test_other_rows_in_another_order_and_in_chunks(self, family, chunk):
        pair, rows = Pair(tiny(family, 4).eval()), torch.tensor([4, 0, 0, 5])
        with pair.batch():
            for part in ids().split(chunk):
                pair.same(call(part))
            for grad in (False, True, False, True):
                replayed = pair.replays(*map(call, ids()[rows].split(3)), grad=grad, atol=1e-6)
            assert replayed == [True, True]
            assert pair.same(call(ids().flip(0)), grad=True, atol=1e-6)

    @pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 3), (5, 1), (8, 8)])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_5_vl"])
    def test_any_number_of_rows_and_tokens(self, family, size):
        pair, rows = Pair(tiny(family, 4).eval()), ids(0, *size)
        mask = torch.arange(size[1]) >= torch.arange(size[0])[:, None] % 2 * (size[1] > 1)
        with pair.batch():
            for grad in (False, True):
                runs = [call(rows, attention_mask=mask.long())] * 3
                assert pair.replays(*runs, grad=grad) == [grad, True, True]
                flipped = call(rows.flip(0), attention_mask=mask.long().flip(0))
                assert pair.replays(flipped, flipped, grad=grad, atol=1e-6)[-1]

    def test_runs_the_layers_above_alone(self):
        pair = verified()
        with layers_run(pair.model) as ran, pair.batch():
            pair.model(input_ids=ids(), use_cache=False)
            pair.model(input_ids=ids()[[3, 1]], use_cache=False)
        assert ran == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3, 2, 3] or ran[-2:] == [2, 3]

    def test_the_first_replay_of_a_kind_is_compared_with_a_plain_run(self, pair):
        with layers_run(pair.model) as ran, pair.batch():
            for _ in range(3):
                with torch.no_grad():
                    pair.model(input_ids=ids(), use_cache=False)
        every, upper = [0, 1, 2, 3], [2, 3]
        assert ran == every + upper + every + upper + upper

    @pytest.mark.parametrize("recorded_with_grad", [True, False])
    def test_with_and_without_gradients(self, pair, recorded_with_grad):
        with pair.batch():
            assert not pair.same(call(), grad=recorded_with_grad)
            assert pair.same(call(), grad=True)
            assert pair.same(call(), grad=False)
            assert pair.same(call(labels=ids()), grad=True)

    def test_in_inference_mode_and_out_of_it(self, pair):
        def inferring(model: Any) -> Any:
            with torch.inference_mode():
                return model(input_ids=ids(), use_cache=False).logits.clone()

        with pair.batch():
            assert pair.replays(inferring, inferring, call(), inferring) == [0, 1, 1, 1]
            assert pair.same(call(), grad=True)

    @pytest.mark.parametrize(
        "changes",
        [
            {"attention_mask": torch.arange(T, device=DEVICE).expand(B, T).ge(2).long()},
            {"position_ids": torch.arange(T, device=DEVICE).expand(B, T) * 2},
            {"input_ids": None, "inputs_embeds": torch.randn(B, T, H, device=DEVICE)},
            {"input_ids": ids(1)},
            {"input_ids": torch.nn.functional.pad(ids(), (1, 0), value=3)},
        ],
        ids=["mask", "positions", "embeddings", "tokens", "length"],
    )
    def test_anything_else_that_enters_runs_plainly(self, caplog, changes):
        pair = verified()
        with pair.batch():
            pair.same(call())
        with pair.replay.passes(training=True):
            assert pair.same(call())
            assert not pair.same(lambda model: model(**{"input_ids": ids(), **changes,
                                                        "use_cache": False}))  # fmt: skip
        [warning] = warnings(caplog)
        assert "over rows that no call before was over" in warning

    @pytest.mark.parametrize("act", ["mask", "positions"])
    def test_and_is_recorded_for_itself(self, act):
        pair, on = verified(), {"attention_mask": torch.arange(T).expand(B, T).ge(2).long()}
        if act == "positions":
            on = {"position_ids": torch.arange(T).expand(B, T) * 2}
        with pair.batch():
            assert pair.replays(call(), call(**on)) == [False, False]
            pair.same(call(**on))
            assert pair.replays(call(), call(**on), call()) == [True] * 3

    def test_a_layer_that_works_in_place_does_not_reach_the_recording(self, pair):
        def scaled(model: Any) -> Any:
            hook = (
                find_blocks(model)
                .modules[FIRST]
                .register_forward_pre_hook(lambda _, args: args[0].mul_(0.5))
            )
            try:
                return model(input_ids=ids(), use_cache=False)
            finally:
                hook.remove()

        with pair.batch():
            assert pair.replays(scaled, call(), scaled, call()) == [0, 1, 1, 1]

    def test_a_positional_call_is_the_same_rows(self, pair):
        with pair.batch():
            pair.same(call())
            assert pair.same(lambda model: model(ids(), use_cache=False))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype):
        pair = Pair(tiny("llama", 4).eval().to(dtype))
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
            assert pair.replays(call(), call(), grad=True) == [1, 1]

    def test_autocast_is_another_setting(self, pair):
        def cast(model: Any) -> Any:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return model(input_ids=ids(), use_cache=False)

        with pair.batch():
            assert pair.replays(call(), cast, call(), cast, call(), cast) == [0, 0, 1, 1, 1, 1]


class TestBatches:
    def test_a_new_batch_forgets_the_one_before(self):
        pair = verified()
        with pair.batch():
            assert pair.replay.num_bytes == 0
            assert not pair.same(call())

    def test_passes_over_a_batch_come_after_it(self):
        pair = verified()
        with pair.batch():
            pair.same(call())
        assert not pair.same(call())
        with pair.replay.passes(training=True):
            assert pair.same(call())
        with pair.replay.passes(training=False):
            assert not pair.same(call())

    def test_where_nothing_was_scored_nothing_is_recorded(self, pair, caplog):
        with pair.replay.batch(training=True):
            pass
        with pair.replay.passes(training=True):
            assert pair.replays(call(), call()) == [False, False]
        assert pair.replay.num_bytes == 0
        assert warnings(caplog) == []

    def test_an_evaluation_in_between_has_recordings_of_its_own(self):
        pair = verified()
        with pair.batch():
            pair.same(call())
        with pair.batch(training=False):
            assert pair.replays(call(ids(1)), call(ids(1))) == [False, True]
        with pair.replay.passes(training=True):
            assert pair.same(call())
        pair.replay.forget_evaluation()
        with pair.replay.passes(training=False):
            assert not pair.same(call(ids(1)))

    def test_passes_that_stand_alone_are_forgotten_at_their_end(self, pair):
        for _ in range(2):
            with pair.alone():
                assert pair.replays(call(), call(ids(1)), call()) == [0, 0, 1]
                assert pair.replay.num_bytes == 2 * BYTES
            assert pair.replay.num_bytes == 0

    def test_passes_inside_passes_are_those_outside(self, pair):
        with pair.batch(), pair.replay.passes(training=False), pair.alone():
            assert pair.replays(call(), call()) == [False, True]
        assert_unpatched(pair.model)

    def test_clear_forgets(self):
        pair = verified()
        pair.replay.clear()
        assert pair.replay.num_bytes == 0
        with pair.replay.passes(training=True):
            assert not pair.same(call())

    def test_another_model_is_not_touched(self, pair):
        teacher = Pair(tiny("llama", 4, seed=3).eval())
        with pair.batch():
            assert pair.replays(call(), call()) == [False, True]
            assert teacher.replays(call(), call()) == [False, False]
        assert pair.replay.num_bytes == BYTES


class TestBudget:
    @pytest.mark.parametrize(("max_bytes", "fits"), [(BYTES, True), (BYTES - 1, False)])
    @pytest.mark.parametrize("chunk", [1, B])
    def test_counts_the_bytes_of_the_whole_batch(self, caplog, chunk, max_bytes, fits):
        pair = Pair(tiny("llama", 4).eval(), max_bytes=max_bytes)
        parts = [call(part) for part in ids().split(chunk)]
        with pair.batch():
            pair.replays(*parts)
            assert pair.replay.num_bytes == (BYTES if fits else 0)
            assert pair.replays(*parts) == [fits] * len(parts)
        lines = [line for line in warnings(caplog) if "more than prefix_cache_bytes" in line]
        assert len(lines) == (not fits)
        assert pair.replay.enabled

    @pytest.mark.parametrize(("max_bytes", "fits"), [(BYTES, True), (BYTES - 1, False)])
    def test_counts_what_is_recorded_under_autocast(self, caplog, max_bytes, fits):
        pair = Pair(tiny("llama", 4).eval(), max_bytes=max_bytes)
        with torch.autocast(DEVICE.type, torch.bfloat16), pair.batch():
            pair.replays(call())
            assert pair.replay.num_bytes == (BYTES if fits else 0)
            [recording] = held(pair) or [None]
            assert recording is None or recording.dtype == torch.float32  # what layers add up in
        lines = [line for line in warnings(caplog) if f"prefix_cache_bytes={max_bytes}" in line]
        assert len(lines) == (not fits)
        assert all(
            f"({4 * H} bytes a token, padding included, in torch.float32)" in li for li in lines
        )

    def test_an_evaluation_has_what_the_batch_to_train_on_leaves(self, caplog):
        pair = Pair(tiny("llama", 4).eval(), max_bytes=2 * BYTES - 1)
        with pair.batch():
            pair.replays(call(), call())
        for _ in range(2):
            with pair.batch(training=False):
                assert pair.replays(call(ids(1)), call(ids(1))) == [False, False]
                assert pair.replay.num_bytes == sum(t.nbytes for t in held(pair)) == BYTES
        with pair.alone():
            assert pair.replays(*[call(ids(1))] * 2) == [False, False]
            assert pair.replay.num_bytes == BYTES
        with pair.replay.passes(training=True):
            assert pair.same(call())
        with pair.batch():  # the batch before makes room
            assert pair.replays(call(ids(1)), call(ids(1))) == [False, True]
        assert pair.replay.num_bytes == BYTES

    def test_what_does_not_fit_is_said_once_whatever_its_size(self, caplog):
        pair = Pair(tiny("llama", 4).eval(), max_bytes=BYTES - 1)
        for tokens in (T, T + 1, T + 2):
            with pair.batch():
                pair.replays(call(ids(tokens=tokens)))
                assert held(pair) == []
        lines = [line for line in warnings(caplog) if "prefix_cache_bytes" in line]
        assert len(lines) == 1

    def test_a_batch_that_fails_is_forgotten(self, pair):
        def fail() -> None:
            with pair.batch(training=False):
                pair.same(call())
                assert pair.replay.num_bytes == BYTES
                raise OSError("out of cheese")

        with pytest.raises(OSError, match="cheese"):
            fail()
        assert pair.replay.num_bytes == 0

    def test_keeps_what_fits_of_passes_that_stand_alone(self):
        pair = Pair(tiny("llama", 4).eval(), max_bytes=2 * BYTES - 1)
        with pair.alone():
            assert pair.replays(*[call(), call(ids(1))] * 2) == [0, 0, 1, 0]

    @pytest.mark.parametrize(
        ("layers", "max_bytes"), [(0, BUDGET), ([0, 3], BUDGET), ("full", BUDGET), (FIRST, 0)]
    )
    def test_nothing_is_recorded_without_a_prefix_or_a_budget(self, caplog, layers, max_bytes):
        pair = Pair(tiny("llama", 4).eval(), layers, max_bytes)
        assert not pair.replay.enabled
        with pair.batch():
            assert pair.replays(call(), call()) == [False, False]
        assert warnings(caplog) == []


class TestExceptions:
    @pytest.mark.parametrize(("layer", "num_before"), [(0, 0), (1, 0), (3, 0), (3, 2)])
    def test_are_the_users_and_nothing_stays_patched(self, layer, num_before):
        pair = Pair(tiny("llama", 4).eval())
        inside = pair.model.model.layers[layer].mlp
        with pair.batch():
            pair.replays(*[call()] * num_before)
            Failing(inside)
            with torch.no_grad(), pytest.raises(OSError, match="cheese"):
                pair.model(input_ids=ids(), use_cache=False)
            del inside.forward
            pair.same(call())
            assert pair.same(call())
        assert_unpatched(pair.model)

    def test_in_the_replay_that_is_compared_ends_it(self, pair, caplog):
        with pair.batch():
            pair.same(call())
            # What a hook of this kind counts is not put back after the comparison.
            noting_hook(pair.model.model.layers[3].mlp, Failing(SimpleNamespace(forward=int)))
            assert not pair.same(call())
        assert not pair.replay.enabled
        [warning] = warnings(caplog)
        assert "cannot run on it: OSError: out of cheese" in warning

    def test_around_passes_leave_nothing(self, pair):
        for around in (pair.batch, pair.alone):

            def failing(around: Any = around) -> None:
                with around():
                    pair.same(call())
                    raise OSError("rows")

            with pytest.raises(OSError, match="rows"):
                failing()
            assert_unpatched(pair.model)
            assert not pair.same(call())

    def test_a_forward_that_somebody_else_patched_is_theirs_again(self, pair):
        layer, calls = pair.model.model.layers[0], []
        original = layer.forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

        layer.forward = patched
        with pair.batch():
            pair.replays(call(), call())
        assert layer.forward is patched
        assert calls == [1, 1]


class TestSeveralProcesses:
    """A pass that one of them replays and another does not would leave them waiting."""

    def test_replay_where_all_do(self):
        answers: list[bool] = []
        pair = Pair(tiny("llama", 4).eval(), agree=lambda here: answers.append(here) or here)
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
        # Whether there is a budget; whether the rows are known, and the kind, and arguments of the
        # layers are the same; of the comparison, whether the replay and both went well, and whether
        # nothing was drawn.
        compared = [True, False, *[True, True], True, True, True]
        assert answers == [True, False, *compared, *[True] * 3, *[True] * 3]

    @pytest.mark.parametrize("otherwise", range(14))
    def test_do_as_any_that_cannot(self, caplog, otherwise):
        answers = iter(index != otherwise for index in range(100))
        pair = Pair(tiny("llama", 4).eval(), agree=lambda here: next(answers) and here)
        with pair.batch():
            for _ in range(3):
                pair.same(call())
        assert len(warnings(caplog)) <= 1
        assert_unpatched(pair.model)

    def test_compare_again_with_one_that_has_not_compared(self):
        """Or it would wait for the others in the passes that it makes to compare."""
        answers: list[bool] = []

        def agree(here: bool) -> bool:
            # Whether this kind of call has been compared. Not in the other.
            answers.append(here and len(answers) != 13)
            return answers[-1]

        pair = Pair(tiny("llama", 4).eval(), agree=agree)
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
        assert answers[12:14] == [True, False]
        assert all(answers[14:])
        assert not pair.replay.refused

    @pytest.mark.parametrize("layer", [1, 2])
    def test_ask_alike_where_one_calls_its_layers_otherwise(self, layer, caplog):
        """After the last frozen layer: on the way there, others gather layers that are sharded."""
        seen: list[Any] = []
        model = tiny("llama", 4).eval()
        pair = Pair(model, 3, agree=lambda here: seen.append(here) or here)
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
            del seen[:]
            for index in (1, 2):

                def move(_: Any, args: Any, kwargs: Any, index: int = index) -> Any:
                    seen.append(f"layer {index}")
                    moved = kwargs["position_ids"] + (index == layer)
                    return args, {**kwargs, "position_ids": moved}

                move.__module__ = "accelerate.hooks"  # a launcher's are known to change no results
                called = pair.model.model.layers[index]
                called.register_forward_pre_hook(move, with_kwargs=True)
            assert not pair.same(call())
        # The rows are known, and the kind; the arguments differ; and once more without a replay.
        layers = ["layer 1", "layer 2"]
        assert seen == [True, True, *layers, False, *layers]
        assert "calls its layers otherwise" in warnings(caplog)[0]

    def test_stop_where_another_found_a_difference(self, caplog):
        answers = iter([True, True, True, True, True, True, True, False])
        pair = Pair(tiny("llama", 4).eval(), agree=lambda here: next(answers, True) and here)
        with pair.batch():
            pair.replays(call(), call())
        assert not pair.replay.enabled
        assert "did not match in another process" in warnings(caplog)[0]


def test_results_are_compared_with_those_of_a_plain_run_to_the_bit_where_shapes_agree(pair):
    with pair.batch():
        recorded = pair.model(input_ids=ids(), use_cache=False).logits
        assert_close(pair.model(input_ids=ids(), use_cache=False).logits, recorded, rtol=0, atol=0)
