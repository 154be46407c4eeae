"""What may not be replayed is told from what may, and results that differ from those that agree."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from layerrl.replay.comparing import difference, flat, gradients
from layerrl.replay.entering import Request, autocast_dtype
from layerrl.replay.prefix import _computed_in
from layerrl.replay.state import unfit, without_hooks
from tests.models import tiny
from tests.replays import ids


def layer() -> Any:
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.BatchNorm1d(2)).eval()


class TestUnfit:
    def test_nothing_is_known_against_a_layer_in_evaluation_mode(self):
        assert unfit([layer(), layer()]) is None

    @pytest.mark.parametrize(("place", "why"), [(1, "dropout is active"), (2, "batch statistics")])
    def test_random_modules_in_training_mode(self, place, why):
        layers = [layer(), layer()]
        layers[1][place].train()
        found = unfit(layers)
        assert found is not None
        assert why in found
        assert f"({place} of layer 1" in found

    def test_dropout_of_zero_is_not_random(self):
        layers = [layer()]
        layers[0][1].train().p = 0.0
        assert unfit(layers) is None

    @pytest.mark.parametrize(
        "register",
        [
            "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
            "register_full_backward_pre_hook",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("place", ["", "0"])
    def test_hooks_of_others(self, register, place):
        def note(*_: Any) -> None: ...

        layers = [layer()]
        handle = getattr(layers[0].get_submodule(place), register)(note)
        found = unfit(layers)
        assert found is not None
        assert "frozen layers carry a hook" in found
        assert "note" in found
        handle.remove()
        assert unfit(layers) is None

    def test_a_parametrized_weight_is_no_hook(self):
        layers = [layer()]
        parametrizations.weight_norm(layers[0][0])
        assert unfit(layers) is None

    def test_hooks_of_launchers_are_harmless(self):
        def hook(*_: Any) -> None: ...

        hook.__module__ = "torch.distributed.fsdp._fully_shard"
        layers = [layer()]
        layers[0].register_forward_hook(hook)
        assert unfit(layers) is None

    def test_all_but_those_are_taken_out_and_put_back_in_order(self):
        seen: list[int] = []
        model = layer()
        for index in range(3):
            model[0].register_forward_hook(lambda *_, index=index: seen.append(index))

        def failing() -> None:
            with without_hooks(model):
                model(torch.ones(1, 2))
                raise OSError("cheese")

        with pytest.raises(OSError, match="cheese"):
            failing()
        assert seen == []
        model(torch.ones(1, 2))
        assert seen == [0, 1, 2]


class TestPrecision:
    def test_autocast_is_off_where_torch_knows_none(self):
        with torch.autocast("cpu", torch.bfloat16):
            assert autocast_dtype(torch.device("cpu")) == torch.bfloat16
            assert autocast_dtype(torch.device("meta")) is None
            assert _computed_in(torch.empty(2, device="meta")) == torch.float32
        assert autocast_dtype(torch.device("cpu")) is None


class TestRequest:
    @pytest.mark.parametrize(
        ("kwargs", "asked"),
        [
            ({}, ()),
            ({"output_hidden_states": True}, ("output_hidden_states",)),
            ({"output_hidden_states": False}, ()),
            ({"output_hidden_states": None}, ()),
            ({"output_attentions": True, "output_x": 1}, ("output_attentions", "output_x")),
        ],
    )
    def test_asks_for_more_than_its_output(self, kwargs, asked):
        assert Request(tiny("llama"), (ids(),), kwargs).asked == asked

    def test_asks_through_the_config(self):
        model = tiny("gemma3")
        model.config.get_text_config().output_hidden_states = True
        assert Request(model, (), {}).asked == ("output_hidden_states",)
        # And is told not to for this once.
        assert Request(model, (), {"output_hidden_states": False}).asked == ()

    def test_tells_its_rows(self):
        model = tiny("llama")
        assert Request(model, (ids(),), {}).num_rows == 6
        assert Request(model, (), {"inputs_embeds": torch.zeros(2, 3, 4)}).num_rows == 2
        assert Request(model, (), {"labels": ids()}).num_rows is None

    def test_tells_what_was_written_to(self):
        tokens = ids()
        request = Request(tiny("llama"), (tokens,), {})
        assert not request.written
        tokens[0, 0] = 1
        assert request.written

    def test_kinds_tell_switches_and_not_numbers_apart(self):
        model = tiny("llama")
        kinds = [Request(model, (), kwargs).kind for kwargs in (
            {"use_cache": True}, {"use_cache": False}, {"logits_to_keep": 3}, {"logits_to_keep": 4},
        )]  # fmt: skip
        assert len(set(kinds)) == 3


def observed(*outputs: Any, gradient: float = 1.0) -> Any:
    return list(outputs), {0: torch.full((3,), gradient), 1: None}


class TestDifference:
    @pytest.mark.parametrize(("off_by", "agree"), [(0.0, True), (5e-5, True), (5e-4, False)])
    def test_of_values_is_more_than_rounding(self, off_by, agree):
        plain, other = torch.ones(8), torch.ones(8) + off_by
        found = difference(observed(plain), observed(other), exact=torch.float32)
        assert (found is None) == agree

    @pytest.mark.parametrize(("off_by", "agree"), [(0.0, True), (2e-4, True), (2e-3, False)])
    def test_of_gradients_counts(self, off_by, agree):
        value = torch.ones(2)
        others = observed(value, gradient=1 + off_by)
        found = difference(observed(value), others, exact=torch.float32)
        assert (found is None) == agree
        assert agree or "gradient differs by" in str(found)

    def test_allows_for_half_precision(self):
        plain, other = torch.ones(8), torch.ones(8) * 1.01
        assert difference(observed(plain), observed(other), exact=torch.bfloat16) is None
        assert difference(observed(plain), observed(other), exact=torch.float64)

    @pytest.mark.parametrize(
        ("other", "why"),
        [
            ([torch.ones(2, 2)], "shape"),
            ([torch.ones(4), torch.ones(1)], "2 values in place of 1"),
            ([torch.full((4,), torch.nan)], "differ by nan"),
            ([torch.tensor([1, 1, 1, 3.0])], "differ by 0.5"),
        ],
    )
    def test_says_what_it_is(self, other, why):
        assert why in str(
            difference(observed(torch.ones(4)), observed(*other), exact=torch.float32)
        )

    def test_numbers_that_are_none_may_agree(self):
        value = torch.tensor([torch.nan, torch.inf, 1.0])
        assert difference(observed(value), observed(value.clone()), exact=torch.float32) is None

    def test_where_there_is_nothing_to_compare_nothing_is_known(self):
        assert "no floating-point tensor" in str(
            difference(observed(ids()), observed(ids()), exact=torch.float32)
        )

    def test_everything_that_is_returned_is_looked_at(self):
        a, b = torch.ones(1), torch.zeros(1)
        assert flat({"x": [a, (None, {"y": b})], "z": "text"}) == [a, None, b, "text"]

    def test_gradients_are_of_what_trains_and_is_reached(self):
        weight, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        found = gradients([weight * 2, "text", torch.ones(2)], [frozen, weight, unused])
        assert set(found) == {1, 2}
        assert found[1] is not None
        assert found[2] is None
        assert gradients([torch.ones(2)], [weight]) == {}
