"""Base and trained model in one, in memory: deltas left out for a while, taken out, switched."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from layerrl import LayerSelection, load_delta, merge_delta, save_delta, select_layers
from layerrl.delta import DeltaBase, Deltas, disabled, fitting, unload_delta
from layerrl.delta.placing import put_values
from layerrl.errors import DeltaError
from layerrl.frozen import fingerprints
from tests.devices import on_any_device
from tests.grpo import make
from tests.models import tiny
from tests.runs import bits, load, train

pytestmark = [on_any_device, pytest.mark.usefixtures("made_on_device")]

State = dict[str, Tensor]
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def trained(model: nn.Module, layers: object, path: Path, seed: int = 1, **options) -> State:
    """Change the selected layers of a model, save the delta; what the model holds then."""
    selection = select_layers(model, layers, **options)
    base = DeltaBase.of(model, selection)
    change(model, selection, seed)
    save_delta(model, path, selection=selection, base=base)
    return bits(model)


def change(model: nn.Module, selection: LayerSelection, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in selection.parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.add_(noise.to(parameter))


def assert_same(model: nn.Module, expected: State) -> None:
    assert_close(bits(model), expected, rtol=0, atol=0)


def objects(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    """What an optimizer, a compiled graph or a mask knows parameters by."""
    named = model.named_parameters()
    return {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in named}


@contextmanager
def refused(*messages: str, model: nn.Module | None = None) -> Iterator[None]:
    before = bits(model) if model is not None else {}
    with pytest.raises(DeltaError) as error:
        yield
    for message in messages:
        assert message in str(error.value)
    if model is not None:
        assert_same(model, before)


def enter(model: nn.Module) -> None:
    with disabled(model):
        pass


class Made:
    """Deltas of a tiny Llama: `a`, `b` of layer 1, `c` of layer 2, stages `one` to `three`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = bits(self.model())
        self.model().save_pretrained(folder / "base")
        self.after = {
            name: trained(self.model(), layer, folder / name, seed)
            for name, layer, seed in (("a", 1, 1), ("b", 1, 2), ("c", 2, 3))
        }
        model = self.model()
        for seed, (name, layer) in enumerate({"one": 1, "two": 2, "three": 1}.items(), start=4):
            self.after[name] = trained(model, layer, folder / name, seed)

    @staticmethod
    def model() -> PreTrainedModel:
        return tiny("llama", 6)

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def model(made) -> PreTrainedModel:
    """With delta `a` in it."""
    model = made.model()
    load_delta(model, made["a"])
    return model


def ids() -> Tensor:
    return torch.arange(4, 20).view(2, 8)


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=ids(), labels=ids()).loss


class TestDisabled:
    def test_is_the_base_inside_and_trained_afterwards(self, made, model):
        model.requires_grad_(False).lm_head.requires_grad_(True)
        model.train()
        before = objects(model)
        for _ in range(3):
            with disabled(model):
                assert_same(model, made.base)
                assert objects(model) == before
                assert model.training
            assert_same(model, made.after["a"])
        assert objects(model) == before

    def test_nested(self, made, model):
        with disabled(model):
            with disabled(model):
                assert_same(model, made.base)
            assert_same(model, made.base)
        assert_same(model, made.after["a"])

    def test_after_an_exception(self, made, model):
        with pytest.raises(KeyError), disabled(model):
            raise KeyError
        assert_same(model, made.after["a"])
        enter(model)
        assert_same(model, made.after["a"])

    def test_keeps_what_was_trained_since_it_was_loaded(self, made, model):
        change(model, select_layers(model, 1), seed=9)
        expected = bits(model)
        with disabled(model):
            assert_same(model, made.base)
        assert_same(model, expected)
        unload_delta(model)
        assert_same(model, made.base)

    def test_a_loss_from_before_is_differentiated_after_it(self, model):
        loss_of(model).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        loss = loss_of(model)
        with torch.no_grad(), disabled(model):
            assert loss_of(model) != loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        assert_close(found, expected, rtol=0, atol=0)

    def test_a_loss_from_inside_is_not_differentiated_at_other_weights(self, made, model):
        with disabled(model):
            loss_of(model).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        base = made.model()
        loss_of(base).backward()
        expected = {name: p.grad for name, p in base.named_parameters()}
        assert_close(found, expected, rtol=0, atol=0)
        with disabled(model):
            loss = loss_of(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_into_a_model_made_in_inference_mode(self, made):
        with torch.inference_mode():
            model = made.model()
            load_delta(model, made["a"])
        with pytest.raises(DeltaError, match=r"made or loaded inside torch\.inference_mode"):
            load_delta(model, made["b"])

    def test_inside_autocast_and_inference_mode(self, made, model):
        base = made.model()
        device = model.device.type
        for mode in (torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16)):
            with mode:
                before = model(input_ids=ids()).logits
                with disabled(model):
                    inside = model(input_ids=ids()).logits
                assert_close(inside, base(input_ids=ids()).logits, rtol=0, atol=0)
                assert_close(model(input_ids=ids()).logits, before, rtol=0, atol=0)
        loss_of(model).backward()

    def test_of_a_compiled_model(self, made):
        model = made.model()
        compiled = torch.compile(model, backend="eager")
        load_delta(compiled, made["a"])
        with torch.no_grad():
            loss_of(compiled)
            with disabled(compiled):
                found = loss_of(compiled)
            assert_close(found, loss_of(made.model()), rtol=0, atol=0)
        assert_same(model, made.after["a"])

    def test_of_a_model_that_peft_has_wrapped_since(self, made, model):
        wrapped = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
        with torch.no_grad(), disabled(wrapped):
            assert_close(loss_of(wrapped), loss_of(made.model()), rtol=0, atol=0)
        again = get_peft_model(made.model(), LoraConfig(target_modules=["down_proj"]))
        with refused("Load it before PEFT's adapters are added"):
            load_delta(again, made["a"])

    def test_blocks_that_do_not_end_in_their_order(self, made, model):
        """Of two threads, or of a generator that is left open."""
        first, second = disabled(model), disabled(model)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert_same(model, made.base)
        with refused("are disabled"):
            unload_delta(model)
        second.__exit__(None, None, None)
        assert_same(model, made.after["a"])

    def test_what_was_written_inside_is_lost_with_a_warning(self, made, model):
        with pytest.warns(UserWarning, match="written to inside `with disabled"), disabled(model):
            change(model, select_layers(model, 1))
        assert_same(model, made.after["a"])

    def test_nothing_is_saved_inside(self, made, model, tmp_path):
        selection = select_layers(model, 1)
        base = DeltaBase.of(made.model(), selection)
        with refused("are disabled"), disabled(model):
            save_delta(model, tmp_path / "delta", selection=selection, base=base)

    def test_adapters_that_are_merged_are_not_lost(self, made, model):
        adapters = LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
        wrapped = get_peft_model(model, adapters)
        wrapped.merge_adapter()
        for act in (enter, unload_delta):
            with refused("adapters are merged into", "down_proj.weight", model=wrapped):
                act(wrapped)
        wrapped.unmerge_adapter()
        unload_delta(wrapped)
        assert_close(wrapped.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight,
                     made.base[WEIGHT], rtol=0, atol=0)  # fmt: skip

    def test_of_experts_that_two_adapters_wrap(self, tmp_path):
        model = tiny("qwen3_moe")
        base = bits(model)
        trained(tiny("qwen3_moe"), 1, tmp_path / "delta")
        load_delta(model, tmp_path / "delta", keep_base=True)
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        wrapped = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=experts))
        unload_delta(wrapped)
        assert_same(wrapped.unload(), base)


FAMILIES = ["gpt2", "qwen3_moe", "gpt_oss", "gemma3", "qwen2_5_vl"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"also": ("embeddings", "head")}),
        ("llama", {"also": "final_norm"}),
    ],
)
def test_every_family_is_its_base_again(tmp_path, family, options):
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    live, model = tiny(family, **tied), tiny(family, **tied)
    base = bits(model)
    after = trained(live, 1, tmp_path / "delta", **options)
    load_delta(model, tmp_path / "delta", keep_base=True)
    assert_same(model, after)
    with disabled(model):
        assert_same(model, base)
        if tied:
            assert model.lm_head.weight is model.model.embed_tokens.weight
    unload_delta(model)
    assert_same(model, base)
    deltas = Deltas(model, {"it": tmp_path / "delta"})
    for name, expected in (("it", after), (None, base)):
        deltas.use(name)
        assert_same(model, expected)


class TestKept:
    def test_bytes_are_those_of_the_delta_and_go_with_the_model(self, made, model):
        unloaded = made.model()
        layer = sum(p.nbytes for p in select_layers(model, 1).parameters(model).values())
        assert held(model) - held(unloaded) == layer
        own = made.model()
        load_delta(own, made["a"])
        Deltas(unloaded, {"a": made["a"]})
        gone, other = weakref.ref(own), weakref.ref(unloaded)
        del own, unloaded
        gc.collect()
        assert gone() is other() is None

    def test_by_itself_up_to_half_of_the_model(self, tmp_path):
        trained(tiny("llama"), "full", tmp_path / "full")
        model = tiny("llama")
        load_delta(model, tmp_path / "full")
        for act in (enter, unload_delta):
            with refused("replaced in this LlamaForCausalLM was not kept", "keep_base=True"):
                act(model)
        model, base = tiny("llama"), bits(tiny("llama"))
        load_delta(model, tmp_path / "full", keep_base=True)
        unload_delta(model)
        assert_same(model, base)

    def test_not_on_request(self, made):
        model = made.model()
        load_delta(model, made["one"], keep_base=False)
        assert held(model) == held(made.model())
        with refused("was not kept", str(made["one"])):
            enter(model)
        with refused("was not kept", str(made["one"]), model=model):
            load_delta(model, made["two"], keep_base=True)
        load_delta(model, made["two"])
        with refused("was not kept", str(made["two"])):
            enter(model)

    def test_is_not_in_copies_nor_files(self, made, model, tmp_path):
        twin = copy.deepcopy(model)
        assert_same(twin, made.after["a"])
        assert len(pickle.dumps(model)) < 1.05 * len(pickle.dumps(made.model()))
        model.save_pretrained(tmp_path / "saved")
        assert_same(load(tmp_path / "saved"), made.after["a"])
        with refused("no delta is loaded in this LlamaForCausalLM", "no copy of it"):
            enter(twin)

    def test_follows_the_model_to_another_dtype(self, made, model):
        model.to(torch.bfloat16)
        rounded = {name: tensor.bfloat16() for name, tensor in made.base.items()}
        with disabled(model):
            assert_same(model, rounded)
        model.float()
        with disabled(model):
            assert_same(model, {name: tensor.float() for name, tensor in rounded.items()})
            model.to(torch.bfloat16)
        assert_same(model, {name: tensor.bfloat16() for name, tensor in made.after["a"].items()})

    def test_of_a_bfloat16_base_trained_in_float32(self, made, tmp_path):
        narrow = made.model().to(torch.bfloat16)
        trained(copy.deepcopy(narrow).float(), 1, tmp_path / "delta")
        base = bits(narrow)
        load_delta(narrow, tmp_path / "delta")
        narrow.float()
        with disabled(narrow):
            assert_same(narrow, {name: tensor.float() for name, tensor in base.items()})

    def test_weights_put_back_by_hand_are_the_base_again(self, made, model):
        model.load_state_dict(made.base)
        load_delta(model, made["b"])
        unload_delta(model)
        assert_same(model, made.base)

    def test_another_base_in_the_same_model(self, made, model, tmp_path):
        other = tiny("llama", 6, seed=3)
        base = bits(other)
        trained(other, 1, tmp_path / "delta")
        model.load_state_dict(base)
        load_delta(model, tmp_path / "delta")
        unload_delta(model)
        assert_same(model, base)
        load_delta(model, tmp_path / "delta", keep_base=False)
        model.load_state_dict(made.base)
        Deltas(model, {"a": made["a"]}).use("a")
        assert_same(model, made.after["a"])

    def test_another_base_is_not_given_the_layers_of_the_first(self, made, model):
        deltas = Deltas(switched := made.model(), {"a": made["a"]})
        for changed, acts in (
            (model, (enter, unload_delta)),
            (switched, (enter, unload_delta, lambda _: deltas.use(None))),
        ):
            changed.load_state_dict(bits(tiny("llama", 6, seed=3)))
            for act in acts:
                with refused("has other weights than when the delta", model=changed):
                    act(changed)

    def test_a_refused_delta_leaves_what_is_kept(self, made, model):
        with refused("in this model, and was made from the same base: unload_delta", model=model):
            load_delta(model, made["b"])
        unload_delta(model)
        assert_same(model, made.base)

    def test_model_that_changed_is_refused(self, made, model):
        wide = made.model()
        load_delta(wide, made["a"])
        wide.model.layers[1].mlp.down_proj = nn.Linear(40, 16, bias=False)
        with refused(f"'{WEIGHT}' has shape [16, 40]", "it had [16, 32]", model=wide):
            unload_delta(wide)
        short = made.model()
        load_delta(short, made["c"])
        short.model.layers = short.model.layers[:2]
        with refused("model.layers.2.", "is not in it any more", model=short):
            enter(short)
        model.to("meta")
        for act in (enter, unload_delta):
            with refused("is on the meta device"):
                act(model)


def held(model: nn.Module) -> int:
    """Bytes of a model's parameters and of what is kept beside it."""
    from layerrl.delta.loaded import LOADED

    kept = LOADED.get(model)
    beside = (kept and kept.base) or {}
    return sum(tensor.nbytes for tensor in (*model.parameters(), *beside.values()))


class TestUnload:
    def test_is_the_base_and_can_be_loaded_again(self, made, model):
        before = objects(model)
        unload_delta(model)
        assert_same(model, made.base)
        assert objects(model) == before
        with refused("no delta is loaded in this LlamaForCausalLM"):
            unload_delta(model)
        load_delta(model, made["b"])
        assert_same(model, made.after["b"])

    def test_takes_out_every_stage(self, made):
        model = made.model()
        for name in ("one", "two", "three"):
            load_delta(model, made[name])
            assert_same(model, made.after[name])
        with disabled(model):
            assert_same(model, made.base)
        assert_same(model, made.after["three"])
        unload_delta(model)
        assert_same(model, made.base)

    @pytest.mark.parametrize(
        "act", [unload_delta, enter, lambda model: Deltas(model, {})], ids=["un", "dis", "switch"]
    )
    def test_no_model(self, act):
        with refused("model is 'model', expected "):
            act("model")

    def test_inside_disabled(self, made, model):
        acts: list[Callable[[], object]] = [
            lambda: unload_delta(model),
            lambda: load_delta(model, made["c"]),
            lambda: Deltas(model, {"c": made["c"]}),
        ]
        with disabled(model):
            for act in acts:
                with refused("are disabled: leave the `with disabled(model)` block", model=model):
                    act()
        assert_same(model, made.after["a"])


class TestSeveral:
    """In memory as on disk: the same models, the same refusals."""

    @pytest.mark.parametrize(
        ("names", "union"), [(["one", "two", "three"], False), (["a", "c"], True), (["c"], True)]
    )
    def test_loaded_is_what_is_merged(self, made, tmp_path, names, union):
        paths = [made[name] for name in names]
        model = made.model()
        last = load_delta(model, paths, union=union)
        assert last == select_layers(model, 2 if union else 1)
        merged = merge_delta(made["base"], paths, tmp_path / "merged", union=union)
        assert_same(load(merged), bits(model))
        unload_delta(model)
        assert_same(model, made.base)

    def test_a_generator_of_paths(self, made):
        model = made.model()
        nowhere = dict.fromkeys(["one", "two"]).values()
        load_delta(model, (str(made[name]) for name in ("one", "two")), revision=nowhere)
        assert_same(model, made.after["two"])

    def test_unrounded_stages_of_a_bfloat16_base(self, made, tmp_path):
        narrow = made.model().to(torch.bfloat16)
        narrow.save_pretrained(tmp_path / "base")
        live = load(tmp_path / "base")
        trained(live, 1, tmp_path / "one")
        trained(live, 2, tmp_path / "two")
        pair = [tmp_path / "one", tmp_path / "two"]
        load_delta(narrow, pair)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = merge_delta(tmp_path / "base", pair, tmp_path / "merged")
        assert_same(load(merged, torch.bfloat16), bits(narrow))

    def test_what_its_dtype_cannot_hold_is_said_as_merging_says_it(self, made, tmp_path):
        made.model().half().save_pretrained(tmp_path / "base")
        for folder, value in (("lost", 1e-7), ("infinite", 1e6)):
            live = load(tmp_path / "base")
            selection = select_layers(live, 1)
            base = DeltaBase.of(live, selection)
            with torch.no_grad():
                live.model.layers[1].mlp.down_proj.weight[0, 0].add_(value)
            save_delta(live, tmp_path / folder, selection=selection, base=base)
        for put in (
            lambda folder: merge_delta(tmp_path / "base", folder, tmp_path / f"{folder.name} out"),
            lambda folder: load_delta(load(tmp_path / "base", torch.float16), folder),
            lambda folder: Deltas(load(tmp_path / "base", torch.float16), {"it": folder}),
        ):
            with pytest.warns(UserWarning, match="changed by less than the base's dtype can hold"):
                put(tmp_path / "lost")
            with refused("1 trained elements are too large for the base's dtype", "float32"):
                put(tmp_path / "infinite")

    @pytest.mark.parametrize(
        ("names", "union", "messages"),
        [
            (["a", "b"], True, ["is replaced by both", "(9 tensors)", "Deltas(model"]),
            (["a", "b"], False, ["side by side, from the same base: union=True"]),
            (["a", "c"], False, ["side by side, from the same base: union=True"]),
            (["two", "one"], False, ["was made on top of the one at", "give that first"]),
            (["one", "two"], True, ["was made on top of the one at", "without union=True"]),
            (["one", "three"], False, ["A stage between", "is missing"]),
            (["a", "a"], False, ["is already in this model"]),
            ([], False, ["no delta was given"]),
        ],
    )
    def test_are_refused_with_the_same_sentences(self, made, tmp_path, names, union, messages):
        paths = [made[name] for name in names]
        model = made.model()
        with refused(*messages, model=model) as _:
            load_delta(model, paths, union=union)
        with refused(*messages):
            merge_delta(made["base"], paths, tmp_path / "merged", union=union)

    @pytest.mark.parametrize(
        "path", [None, 3, {"a": "out/a"}, [None], {"out/a"}, frozenset({"out/b"})], ids=str
    )
    def test_no_path(self, made, path, tmp_path):
        for act in (
            lambda: load_delta(made.model(), path),
            lambda: merge_delta(made["base"], path, tmp_path / "out"),
        ):
            with refused("expected a delta's folder or 'user/name' on the hub, or a list"):
                act()

    @pytest.mark.parametrize("keep", ["no", 2, []], ids=str)
    def test_no_answer_whether_to_keep_the_base(self, made, keep):
        model = made.model()
        with refused(f"keep_base is {keep!r}, expected True, False or None", model=model):
            load_delta(model, made["a"], keep_base=keep)


def interrupted(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Do something that is interrupted at the fifth tensor that it writes."""
    number = itertools.count(1)

    def interrupt(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        if next(number) == 5:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr("layerrl.delta.placing.sharded_like", interrupt)
    with pytest.raises(KeyboardInterrupt):
        act()
    monkeypatch.undo()
    assert next(number) > 5


def test_an_interrupted_load_leaves_the_model_as_it_was(made, monkeypatch):
    model = made.model()
    interrupted(monkeypatch, lambda: load_delta(model, made["one"], keep_base=True))
    assert_same(model, made.base)
    load_delta(model, made["one"], keep_base=True)
    interrupted(monkeypatch, lambda: load_delta(model, made["two"], keep_base=True))
    assert_same(model, made.after["one"])
    unload_delta(model)
    assert_same(model, made.base)


class TestDeltas:
    @pytest.fixture
    def switch(self, made) -> tuple[PreTrainedModel, Deltas]:
        model = made.model()
        stages = [made[name] for name in ("one", "two", "three")]
        paths = {"a": made["a"], "b": str(made["b"]), "c": made["c"], "stages": stages}
        return model, Deltas(model, paths)

    def test_base_is_the_base_after_1000_switches(self, made, switch):
        model, deltas = switch
        before = objects(model)
        names = ["a", "b", "stages", "c", None]
        for count in range(1000):
            name = names[(count * 7 + count // 5) % 5]
            deltas.use(name)
            if count % 97 == 0:
                expected = made.after.get("three" if name == "stages" else name, made.base)
                assert_same(model, expected)
                with disabled(model):
                    assert_same(model, made.base)
                assert_same(model, expected)
        deltas.use(None)
        assert_same(model, made.base)
        assert objects(model) == before

    def test_reads_the_base_once_for_all_of_them(self, made, monkeypatch):
        num_elements = []

        def counted(tensors: dict[str, Tensor]) -> dict[str, str]:
            num_elements.extend(tensor.numel() for tensor in tensors.values())
            return fingerprints(tensors)

        monkeypatch.setattr(fitting, "fingerprints", counted)
        for paths in ([made["a"]], [made["a"], made["b"], made["c"]]):
            num_elements.clear()
            Deltas(model := made.model(), {path.name: path for path in paths})
            assert sum(num_elements) == sum(tensor.numel() for tensor in bits(model).values())

    def test_copies_only_the_tensors_of_both(self, switch):
        model, deltas = switch
        deltas.use("a")
        versions = {name: p._version for name, p in model.named_parameters()}
        deltas.use("b")
        written = {n for n, p in model.named_parameters() if p._version != versions[n]}
        assert written == {*select_layers(model, 1).parameters(model)}

    def test_writes_in_one_order_in_every_process(self, switch, monkeypatch):
        """What is sharded is sent tensor by tensor."""
        written: list[list[str]] = []

        def noted(model: nn.Module, values: State) -> None:
            written.append([*values])
            put_values(model, values)

        monkeypatch.setattr("layerrl.delta.switching.put_values", noted)
        for name in ("a", "c", "a"):
            switch[1].use(name)
        assert written[1][:9] == written[0]
        assert written[2] == written[1][9:] + written[0]

    def test_an_interrupted_switch_leaves_the_model_as_it_was(self, made, switch, monkeypatch):
        model, deltas = switch
        for before, after in ((None, "a"), ("a", "c"), ("stages", None)):
            deltas.use(before)
            expected = bits(model)
            interrupted(monkeypatch, lambda after=after: deltas.use(after))
            assert_same(model, expected)
            assert deltas.current == before

    def test_says_what_is_in_use(self, switch):
        _, deltas = switch
        assert deltas.current is None
        deltas.use("b")
        assert deltas.current == "b"
        assert repr(deltas) == "Deltas('a', 'b', 'c', 'stages'; in use: 'b')"
        with refused("no delta 'd' here, expected 'a', 'b', 'c', 'stages', or None for the base"):
            deltas.use("d")
        with refused("no delta ['a'] here"):
            deltas.use(["a"])

    def test_unload_delta_ends_it(self, made, switch):
        model, deltas = switch
        deltas.use("a")
        unload_delta(model)
        assert_same(model, made.base)
        with refused("unload_delta took these deltas out", model=model):
            deltas.use("a")
        load_delta(model, made["a"])
        assert_same(model, made.after["a"])

    def test_nothing_else_is_loaded_beside_it(self, made, switch):
        model, deltas = switch
        for act in (
            lambda: load_delta(model, made["a"]),
            lambda: Deltas(model, {"a": made["a"]}),
        ):
            with refused("a Deltas switches the deltas of this", "unload_delta(model)"):
                act()
        with disabled(model), refused("are disabled", model=model):
            deltas.use("a")

    @pytest.mark.parametrize(
        "paths", [{}, ["out/a"], "out/a", None, {None: "out/a"}], ids=["no", "list", "str", "", "0"]
    )
    def test_names_are_needed(self, made, paths):
        with refused('expected a name for each delta: {"a": "out/a", "b": "out/b"}'):
            Deltas(made.model(), paths)

    def test_a_delta_of_another_base(self, made, tmp_path, model):
        trained(tiny("llama", 6, seed=3), 1, tmp_path / "other")
        fresh = made.model()
        with refused("is not the tensor that the delta at", model=fresh):
            Deltas(fresh, {"a": made["a"], "other": tmp_path / "other"})
        with refused("two was made on top of the one at", "one: give that first", model=fresh):
            Deltas(fresh, {"one": made["one"], "two": made["two"]})
        with refused("expected the base alone: unload_delta(model) first", model=model):
            Deltas(model, {"b": made["b"]})
        with refused("no delta is loaded"):
            enter(fresh)


class TestTraining:
    def test_on_a_loaded_delta_records_the_model_with_it(self, made, model, tmp_path):
        trainer = make(model, tmp_path / "run", selection=3, max_steps=2)
        optimized = objects(model)
        train(trainer)
        trainer.save_delta(tmp_path / "next")
        after = bits(model)
        with disabled(model):
            now = bits(model)
            assert {name for name in now if not torch.equal(now[name], after[name])} == {
                *select_layers(model, 1).parameters(model)
            }
        assert_same(model, after)
        assert {n: o[:2] for n, o in objects(model).items()} == {
            n: o[:2] for n, o in optimized.items()
        }
        fresh = made.model()
        load_delta(fresh, [made["a"], tmp_path / "next"])
        assert_same(fresh, after)

    def test_goes_on_as_if_the_base_had_not_been_looked_at(self, made, tmp_path):
        runs = []
        for look in (False, True):
            model = made.model()
            load_delta(model, made["a"])

            def reward(completions, model=model, look=look, **_):
                if look:
                    with torch.no_grad(), disabled(model):
                        loss_of(model)
                return [float(len(text) % 5) for text in completions]

            options = {"selection": 1, "max_steps": 2, "arguments": {"reward_funcs": reward}}
            trainer = make(model, tmp_path / f"run {look}", **options)
            train(trainer)
            runs.append(bits(model))
        assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_a_warning_is_of_the_line_that_loads(made, tmp_path):
    """A delta of format version 1 warns of what it cannot check."""
    from tests.unit.test_delta_base import VERSION_1, TestVersion1

    for act in (lambda m: load_delta(m, VERSION_1), lambda m: Deltas(m, {"old": VERSION_1})):
        with pytest.warns(match="format version 1") as caught:
            act(TestVersion1.counted())
        assert {Path(warning.filename).name for warning in caught} == {"test_loaded.py"}
