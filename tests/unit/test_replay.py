"""What leaves the frozen prefix is recorded once and replayed row by row, or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from layerrl import select_layers
from layerrl.blocks import find_blocks
from layerrl.replay import PrefixReplay
from tests.models import tiny
from tests.runs import shares_keys_and_values

# Legend: B rows, T tokens, H hidden size.
B, T, H = 6, 5, 16
BUDGET = 2**20
BYTES = B * T * H * 4
FIRST = 2
Scores = tuple[Tensor, ...]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", 4).eval()


@pytest.fixture
def ids_BT() -> Tensor:
    return torch.randint(3, 64, (B, T), generator=torch.Generator().manual_seed(0))


def replay_of(model: nn.Module, layers: Any = FIRST, max_bytes: int = BUDGET) -> PrefixReplay:
    return PrefixReplay(model, select_layers(model, layers), max_bytes)


def score(model: nn.Module, ids_BT: Tensor, chunk: int = B) -> Callable[[], Scores]:
    """The computation that a trainer hands over: log-probabilities first, in chunks of rows."""

    def compute() -> Scores:
        logits = torch.cat([model(input_ids=ids).logits for ids in ids_BT.split(chunk)])
        return (logits.log_softmax(dim=-1),)

    return compute


@contextmanager
def layers_run(model: nn.Module) -> Iterator[list[int]]:
    """Lists the layers whose insides run, in order."""
    ran: list[int] = []
    handles = [
        next(layer.children()).register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(find_blocks(model).modules)
    ]
    yield ran
    for handle in handles:
        handle.remove()


@contextmanager
def entering(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Lists the hidden states that enter a layer."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@contextmanager
def failing(layer: nn.Module, on_call: int = 1) -> Iterator[None]:
    """Lets a layer raise when it is entered for the n-th time."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == on_call:
            raise OSError("out of cheese")

    handle = layer.register_forward_pre_hook(fail)
    yield
    handle.remove()


def run(
    replay: PrefixReplay,
    model: nn.Module,
    ids_BT: Tensor,
    chunk: int = B,
    *,
    compute: Callable[[], tuple[Any, ...]] | None = None,
    training: bool = True,
) -> tuple[Any, ...]:
    """One pass over these rows."""
    tokens_BT2 = torch.stack([ids_BT, torch.ones_like(ids_BT)], dim=-1)
    compute = compute or score(model, ids_BT, chunk)
    return replay.run(compute, tokens_BT2=tokens_BT2, training=training)


def record(replay: PrefixReplay, model: nn.Module, ids_BT: Tensor, chunk: int = B) -> Scores:
    """The first pass over a new batch."""
    with replay.generating(training=True):
        return run(replay, model, ids_BT, chunk)


def recorded(replay: PrefixReplay) -> bool:
    """Whether there is a whole batch for training that can be replayed."""
    recording = replay._recordings.get(True)
    return (
        recording is not None
        and recording.hidden_BTH is not None
        and recording.num_rows == len(recording.hidden_BTH)
    )


def recorded_and_verified(model: nn.Module, ids_BT: Tensor, **changes: Any) -> PrefixReplay:
    replay = replay_of(model, **changes)
    record(replay, model, ids_BT)
    with replay.rows(torch.arange(len(ids_BT))):
        run(replay, model, ids_BT)
    assert replay.enabled
    assert recorded(replay)
    return replay


def assert_unpatched(model: nn.Module) -> None:
    assert [i for i, m in enumerate(find_blocks(model).modules) if "forward" in vars(m)] == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "layerrl.replay"]


class TestRecordAndReplay:
    @pytest.mark.parametrize("chunk", [1, 2, 4, B])
    @pytest.mark.parametrize("family", ["llama", "falcon", "gemma3_text", "qwen3_vl"])
    def test_other_rows_in_another_order_get_their_hidden_states(self, ids_BT, family, chunk):
        model = tiny(family, 4).eval()
        replay = recorded_and_verified(model, ids_BT)
        record(replay, model, ids_BT, chunk)
        rows = torch.tensor([4, 0, 5])
        layer = find_blocks(model).modules[FIRST]
        with entering(layer) as plain:
            expected = score(model, ids_BT[rows])()
        with entering(layer) as replayed, replay.rows(rows), layers_run(model) as ran:
            found = run(replay, model, ids_BT[rows])
        assert ran == [2, 3]
        # Recorded in chunks of another size, for which a kernel may round differently.
        assert_close(replayed, plain, rtol=0, atol=1e-5)
        assert_close(found, expected, rtol=0, atol=1e-5)

    def test_is_exact_for_the_same_rows(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        with replay.rows(torch.arange(B)), layers_run(model) as ran:
            found = run(replay, model, ids_BT)
        assert ran == [2, 3]
        assert_close(found, score(model, ids_BT)(), rtol=0, atol=0)

    def test_rows_may_be_scored_in_chunks_and_more_than_once(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        rows = torch.tensor([5, 1, 1, 3])
        with replay.rows(rows), layers_run(model) as ran:
            found = run(replay, model, ids_BT[rows], 2)
        assert ran == [2, 3, 2, 3]
        assert_close(found, score(model, ids_BT[rows], chunk=2)(), rtol=0, atol=1e-6)

    def test_later_passes_over_a_new_batch_replay_the_first(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        other_BT = ids_BT.flip(1)
        with layers_run(model) as ran, replay.generating(training=True):
            first = run(replay, model, other_BT, 2)
            second = run(replay, model, other_BT, 2)
        assert ran == [0, 1, 2, 3] * 3 + [2, 3] * 3
        assert_close(second, first, rtol=0, atol=0)

    def test_gradients_of_the_layers_above_are_the_same(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        weight = model.model.layers[FIRST].mlp.down_proj.weight
        with replay.rows(torch.arange(B)):
            (found,) = torch.autograd.grad(run(replay, model, ids_BT)[0].sum(), weight)
        (expected,) = torch.autograd.grad(score(model, ids_BT)()[0].sum(), weight)
        assert expected.abs().sum() > 0
        assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("again", ["generating", "rows"])
    def test_a_layer_that_works_in_place_does_not_reach_the_recording(self, model, ids_BT, again):
        replay = recorded_and_verified(model, ids_BT)
        expected = score(model, ids_BT)()
        with replay.generating(training=True), torch.no_grad():
            run(replay, model, ids_BT)
            handle = model.model.layers[FIRST].register_forward_pre_hook(
                lambda _, args: args[0].mul_(0)
            )
            if again == "generating":
                run(replay, model, ids_BT)
        with replay.rows(torch.arange(B)), torch.no_grad():
            if again == "rows":
                run(replay, model, ids_BT)
            handle.remove()
            found = run(replay, model, ids_BT)
        assert_close(found, expected, rtol=0, atol=0)

    def test_returns_all_that_was_computed(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        with replay.rows(torch.arange(B)):
            found = run(
                replay,
                model,
                ids_BT,
                compute=lambda: (*score(model, ids_BT)(), None, "more"),
            )
        assert found[1:] == (None, "more")

    def test_passes_outside_a_batch_run_plainly(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        with layers_run(model) as ran:
            run(replay, model, ids_BT)
            with replay.rows(None):
                run(replay, model, ids_BT)
        assert ran == [0, 1, 2, 3] * 2

    @pytest.mark.parametrize("what", ["tokens", "mask", "order", "number"])
    def test_other_rows_than_those_recorded_run_plainly(self, model, ids_BT, what):
        replay = recorded_and_verified(model, ids_BT)
        rows = torch.tensor([4, 0, 5])
        some_BT, mask_BT = ids_BT[rows], torch.ones_like(ids_BT[rows])
        if what == "tokens":
            some_BT[1, 2] += 1
        elif what == "mask":
            mask_BT[1, 0] = 0
        elif what == "order":
            some_BT = some_BT.flip(0)
        else:
            rows = torch.tensor([4, 0, B])
        with replay.rows(rows), layers_run(model) as ran:
            found = replay.run(
                score(model, some_BT),
                tokens_BT2=torch.stack([some_BT, mask_BT], dim=-1),
                training=True,
            )
        assert ran == [0, 1, 2, 3]
        assert_close(found, score(model, some_BT)(), rtol=0, atol=0)
        assert replay.enabled

    def test_an_evaluation_in_between_has_a_recording_of_its_own(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        other_BT = ids_BT.flip(1)
        with replay.generating(training=False):
            run(replay, model, other_BT, training=False)
        with replay.rows(torch.arange(B)), layers_run(model) as ran:
            run(replay, model, other_BT, training=False)  # compared with a plain pass
            other = run(replay, model, other_BT, training=False)
            found = run(replay, model, ids_BT)
        assert ran == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3]
        assert_close(other, score(model, other_BT)(), rtol=0, atol=0)
        assert_close(found, score(model, ids_BT)(), rtol=0, atol=0)

    def test_a_new_batch_forgets_the_last_one(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        with replay.generating(training=True):
            assert not recorded(replay)
        with replay.rows(torch.arange(B)), layers_run(model) as ran:
            run(replay, model, ids_BT)
        assert ran == [0, 1, 2, 3]

    def test_clear_frees_the_recording(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        replay.clear()
        assert not recorded(replay)
        assert replay.enabled
        with replay.rows(torch.arange(B)), layers_run(model) as ran:
            run(replay, model, ids_BT)
        assert ran == [0, 1, 2, 3]

    def test_a_batch_of_which_only_a_part_was_scored_is_not_replayed(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        with replay.generating(training=True):
            run(replay, model, ids_BT, compute=score(model, ids_BT[:4], chunk=2))
        assert not recorded(replay)
        with replay.rows(torch.arange(2)), layers_run(model) as ran:
            run(replay, model, ids_BT[:2])
        assert ran == [0, 1, 2, 3]


class TestRepeating:
    """A policy scores its batches before the reference does, and both in the same order."""

    def test_each_batch_is_recorded_once_and_replayed_afterwards(self, model, ids_BT):
        replay, others_BT = replay_of(model), ids_BT.flip(1)
        for expected in ([0, 1, 2, 3] * 3 + [2, 3] * 2, [0, 1, 2, 3] * 2 + [2, 3] * 2):
            with replay.repeating(), layers_run(model) as ran:
                first = [run(replay, model, some) for some in (ids_BT, others_BT)]
                again = [run(replay, model, some) for some in (ids_BT, others_BT)]
            # The first replay is compared with a plain pass.
            assert ran == expected
            assert_close(again, first, rtol=0, atol=0)
            assert replay.num_bytes == 0

    def test_all_batches_share_the_budget(self, model, ids_BT):
        replay = replay_of(model, max_bytes=2 * BYTES - 1)
        with replay.repeating():
            for some in (ids_BT, ids_BT.flip(1)):
                run(replay, model, some)
            assert replay.num_bytes == BYTES

    def test_outputs_of_transformers_are_compared(self, model, ids_BT, caplog):
        replay, off_by = replay_of(model), iter([0.0, 0.0, 1.0])

        def compute() -> Any:
            output = model(input_ids=ids_BT, use_cache=False)
            return ModelOutput(logits=output.logits + next(off_by), even=output.logits > 0)

        with replay.repeating():
            for _ in range(2):
                run(replay, model, ids_BT, compute=compute)
        assert not replay.enabled
        assert "differ by 1 " in warnings(caplog)[0]


class TestBudget:
    @pytest.mark.parametrize(("max_bytes", "fits"), [(BYTES, True), (BYTES - 1, False)])
    @pytest.mark.parametrize("chunk", [1, 4, B])
    def test_counts_the_bytes_of_the_whole_batch(self, model, ids_BT, chunk, max_bytes, fits):
        replay = replay_of(model, max_bytes=max_bytes)
        record(replay, model, ids_BT, chunk)
        assert recorded(replay) == fits
        assert replay.enabled

    def test_keeps_no_more_than_it_counts(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT, max_bytes=BYTES)
        [recording] = replay._recordings.values()
        assert recording.hidden_BTH is not None
        assert recording.hidden_BTH.untyped_storage().nbytes() == BYTES

    def test_half_the_dtype_is_half_the_bytes(self, model, ids_BT):
        replay = replay_of(model.to(torch.bfloat16), max_bytes=BYTES // 2)
        record(replay, model, ids_BT)
        assert recorded(replay)

    def test_a_batch_beyond_it_runs_plainly_and_the_next_may_fit(self, model, ids_BT, caplog):
        replay = replay_of(model, max_bytes=BYTES // 2)
        for num_rows, fits in ((B, False), (B // 2, True)):
            some_BT = ids_BT[:num_rows]
            with layers_run(model) as ran, replay.generating(training=True):
                first = run(replay, model, some_BT)
                again = run(replay, model, some_BT)
            assert recorded(replay) == fits
            assert fits or ran == [0, 1, 2, 3] * 2
            assert_close(again, first, rtol=0, atol=0)
        assert warnings(caplog) == []

    @pytest.mark.parametrize(
        ("layers", "max_bytes"), [(0, BUDGET), ([0, 3], BUDGET), ("full", BUDGET), (FIRST, 0)]
    )
    def test_nothing_is_recorded_without_a_prefix_or_a_budget(
        self, model, ids_BT, layers, max_bytes
    ):
        replay = replay_of(model, layers, max_bytes)
        assert not replay.enabled
        with layers_run(model) as ran, replay.generating(training=True):
            run(replay, model, ids_BT)
            run(replay, model, ids_BT)
        with replay.rows(torch.arange(B)):
            run(replay, model, ids_BT)
        assert not recorded(replay)
        assert all(r.hidden_BTH is None for r in replay._recordings.values())
        assert ran == [0, 1, 2, 3] * 2


class TestNothingStaysPatched:
    @pytest.mark.parametrize("on_call", [1, 2])
    def test_after_an_exception_while_recording(self, model, ids_BT, on_call):
        replay = replay_of(model)
        with (
            failing(model.model.layers[3], on_call),
            pytest.raises(OSError, match="out of cheese"),
        ):
            record(replay, model, ids_BT, chunk=2)
        assert_unpatched(model)
        assert not recorded(replay)
        # The next batch is a new one: nothing of the broken one is left.
        assert_close(
            record(replay, model, ids_BT, chunk=2),
            score(model, ids_BT, chunk=2)(),
            rtol=0,
            atol=0,
        )
        assert recorded(replay)
        assert replay.enabled

    def test_after_an_exception_in_the_plain_pass_that_verifies(self, model, ids_BT):
        replay = replay_of(model)
        record(replay, model, ids_BT)
        with (
            failing(model.model.layers[0]),
            replay.rows(torch.arange(B)),
            pytest.raises(OSError, match="out of cheese"),
        ):
            run(replay, model, ids_BT)
        assert_unpatched(model)
        assert replay.enabled

    def test_after_an_exception_in_the_replay_that_is_verified(self, model, ids_BT, caplog):
        replay = replay_of(model)
        record(replay, model, ids_BT)
        expected = score(model, ids_BT)()
        with failing(model.model.layers[3], on_call=2), replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT)
        assert_unpatched(model)
        assert_close(found, expected, rtol=0, atol=0)
        assert not replay.enabled
        [warning] = warnings(caplog)
        assert "OSError: out of cheese" in warning

    def test_after_an_exception_while_replaying(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        with (
            failing(model.model.layers[3]),
            replay.rows(torch.arange(B)),
            pytest.raises(OSError, match="out of cheese"),
        ):
            run(replay, model, ids_BT)
        assert_unpatched(model)
        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT)
        assert_close(found, score(model, ids_BT)(), rtol=0, atol=0)

    def test_a_forward_that_somebody_else_patched_is_theirs_again(self, model, ids_BT):
        layer = model.model.layers[0]
        calls: list[int] = []
        original = layer.forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

        layer.forward = patched
        replay = replay_of(model)
        record(replay, model, ids_BT)
        assert layer.forward is patched
        assert calls == [1]
        with replay.rows(torch.arange(B)):
            run(replay, model, ids_BT)
        assert layer.forward is patched

    def test_after_an_exception_around_a_pass(self, model, ids_BT):
        replay = recorded_and_verified(model, ids_BT)
        with pytest.raises(OSError, match="rows"), replay.rows(torch.arange(B)):
            raise OSError("rows")
        with layers_run(model) as ran:
            run(replay, model, ids_BT)
        with pytest.raises(OSError, match="batch"), replay.generating(training=True):
            raise OSError("batch")
        with layers_run(model) as ran_after:
            run(replay, model, ids_BT)
        assert ran == ran_after == [0, 1, 2, 3]


def with_dropout() -> PreTrainedModel:
    return tiny("llama", 4, attention_dropout=0.5).train()


def with_noise() -> PreTrainedModel:
    """A hook that adds noise to what leaves the prefix."""
    model = tiny("llama", 4).eval()
    generator = torch.Generator().manual_seed(0)
    model.model.layers[FIRST - 1].register_forward_hook(
        lambda *args: args[-1] + torch.randn(args[-1].shape, generator=generator)
    )
    return model


class TestMismatch:
    @pytest.mark.parametrize("made", [with_dropout, with_noise])
    def test_is_seen_in_the_first_replay_and_said_once(self, ids_BT, caplog, made):
        model = made()
        replay = replay_of(model)
        record(replay, model, ids_BT)
        for _ in range(3):
            with replay.rows(torch.arange(B)), layers_run(model) as ran:
                run(replay, model, ids_BT)
            assert ran[:4] == [0, 1, 2, 3]
        assert not replay.enabled
        assert not recorded(replay)
        record(replay, model, ids_BT)
        assert not recorded(replay)
        [warning] = warnings(caplog)
        assert "(2 layers)" in warning
        difference = float(warning.split("differ by ")[1].split()[0])
        assert difference > 1e-2
        assert_unpatched(model)

    def test_gives_the_plain_result(self, ids_BT, caplog):
        model = with_dropout()
        replay = replay_of(model)
        record(replay, model, ids_BT)
        torch.manual_seed(1)
        expected, state = score(model, ids_BT)(), torch.get_rng_state()
        torch.manual_seed(1)
        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT)
        assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(warnings(caplog)) == 1

    def test_leaves_the_gradients_of_the_plain_pass(self, ids_BT, caplog):
        model = with_noise()
        replay = replay_of(model)
        record(replay, model, ids_BT)
        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT)
        found[0].sum().backward()
        assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
        assert len(warnings(caplog)) == 1

    @pytest.mark.parametrize("which", [0, 1])
    def test_of_values_that_are_no_numbers_counts(self, model, ids_BT, caplog, which):
        replay = replay_of(model)
        record(replay, model, ids_BT)
        calls: list[int] = []

        def broken() -> Scores:
            calls.append(1)
            results = [*score(model, ids_BT)(), torch.ones(2)]
            if len(calls) > 1:
                results[which] = results[which] * float("nan")
            return tuple(results)

        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT, compute=broken)
        assert all(result.isfinite().all() for result in found)
        assert not replay.enabled
        assert "differ by nan" in warnings(caplog)[0]

    @pytest.mark.parametrize("which", [1, 2])
    def test_of_anything_else_that_is_computed_counts(self, model, ids_BT, caplog, which):
        replay = replay_of(model)
        record(replay, model, ids_BT)
        calls: list[int] = []

        def with_router_loss() -> tuple[Any, ...]:
            calls.append(1)
            extra: list[Tensor | None] = [None, None]
            extra[which - 1] = torch.tensor(float(len(calls)))
            return (*score(model, ids_BT)(), *extra)

        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT, compute=with_router_loss)
        assert found[which].item() == 1.0
        assert not replay.enabled
        assert len(warnings(caplog)) == 1

    def test_in_training_is_not_hidden_by_agreement_in_evaluation(self, ids_BT, caplog):
        model = with_dropout().eval()
        replay = replay_of(model)
        with replay.generating(training=False):
            run(replay, model, ids_BT, training=False)
        with replay.rows(torch.arange(B)), layers_run(model) as ran:
            run(replay, model, ids_BT, training=False)
            run(replay, model, ids_BT, training=False)
        assert ran == [0, 1, 2, 3, 2, 3, 2, 3]
        record(replay, model, ids_BT)
        model.train()
        torch.manual_seed(1)
        expected = score(model, ids_BT)()
        torch.manual_seed(1)
        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT)
        assert_close(found, expected, rtol=0, atol=0)
        assert not replay.enabled
        assert len(warnings(caplog)) == 1

    @pytest.mark.parametrize(
        ("off_by", "agrees"), [(0.0, True), (5e-5, True), (5e-4, False)], ids=str
    )
    def test_is_more_than_rounding(self, model, ids_BT, off_by, agrees):
        replay = replay_of(model)
        record(replay, model, ids_BT)
        calls: list[int] = []

        def shifted() -> Scores:
            calls.append(1)
            (logps,) = score(model, ids_BT)()
            return (logps + off_by * (len(calls) - 1),)

        with replay.rows(torch.arange(B)):
            run(replay, model, ids_BT, compute=shifted)
        assert len(calls) == 2
        assert replay.enabled == agrees

    @pytest.mark.parametrize("layer", [2, 3])
    def test_a_layer_that_needs_what_the_prefix_made_falls_back(self, ids_BT, caplog, layer):
        model = shares_keys_and_values().eval()
        replay = replay_of(model, layer)
        expected = score(model, ids_BT)()
        assert_close(record(replay, model, ids_BT), expected, rtol=0, atol=0)
        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT)
        assert_close(found, expected, rtol=0, atol=0)
        assert not replay.enabled
        [warning] = warnings(caplog)
        assert "KeyError" in warning
        assert_unpatched(model)

    def test_is_looked_for_before_the_first_pass_of_a_new_batch_is_replayed(self, ids_BT, caplog):
        model = shares_keys_and_values().eval()
        replay = replay_of(model)
        expected = score(model, ids_BT)()
        with replay.generating(training=True):
            run(replay, model, ids_BT)
            found = run(replay, model, ids_BT)
        assert_close(found, expected, rtol=0, atol=0)
        with replay.rows(torch.arange(B)):
            found = run(replay, model, ids_BT)
        assert_close(found, expected, rtol=0, atol=0)
        assert not replay.enabled
        assert len(warnings(caplog)) == 1

    def test_is_not_looked_for_where_there_is_only_padding(self, model, ids_BT, caplog):
        replay = replay_of(model)
        nothing = torch.stack([ids_BT, torch.zeros_like(ids_BT)], dim=-1)
        compute = next_tokens(model, ids_BT)
        with replay.generating(training=True):
            replay.run(compute, tokens_BT2=nothing, training=True)
        with replay.rows(torch.arange(B)):
            for _ in range(2):
                assert_close(replay.run(compute, tokens_BT2=nothing, training=True), compute())
        assert replay.enabled
        assert not replay._verified
        assert not caplog.text


class TestRecordWhileGenerating:
    """Rows of one length, sampled with a cache, as transformers' `generate` does for a trainer."""

    def replay(
        self, model: nn.Module, max_bytes: int = BUDGET, layers: Any = FIRST
    ) -> PrefixReplay:
        selection = select_layers(model, layers)
        return PrefixReplay(model, selection, max_bytes, record_while_generating=True)

    def generate(self, replay: PrefixReplay, model: Any, ids_BT: Tensor, new: int = 3) -> Tensor:
        with replay.sampling():
            return model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False,
                min_new_tokens=new,
            )  # fmt: skip

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral"])
    def test_no_pass_runs_the_prefix_once_it_has_matched(self, ids_BT, caplog, family):
        model = tiny(family, 4).eval()
        replay = self.replay(model)
        for first_time in (True, False):
            with replay.generating(training=True), layers_run(model) as ran:
                rows = self.generate(replay, model, ids_BT)
                ran.clear()
                found = run(replay, model, rows, compute=next_tokens(model, rows))
                assert (0 in ran) == first_time
            assert_close(found, next_tokens(model, rows)(), rtol=0, atol=1e-5)
        assert replay.samples
        assert not caplog.text

    def test_is_off_unless_asked_for(self, model, ids_BT):
        replay = replay_of(model)
        with replay.generating(training=True) as recording:
            rows = self.generate(replay, model, ids_BT)
            run(replay, model, rows, compute=next_tokens(model, rows))
        assert not recording.sampled
        assert not any(layer._forward_hooks for layer in find_blocks(model).modules)

    def test_serves_the_policy_pass_where_nothing_was_scored(self, model, ids_BT):
        replay = self.replay(model)
        for first_time in (True, False):
            with replay.generating(training=True) as recording:
                rows = self.generate(replay, model, ids_BT)
            tokens_BT2 = torch.stack([rows, torch.ones_like(rows)], dim=-1)
            assert replay.take_sampled(recording, tokens_BT2)
            with replay.rows(torch.tensor([4, 1])), layers_run(model) as ran:
                some = rows[[4, 1]]
                found = run(replay, model, some, compute=next_tokens(model, some))
            assert (0 in ran) == first_time
            assert_close(found, next_tokens(model, some)(), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("what", ["two generations", "other rows", "too large"])
    def test_anything_unexpected_is_recorded_in_a_pass_instead(self, model, ids_BT, what, caplog):
        replay = self.replay(model, BYTES if what == "too large" else BUDGET)
        with replay.generating(training=True) as recording:
            rows = self.generate(replay, model, ids_BT)
            if what == "two generations":
                self.generate(replay, model, ids_BT)
            if what == "other rows":
                rows = rows[:4]
            run(replay, model, rows, compute=next_tokens(model, rows))
        assert not recording.sampled
        assert (recording.hidden_BTH is None) == (what == "too large")
        assert not caplog.text

    def test_a_difference_ends_it_alone_with_one_warning(self, ids_BT, caplog):
        model = tiny("gpt2", 4).eval()
        replay = self.replay(model)
        padded = torch.nn.functional.pad(ids_BT, (2, 0))
        mask = (torch.arange(T + 2) >= 2).long().expand(B, -1)
        with replay.generating(training=True), replay.sampling():
            # Learned positions: generate counts them from the first real token, a pass does not.
            rows = model.generate(padded, attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
            tokens = torch.stack([rows, torch.nn.functional.pad(mask, (0, 2), value=1)], dim=-1)
            compute = next_tokens(model, rows, tokens[..., 1])
            found = replay.run(compute, tokens_BT2=tokens, training=True)
        assert_close(found, compute(), rtol=0, atol=0)
        assert caplog.text.count("recorded while generating will not be replayed") == 1
        assert not replay.samples
        assert replay.enabled

    def test_takes_no_more_memory_than_its_budget(self, model, ids_BT):
        replay = self.replay(model, 2 * B * H * 4)
        with replay.generating(training=True):
            self.generate(replay, model, ids_BT)
            assert sum(part.nbytes for part in replay._sampled) <= 2 * B * H * 4

    def test_after_an_exception_nothing_is_held(self, model, ids_BT):
        replay = self.replay(model)

        def scoring() -> None:
            with replay.generating(training=True):
                self.generate(replay, model, ids_BT)
                raise OSError("out of cheese")

        with pytest.raises(OSError, match="cheese"):
            scoring()
        assert not replay._sampled

    def test_after_an_exception_while_generating_no_hook_stays(self, model, ids_BT):
        replay = self.replay(model)
        with (
            replay.generating(training=True),
            failing(find_blocks(model).modules[3]),
            pytest.raises(OSError, match="cheese"),
        ):
            self.generate(replay, model, ids_BT)
        assert not any(layer._forward_hooks for layer in find_blocks(model).modules)


def next_tokens(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Any:
    """Log-probabilities of the last three tokens, which are what a trainer scores."""

    def compute() -> Scores:
        logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, -4:-1].log_softmax(-1)
        return (logits.gather(-1, ids_BT[:, -3:, None])[..., 0],)

    return compute
