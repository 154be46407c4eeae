"""A row is known by its bits: any change of one changes its key, and nothing else does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerrl.replay import arguments
from layerrl.replay.arguments import OpaqueArgumentError, RowKeys, hidden_states, leaves, row_keys
from tests.devices import generator as draws
from tests.devices import on_any_device

pytestmark = [on_any_device, pytest.mark.usefixtures("made_on_device")]

B = 3
DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64,
]  # fmt: skip


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = draws(0)
    numbers = torch.randint(0, 120, shape, generator=generator)
    return numbers % 2 == 0 if dtype == torch.bool else numbers.to(dtype)


def keys(tensor: Tensor) -> list[int]:
    return row_keys(tensor).tolist()


def described(*values: object, rows: int = B) -> tuple[Any, ...]:
    found = RowKeys(rows).of([(str(index), value) for index, value in enumerate(values)])
    return found.structure, found.keys


class TestRowKeys:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 31, 64, 1001])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_are_those_of_the_row_alone(self, dtype, size):
        rows = random(dtype, B, size)
        assert keys(rows) == [keys(row[None])[0] for row in rows]
        assert keys(rows.repeat(2, 1)) == keys(rows) * 2
        assert len(set(keys(rows))) == len({tuple(row) for row in rows.tolist()})

    def test_are_the_same_whatever_torchs_default_device_is(self):
        rows = random(torch.int64, B, 8)
        expected = keys(rows)
        arguments.odd_weights.cache_clear()
        with torch.device("meta"):  # where tensors that are made by mistake have no values
            found = keys(rows)
        assert found == expected

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_one_element_that_changes_changes_its_row_alone(self, dtype):
        rows = random(dtype, B, 13)
        before = keys(rows)
        for column in range(13):
            changed = rows.clone()
            changed[1, column] = ~rows[1, column] if dtype == torch.bool else rows[1, column] + 1
            assert [a == b for a, b in zip(keys(changed), before, strict=True)] == [1, 0, 1]

    def test_one_bit_that_changes_changes_it_wherever_it_is(self):
        rows = random(torch.int64, 1, 4)
        flipped = [rows ^ (1 << bit if bit < 63 else -(1 << 63)) * (torch.arange(4) == word)
                   for word in range(4) for bit in range(64)]  # fmt: skip
        assert len({keys(row)[0] for row in (rows, *flipped)}) == 257

    def test_sees_the_sign_of_zero_one_ulp_and_pairs_of_signs(self):
        rows = torch.randn(1, 16, generator=draws(0))
        rows[0, 3] = 0.0
        changed = [rows.clone() for _ in range(4)]
        changed[0][0, 3] = -0.0
        changed[1][0, 5] = torch.nextafter(rows[0, 5], torch.tensor(torch.inf))
        changed[2][0, [6, 7]] *= -1  # which a product of words would not tell apart
        changed[3][0, [6, 9]] *= -1
        assert len({keys(row)[0] for row in (rows, *changed)}) == 5

    def test_order_counts(self):
        rows = random(torch.float32, 1, 20)
        rows[0, :2] = torch.tensor([7.5, 8.5])
        assert keys(rows) != keys(rows.flip(1))
        assert keys(rows) != keys(rows.roll(2, 1))

    def test_memory_layout_does_not(self):
        rows = random(torch.float32, B, 4, 6)
        padded = torch.zeros(B + 1, 5, 7)
        view = padded[1:, 1:, 1:]
        view.copy_(rows)
        turned = rows.transpose(1, 2).contiguous().transpose(1, 2)
        for other in (view, turned, rows[1:]):
            assert keys(other) == keys(rows)[-len(other) :]
        odd = torch.zeros(B * 5 + 1, dtype=torch.uint8)[1:].view(B, 5)
        assert keys(odd) == keys(odd.clone())
        at_two_bytes = random(torch.bfloat16, 1 + B * 8)[1:].view(B, 8)
        assert keys(at_two_bytes) == keys(at_two_bytes.clone())

    def test_conjugated_and_negated_views_are_what_they_show(self):
        rows = torch.complex(torch.randn(B, 4), torch.randn(B, 4))
        assert keys(rows.conj()) == keys(rows.conj().resolve_conj()) != keys(rows)
        assert keys(rows.conj().imag) == keys(rows.conj().imag.resolve_neg())

    def test_long_rows_are_read_in_parts(self, monkeypatch):
        rows = random(torch.float32, 4, 1000)
        whole = keys(rows)
        monkeypatch.setattr("layerrl.replay.arguments._SLICE_BYTES", 1)
        assert keys(rows) == whole
        monkeypatch.setattr("layerrl.replay.arguments.CHUNK", 64)
        swapped = torch.cat([rows[:, 128:256], rows[:, :128], rows[:, 256:]], dim=1)
        assert not {*keys(swapped)} & {*keys(rows)}

    @pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
    def test_nothing_has_keys_too(self, shape):
        assert len(keys(torch.zeros(shape))) == shape[0]

    def test_leave_the_tensor_as_it_is(self):
        rows = torch.randn(B, 4, requires_grad=True)
        before = rows.detach().clone()
        assert not row_keys(rows).requires_grad
        assert torch.equal(rows, before)


class TestArguments:
    def test_a_tensor_for_all_rows_is_as_one_repeated(self):
        one = torch.randn(1, 4)
        assert described(one) == described(one.expand(B, 4)) == described(one.repeat(B, 1))

    def test_tensors_that_change_places_are_others(self):
        a, b = torch.randn(2, B, 4)
        assert described(a, b) != described(b, a)
        assert described(a, a) != described(b, b)

    @pytest.mark.parametrize(
        "other",
        [
            torch.zeros(B, 8),
            torch.zeros(B, 2, 2),
            torch.zeros(B, 4, dtype=torch.int32),
            torch.zeros(4),
            0.0,
            None,
        ],
        ids=str,
    )
    def test_shape_and_type_count(self, other):
        assert described(torch.zeros(B, 4)) != described(other)

    @pytest.mark.parametrize(("a", "b"), [(1, True), (1, 1.0), (0, None), ("1", 1), (1, 2)])
    def test_scalars_count_with_their_type(self, a, b):
        assert described(a) != described(b)

    def test_a_tensor_without_rows_counts_for_all(self):
        lengths = torch.tensor([0, 3, 7])
        before, after = described(lengths)[1], described(lengths + (lengths == 7))[1]
        assert not {*before} & {*after}

    def test_cosines_of_three_axes_have_their_rows_second(self):
        cos = torch.randn(3, 2, 5, 4)
        _, keys_of_two = described(cos, rows=2)
        assert described(cos[:, 1:], rows=1)[1] == keys_of_two[1:]

    def test_of_three_rows_either_could_be_meant_and_all_count(self):
        cos = torch.randn(3, 3, 5, 4)
        changed = cos.clone()
        changed[0, 1] += 1
        assert not {*described(cos)[1]} & {*described(changed)[1]}

    def test_a_tensor_that_was_written_to_is_read_again(self):
        keys, value = RowKeys(B), torch.zeros(B, 4)
        first = keys.of([("mask", value)])
        value[1] += 1
        second = keys.of([("mask", value)])
        assert [a == b for a, b in zip(first.keys, second.keys, strict=True)] == [1, 0, 1]

    def test_containers_are_taken_apart(self):
        a, b = torch.randn(2, B, 4)
        flat = leaves((torch.zeros(B, 5, 4), a), {"both": (a, {"x": b}), "flag": True})
        assert [path for path, _ in flat] == [
            "1", "both: tuple of 2", "both[0]", "both[1]: dict of ['x']", "both[1]['x']", "flag",
        ]  # fmt: skip
        assert leaves((), {"hidden_states": a, "x": ()}) != leaves((), {"hidden_states": a})

    @pytest.mark.parametrize(
        "value",
        [object(), {1}, lambda: 0, torch.zeros(2).to_sparse(), torch.nested.nested_tensor([])],
        ids=["object", "set", "function", "sparse", "nested"],
    )
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_anything_else_cannot_be_compared(self, value):
        with pytest.raises(OpaqueArgumentError, match="what"):
            leaves((), {"what": value})

    @pytest.mark.parametrize(
        ("args", "kwargs"), [((), {"x": torch.zeros(2)}), ((3,), {}), ((), {})]
    )
    def test_hidden_states_that_are_not_found_are_an_error(self, args, kwargs):
        with pytest.raises(OpaqueArgumentError, match="neither first nor by that name"):
            hidden_states(args, kwargs)
