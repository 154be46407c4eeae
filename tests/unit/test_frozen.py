"""Fingerprints see every bit; frozen tensors, learning rates and optimizers are told apart."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close
from transformers import Adafactor

from layerrl import frozen, select_layers
from layerrl.errors import FrozenTensorError, SelectionError
from layerrl.frozen import FrozenRecord, fingerprints, frozen_tensors
from layerrl.optimizer import check_optimizer, scale_learning_rates
from layerrl.scores.restoring import as_found
from layerrl.trained import TrainedLayers
from layerrl.trainer.metrics import norm
from tests.devices import DEVICE, on_any_device
from tests.models import tiny
from tests.operations import Operations, during

pytestmark = on_any_device

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES = [*FLOATS, *COMPLEX, *INTEGERS, torch.bool, torch.float8_e4m3fn]
CHUNK = 1 << 20


def fingerprint(tensor: Tensor) -> str:
    return fingerprints({"tensor": tensor.to(DEVICE)})["tensor"]


def one_by_one(tensor: Tensor) -> str:
    """The digits by their definition: 2^18 words at a time, in 64-bit arithmetic that wraps."""
    bits = tensor.contiguous().view(-1)
    bits = torch.view_as_real(bits).view(-1) if bits.is_complex() else bits
    word = {1: torch.uint8, 2: torch.int16}.get(bits.element_size(), torch.int32)
    weights, total = frozen.odd_weights(torch.device("cpu")), 0
    for chunk in bits.view(word).split(2**18):
        of_chunk = (chunk.long() * weights[: len(chunk)]).sum().item()
        total = (total * frozen.ODD_MULTIPLIER + of_chunk) % 2**64
    return f"{total:016x}"


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors have a GPU and no values."""
    frozen.odd_weights.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        frozen.odd_weights.cache_clear()


def launched(shape: tuple[int, ...], dtype: torch.dtype, where: str, **how: object) -> Operations:
    """What the fingerprint of a tensor without values computes, until one is asked for."""
    with fake_gpu():
        frozen.odd_weights(torch.device("cuda", 0))  # once in a process
        tensor = torch.empty(shape, dtype=dtype, device=where)
        with Operations() as operations, pytest.raises(DataDependentOutputException):
            fingerprints({"": tensor}, **how)  # type: ignore[arg-type]
    return operations


def random_bytes(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Bytes of a tensor of any dtype; for bool only the two that PyTorch itself writes."""
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype is torch.bool else 256
    size = num_elements * dtype.itemsize
    return torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)


class TestFingerprints:
    @pytest.mark.parametrize(
        ("num_elements", "digits"),
        [
            (0, "0000000000000000"),
            (2**19, "955ead8c1dd014b0"),
            (2**18 * 3 + 5, "5bab30384b95793d"),
        ],
    )
    def test_are_those_that_deltas_on_disk_have(self, num_elements, digits):
        tensor = random_bytes(num_elements, torch.float32).view(torch.float32)
        assert fingerprints({"": tensor.to(DEVICE)}) == {"": digits}

    @pytest.mark.parametrize("at_once", [1, 2])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_are_the_same_however_many_chunks_are_taken_at_once(self, dtype, at_once, monkeypatch):
        monkeypatch.setitem(frozen._CHUNKS_AT_ONCE, "cpu", at_once)
        for num_elements in (0, 1, 77, 2**18 + 1, 3 * 2**18 - 1, 3 * 2**18):
            tensor = random_bytes(num_elements, dtype).view(dtype)
            assert fingerprint(tensor) == one_by_one(tensor)
        pairs = tensor.view(-1, 2)
        for other in (tensor[0], pairs[:, 0], pairs.t(), pairs[:0], tensor[3:]):
            assert fingerprint(other) == one_by_one(other)
            assert fingerprints({"": other}, device=DEVICE) == {"": one_by_one(other)}

    def test_of_many_chunks_and_a_rest_are_the_same_in_groups_of_64(self, monkeypatch):
        monkeypatch.setitem(frozen._CHUNKS_AT_ONCE, "cpu", 64)
        tensor = random_bytes(66 * 2**18 + 5, torch.bfloat16).view(torch.bfloat16)
        assert fingerprint(tensor) == one_by_one(tensor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("num_chunks", [1, 3, 64, 65, 1000])
    def test_take_a_gpu_few_kernels_and_little_memory(self, dtype, num_chunks):
        words = max(1, dtype.itemsize // 4)  # of an element
        operations = launched((num_chunks * 2**18 // words + 1,), dtype, "cuda")
        # Two for each 64 chunks and for the rest, and one that puts their sums together.
        assert len(operations.kernels) <= 2 * (num_chunks // 64 + 2) + 1
        assert {device.type for _, device in operations.kernels} == {"cuda"}
        assert operations.peak < 256 * 2**20

    @pytest.mark.parametrize("shape", [(77,), (5000, 7000)])
    def test_of_tensors_on_the_cpu_are_computed_on_the_device_that_is_given(self, shape):
        operations = launched(shape, torch.bfloat16, "cpu", device=torch.device("cuda", 0))
        assert {device.type for _, device in operations.kernels} == {"cuda"}
        assert operations.peak < 256 * 2**20
        operations = launched(shape, torch.bfloat16, "cuda", device=torch.device("cpu"))
        assert {device.type for _, device in operations.kernels} == {"cuda"}

    def test_on_the_cpu_take_little_memory(self):
        tensor = torch.zeros(20, 2**18)
        assert during(lambda: fingerprints({"": tensor})).peak <= 2**24

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_single_flipped_bit_changes_it(self, dtype):
        data = random_bytes(3, dtype)
        flipped = {}
        for byte in range(len(data)):
            for bit in range(1 if dtype is torch.bool else 8):
                other = data.clone()
                other[byte] ^= 1 << bit
                flipped[f"bit {bit} of byte {byte}"] = other.view(dtype)
        found = fingerprints({"original": data.view(dtype), **flipped})
        original = found.pop("original")
        assert [name for name, value in found.items() if value == original] == []

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_the_same_for_a_copy_and_for_any_memory_layout(self, dtype):
        tensor = random_bytes(12, dtype).view(dtype).view(3, 4)
        transposed = tensor.t().contiguous().t()
        every_second = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
        assert not transposed.is_contiguous()
        assert not every_second.is_contiguous()
        expected = fingerprint(tensor)
        assert len(expected) == 16
        assert int(expected, 16) >= 0
        for same in (tensor.clone(), transposed, every_second):
            assert fingerprint(same) == expected

    def test_of_a_lazy_conjugate_is_that_of_its_values(self):
        tensor = torch.randn(4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
        assert tensor.conj().is_conj()
        assert fingerprint(tensor.conj()) == fingerprint(tensor.conj().resolve_conj())

    @pytest.mark.parametrize("shape", [(), (0,), (0, 4)])
    def test_takes_tensors_without_dimensions_or_elements(self, shape):
        assert fingerprint(torch.zeros(shape)) == "0" * 16

    def test_sees_zero_dimensional_values(self):
        values = [torch.tensor(value) for value in (1.0, 2.0, -1.0, float("nan"), float("inf"))]
        assert len({fingerprint(value) for value in values}) == len(values)

    def test_tells_minus_zero_from_zero_and_nan_equals_itself(self):
        assert fingerprint(torch.tensor(-0.0)) != fingerprint(torch.tensor(0.0))
        assert fingerprint(torch.tensor(float("nan"))) == fingerprint(torch.tensor(float("nan")))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_swapping_two_different_elements_changes_it(self, dtype):
        tensor = random_bytes(6, dtype).view(dtype)
        bits = tensor.view(torch.uint8).view(6, -1)
        swaps = {"original": tensor}
        for i in range(6):
            for j in range(i):
                if not torch.equal(bits[i], bits[j]):
                    order = torch.arange(6)
                    order[[i, j]] = torch.tensor([j, i])
                    swaps[f"{i}, {j}"] = bits[order].reshape(-1).view(dtype)
        assert len(swaps) > 5
        found = fingerprints(swaps)
        original = found.pop("original")
        assert [name for name, value in found.items() if value == original] == []

    @pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
    def test_negation_changes_it(self, dtype):
        # Negating flips the highest bit alone, which a sum modulo a power of two may lose.
        tensor = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert fingerprint(-tensor) != fingerprint(tensor)
        pair = tensor.view(-1)[:2] * 0 + 1
        pair[1] = -1
        assert fingerprint(pair.flip(0)) != fingerprint(pair)

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            pytest.param([True, False, False, True], [False, True, True, False], id="mask"),
            pytest.param([5, 5, 5, 5], [6, 4, 4, 6], id="expert counts"),
            pytest.param([0, 2, 1, 3], [1, 0, 2, 3], id="permutation"),
            pytest.param([0, 0, 0], [1, -2, 1], id="second difference"),
        ],
    )
    def test_changes_that_keep_sum_and_centre_of_mass_are_seen(self, before, after):
        # Weights that grow evenly with the position would cancel these.
        assert fingerprint(torch.tensor(after)) != fingerprint(torch.tensor(before))

    def test_neighbouring_roundings_that_cancel_are_seen(self):
        ones = torch.ones(4)
        up, down = torch.nextafter(ones, ones * 2), torch.nextafter(ones, ones * 0)
        # One unit in the last place up, twice as much in the middle down, by bits.
        bits = ones.view(torch.int32) + torch.tensor([1, -1, -1, 1], dtype=torch.int32)
        moved = bits.view(torch.float32)
        assert_close(moved, torch.stack([up[0], down[1], down[2], up[3]]), rtol=0, atol=0)
        assert fingerprint(moved) != fingerprint(ones)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64], ids=str)
    def test_sees_one_element_anywhere_in_more_than_one_chunk(self, dtype):
        tensor = torch.zeros(2 * CHUNK + 3, dtype=dtype)
        found = [fingerprint(tensor)]
        for position in (0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 2):
            tensor[position] = 1
            found.append(fingerprint(tensor))
            tensor[position] = 0
        assert len(set(found)) == len(found)
        assert fingerprint(tensor) == found[0]

    def test_depends_on_all_elements_however_large_and_laid_out(self):
        large = torch.arange(2 * CHUNK, dtype=torch.int32).view(2, CHUNK)
        expected = fingerprint(large)
        assert fingerprint(large.t().contiguous().t()) == expected
        assert fingerprint(large.flip(0)) != expected

    def test_does_not_depend_on_the_other_tensors_nor_their_order(self):
        tensors = {name: torch.full((3,), float(i)) for i, name in enumerate("abc")}
        together = fingerprints(tensors)
        assert list(together) == ["a", "b", "c"]
        assert together == fingerprints(dict(reversed(tensors.items())))
        assert together == {name: fingerprint(tensor) for name, tensor in tensors.items()}

    def test_leaves_out_meta_tensors_and_changes_nothing(self):
        parameter = nn.Parameter(torch.ones(3))
        found = fingerprints({"here": parameter, "nowhere": torch.ones(3, device="meta")})
        assert list(found) == ["here"]
        assert parameter.requires_grad
        assert parameter.grad is None
        assert_close(parameter.detach(), torch.ones(3), rtol=0, atol=0)

    def test_of_nothing_is_nothing(self):
        assert fingerprints({}) == {}


def with_buffers(model: nn.Module) -> nn.Module:
    """Buffers of both kinds in a block and outside the blocks."""
    for module in (model.model.layers[1].mlp, model.model):
        module.register_buffer("counts", torch.zeros(4, dtype=torch.int64))
        module.register_buffer("cache", torch.zeros(4), persistent=False)
    return model


class TestFrozenTensors:
    def test_are_the_parameters_outside_the_selection_themselves(self):
        model = tiny("llama", 3)
        frozen = frozen_tensors(model, select_layers(model, 1))
        expected = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not name.startswith("model.layers.1.")
        }
        assert frozen.keys() == expected.keys()
        assert all(frozen[name] is parameter for name, parameter in expected.items())
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= {*frozen}

    def test_hold_a_tied_embedding_once(self):
        model = tiny("llama", 2, tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        frozen = frozen_tensors(model, select_layers(model, "all"))
        assert sorted(frozen) == ["model.embed_tokens.weight", "model.norm.weight"]

    def test_hold_the_tensors_of_a_trained_block_that_modules_leave_out(self):
        model = tiny("llama", 2)
        frozen = frozen_tensors(model, select_layers(model, 1, modules="self_attn.*"))
        assert "model.layers.1.mlp.down_proj.weight" in frozen
        assert "model.layers.1.self_attn.q_proj.weight" not in frozen

    def test_hold_persistent_buffers_also_of_trained_blocks_and_no_others(self):
        model = with_buffers(tiny("llama", 3))
        frozen = frozen_tensors(model, select_layers(model, 1))
        buffers = {name for name in frozen if name.endswith((".counts", ".cache", "inv_freq"))}
        assert buffers == {"model.counts", "model.layers.1.mlp.counts"}
        assert frozen["model.layers.1.mlp.counts"] is model.model.layers[1].mlp.counts

    def test_hold_a_buffer_of_the_model_itself(self):
        model = tiny("llama", 2)
        model.register_buffer("step", torch.zeros(()))
        assert "step" in frozen_tensors(model, select_layers(model, 1))

    def test_are_none_when_everything_trains(self):
        model = with_buffers(tiny("llama", 3))
        assert frozen_tensors(model, select_layers(model, "full")) == {}

    def test_have_the_same_names_in_a_compiled_model(self):
        model = with_buffers(tiny("llama", 2))
        selection = select_layers(model, 1)
        expected = frozen_tensors(model, selection)
        assert frozen_tensors(torch.compile(model), selection).keys() == expected.keys()


class TestCheckFrozen:
    @pytest.fixture
    def model(self):
        return with_buffers(tiny("llama", 3))

    @pytest.fixture
    def selection(self, model):
        return select_layers(model, 1)

    @pytest.fixture
    def record(self, model, selection):
        return FrozenRecord(model, selection)

    def test_accepts_an_unchanged_model(self, model, selection, record):
        record.check(model)

    def test_accepts_changes_of_trained_tensors_and_unsaved_buffers(self, model, selection, record):
        with torch.no_grad():
            for parameter in selection.parameters(model).values():
                parameter.add_(1)
        model.model.cache.add_(1)
        model.model.layers[1].mlp.cache.add_(1)
        record.check(model)

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.2.input_layernorm.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.counts",
            "model.layers.1.mlp.counts",
        ],
    )
    def test_names_the_tensor_that_changed(self, model, selection, record, name):
        frozen = frozen_tensors(model, selection)
        with torch.no_grad():
            frozen[name].view(-1)[-1] += 1
        message = rf"1 of {len(frozen)} frozen tensors .*: {name}\. Only layer 1 of 3 may change"
        with pytest.raises(FrozenTensorError, match=message):
            record.check(model)

    def test_sees_one_flipped_bit(self, model, selection, record):
        model.model.norm.weight.data.view(torch.int32)[3] ^= 1
        with pytest.raises(FrozenTensorError, match=r"model\.norm\.weight"):
            record.check(model)

    def test_lists_five_names_when_more_changed(self, model, selection, record):
        with torch.no_grad():
            for parameter in model.model.layers[0].parameters():
                parameter.add_(1)
        with pytest.raises(FrozenTensorError, match=r"9 of 23 frozen") as error:
            record.check(model)
        assert str(error.value).count("model.layers.0.") == 5
        assert ", ..." in str(error.value)

    @pytest.mark.parametrize(
        ("adapter", "layer", "counts"),
        [("default", 0, True), ("ref", 1, True), ("reference", 1, False), ("default", 1, False)],
    )
    def test_adapters_count_that_the_loss_depends_on(self, adapter, layer, counts):
        model: Any = get_peft_model(tiny("llama", 3), LoraConfig(r=2, modules_to_save=["norm"]))
        for name in ("ref", "reference"):
            model.add_adapter(name, LoraConfig(r=2, modules_to_save=["norm"]))
        record = FrozenRecord(model, select_layers(model, 1))
        tensor = f"model.layers.{layer}.self_attn.q_proj.lora_A.{adapter}.weight"
        with torch.no_grad():
            model.get_base_model().get_parameter(tensor).add_(1)
        with pytest.raises(FrozenTensorError, match=tensor) if counts else nullcontext():
            record.check(model)

    def test_names_a_buffer_that_is_new_or_gone(self, model, selection, record):
        model.model.layers[2].register_buffer("late", torch.zeros(1))
        with pytest.raises(FrozenTensorError, match=r"model\.layers\.2\.late"):
            record.check(model)
        del model.model.layers[2].late
        record.check(model)
        model.model.counts = None
        with pytest.raises(FrozenTensorError, match=r"1 of .*: model\.counts"):
            record.check(model)


class TestAsFound:
    def test_gives_flags_modes_hooks_and_settings_back_though_it_raised(self):
        model = tiny("llama").eval()
        kept = model.model.norm.register_forward_hook(lambda *_: None)
        model.lm_head.weight.requires_grad_(False)

        def seen():
            flags = [p.requires_grad for p in model.parameters()]
            modes = [module.training for module in model.modules()]
            hooks = [list(module._forward_hooks) for module in model.modules()]
            own = [sorted(vars(module)) for module in model.modules()]
            return flags, modes, hooks, own, model.config.to_dict()

        def change_everything():
            model.train().requires_grad_(True)
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            model.model.norm.register_forward_hook(lambda *_: None)
            model.forward = model.model.forward
            model.config.use_cache = False
            assert all(a != b for a, b in zip(seen(), before, strict=True))
            raise KeyError

        before = seen()
        with pytest.raises(KeyError), as_found(model):
            change_everything()
        assert seen() == before
        assert not model.is_gradient_checkpointing
        kept.remove()
        assert not model.model.norm._forward_hooks

    def test_brings_tensors_back_that_were_moved_or_cast(self):
        model = tiny("llama")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with as_found(model):
            model.double()
            with torch.no_grad():
                model.model.norm.weight.fill_(3)
        tensors = [*model.parameters(), *model.buffers()]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
        after = model.state_dict()
        assert (after.pop("model.norm.weight") == 3).all()
        assert_close(after, {n: before[n] for n in after}, rtol=0, atol=0)

    def test_gives_buffers_back_that_modules_write_or_replace(self):
        torch.manual_seed(0)  # some weights leave spectral norm's vectors where they are
        model = nn.Sequential(
            spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Embedding(2, 2)
        ).train()
        model.register_buffer("scale", torch.ones(3), persistent=False)
        found = dict(model.named_buffers())
        before = {name: buffer.clone() for name, buffer in found.items()}
        with as_found(model):
            model[:2](torch.randn(3, 4))
            model.scale = torch.zeros(5)
            model.register_buffer("other", torch.ones(1))
            assert len(before) == 6
            now = dict(model.named_buffers())
            assert not any(torch.equal(now[name], before[name]) for name in before)
        assert all(now is found[name] for name, now in model.named_buffers())
        assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)

    def test_gives_gradients_back(self):
        model, given = tiny("llama"), torch.ones(16)
        model.model.norm.weight.grad = given
        with as_found(model):
            model.zero_grad()
            model.model.layers[0].mlp.down_proj.weight.grad = torch.zeros(16, 32)
        assert model.model.norm.weight.grad is given
        assert model.model.layers[0].mlp.down_proj.weight.grad is None

    def test_takes_several_models(self):
        models = [tiny("llama"), tiny("gpt2")]
        with as_found(*models):
            for model in models:
                model.requires_grad_(False)
        assert all(p.requires_grad for model in models for p in model.parameters())


class TestParametersByLayer:
    def test_holds_the_trained_tensors_of_each_layer(self):
        model = tiny("llama", 4)
        grouped = TrainedLayers(model, select_layers(model, [3, 1], modules="mlp.*")).by_layer
        assert list(grouped) == [1, 3]
        for layer, parameters in grouped.items():
            mlp = model.model.layers[layer].mlp
            expected = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
            assert [id(p) for p in parameters] == [id(p) for p in expected]


def decay_groups(model: nn.Module, selection, *, weight_decay: float = 0.1) -> list[dict]:
    """As transformers' Trainer makes them: matrices decay, norms do not."""
    trained = selection.parameters(model).values()
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class TestScaleLearningRates:
    def test_splits_groups_by_scale_and_keeps_their_options(self):
        model = tiny("llama", 4)
        selection = select_layers(model, "full", boost={1: 2.0, 2: 0.5, 3: 2.0})
        optimizer = torch.optim.AdamW(decay_groups(model, selection), lr=1e-3, betas=(0.8, 0.9))
        groups = optimizer.param_groups
        scale_learning_rates(optimizer, TrainedLayers(model, selection))
        assert optimizer.param_groups is groups
        # A block has 7 matrices and 2 norms; outside are embedding, head and the final norm.
        found = [(g["weight_decay"], g["lr"], len(g["params"])) for g in groups]
        assert found == [
            (0.1, 1e-3, 7 + 2),
            (0.1, 0.5e-3, 7),
            (0.1, 2e-3, 14),
            (0.0, 1e-3, 2 + 1),
            (0.0, 0.5e-3, 2),
            (0.0, 2e-3, 4),
        ]
        assert all(group["betas"] == (0.8, 0.9) for group in groups)
        lr_of = {id(p): group["lr"] for group in groups for p in group["params"]}
        scales = [1.0, 2.0, 0.5, 2.0]
        for layer, scale in enumerate(scales):
            assert {lr_of[id(p)] for p in model.model.layers[layer].parameters()} == {1e-3 * scale}

    def test_keeps_every_tensor_exactly_once(self):
        model = tiny("llama", 3)
        selection = select_layers(model, [0, 2], boost={2: 3.0})
        optimizer = torch.optim.SGD(decay_groups(model, selection), lr=1e-3)
        scale_learning_rates(optimizer, TrainedLayers(model, selection))
        counts = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
        assert set(counts) == {id(p) for p in selection.parameters(model).values()}
        assert set(counts.values()) == {1}

    def test_changes_nothing_without_boost(self):
        model = tiny("llama", 2)
        selection = select_layers(model, "all", boost={0: 1.0})
        optimizer = torch.optim.SGD(decay_groups(model, selection), lr=1e-3)
        before = list(optimizer.param_groups)
        scale_learning_rates(optimizer, TrainedLayers(model, selection))
        assert all(a is b for a, b in zip(optimizer.param_groups, before, strict=True))

    def test_does_not_need_a_learning_rate_without_boost(self):
        model = tiny("llama", 2)
        selection = select_layers(model, 1)
        optimizer = Adafactor(decay_groups(model, selection))
        assert optimizer.param_groups[0]["lr"] is None
        scale_learning_rates(optimizer, TrainedLayers(model, selection))
        assert len(optimizer.param_groups) == 2

    def test_refuses_an_optimizer_without_learning_rate_and_leaves_it_alone(self):
        model = tiny("llama", 2)
        selection = select_layers(model, 1, boost={1: 2.5})
        optimizer = Adafactor(decay_groups(model, selection))
        with pytest.raises(SelectionError, match=r"Adafactor .*lr=None.*\{2\.5\}"):
            scale_learning_rates(optimizer, TrainedLayers(model, selection))
        assert [len(group["params"]) for group in optimizer.param_groups] == [7, 2]

    def test_schedulers_see_the_scaled_rates_as_their_base(self):
        model = tiny("llama", 3)
        selection = select_layers(model, [1, 2], boost={2: 4.0})
        optimizer = torch.optim.SGD(decay_groups(model, selection), lr=1e-3)
        scale_learning_rates(optimizer, TrainedLayers(model, selection))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        assert scheduler.base_lrs == [1e-3, 4e-3, 1e-3, 4e-3]
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [0.5e-3, 2e-3, 0.5e-3, 2e-3]

    def test_splits_groups_by_glob_and_part_and_keeps_each_one_s_weight_decay(self):
        model = tiny("llama", 3, tie_word_embeddings=False)
        boost = {1: 4.0, "mlp.*": 0.5, "*norm*": 2.0, "head": 0.5}
        selection = select_layers(model, [1, 2], also=["head", "final_norm"], boost=boost)
        optimizer = torch.optim.SGD(decay_groups(model, selection), lr=1e-3)
        scale_learning_rates(optimizer, TrainedLayers(model, selection))
        names = {id(p): name for name, p in model.named_parameters()}
        found = {
            (group["weight_decay"], group["lr"]): {names[id(p)] for p in group["params"]}
            for group in optimizer.param_groups
        }
        attention = [{n for n in names.values() if f"{k}.self_attn" in n} for k in (1, 2)]
        mlp = {n for n in names.values() if re.search(r"[12]\.mlp", n)}
        assert found == {
            (0.1, 1e-3): attention[1],
            (0.1, 0.5e-3): {*mlp, "lm_head.weight"},
            (0.1, 4e-3): attention[0],
            (0.0, 1e-3): {"model.norm.weight"},
            (0.0, 2e-3): {n for n in names.values() if re.search(r"[12]\..*layernorm", n)},
        }

    @pytest.mark.parametrize(
        ("boost", "rate", "message"),
        [
            ({"mlp": 1e38}, 10.0, r"boost 1e\+38 times the learning rate 10 is 1e\+39"),
            ({1: 1e38}, 1e300, r"boost 1e\+38 times the learning rate 1e\+300 is inf"),
            ({(1, "mlp"): 1e-40}, 1e-6, r"boost 1e-40 times .* 1e-06 is 1e-46, .*or not move"),
            ("decay:1e-30", 1e-20, "boost 1e-30 times"),
        ],
        ids=str,
    )
    def test_refuses_a_rate_that_float32_does_not_hold_and_leaves_the_groups_alone(
        self, boost, rate, message
    ):
        model = tiny("llama", 3)
        selection = select_layers(model, [1, 2], boost=boost)
        optimizer = torch.optim.AdamW(decay_groups(model, selection), lr=rate)
        with pytest.raises(SelectionError, match=message):
            scale_learning_rates(optimizer, TrainedLayers(model, selection))
        assert [len(group["params"]) for group in optimizer.param_groups] == [14, 4]

    def test_takes_a_learning_rate_of_zero_and_one_in_a_tensor(self):
        model = tiny("llama", 2)
        selection = select_layers(model, 1, boost={"mlp": 2.0})
        for rate in (0.0, torch.tensor(1e-3, dtype=torch.float64)):
            optimizer = torch.optim.AdamW(decay_groups(model, selection), lr=rate, foreach=False)
            scale_learning_rates(optimizer, TrainedLayers(model, selection))
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            assert rates == [float(rate), 2 * float(rate), float(rate)]


class TestCheckOptimizer:
    @pytest.fixture
    def model(self):
        return tiny("llama", 3)

    def test_accepts_exactly_the_trained_tensors(self, model):
        selection = select_layers(model, 1)
        check_optimizer(
            torch.optim.SGD(decay_groups(model, selection)), TrainedLayers(model, selection)
        )

    def test_accepts_a_compiled_model(self, model):
        selection = select_layers(model, 1)
        optimizer = torch.optim.SGD(selection.parameters(model).values())
        check_optimizer(optimizer, TrainedLayers(torch.compile(model), selection))

    def test_refuses_a_frozen_tensor(self, model):
        message = r"SGD holds frozen 'lm_head\.weight' \(0 missing, 21 too many; layer 1 of 3 "
        with pytest.raises(SelectionError, match=message):
            check_optimizer(
                torch.optim.SGD(model.parameters()), TrainedLayers(model, select_layers(model, 1))
            )

    def test_refuses_to_miss_a_trained_tensor(self, model):
        selection = select_layers(model, [1, 2])
        optimizer = torch.optim.SGD(model.model.layers[2].parameters())
        message = r"SGD misses trained 'model\.layers\.1\.self_attn\.q_proj\.weight' \(9 missing"
        with pytest.raises(SelectionError, match=message):
            check_optimizer(optimizer, TrainedLayers(model, selection))

    def test_refuses_a_tensor_of_no_model(self, model):
        selection = select_layers(model, 1)
        stray = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([*selection.parameters(model).values(), stray])
        with pytest.raises(SelectionError, match=r"'a tensor of no parameter' \(0 missing, 1 too"):
            check_optimizer(optimizer, TrainedLayers(model, selection))


class TestNorm:
    def test_is_the_root_of_the_sum_of_squares_of_all_elements(self):
        tensors = [torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor(12.0)]
        assert norm(tensors).item() == 13.0  # 1 + 4 + 4 + 16 + 144 = 169

    def test_of_nothing_is_zero(self):
        assert norm(iter(())).item() == 0.0
        assert norm([torch.zeros(0)]).item() == 0.0

    def test_does_not_round_to_the_dtype_of_the_tensors(self):
        found = norm([torch.ones(1001, dtype=torch.bfloat16)])
        assert found.dtype == torch.float32
        assert_close(found.item(), 1001**0.5, rtol=1e-6, atol=0)

    def test_does_not_track_gradients(self):
        assert not norm([nn.Parameter(torch.ones(2))]).requires_grad
