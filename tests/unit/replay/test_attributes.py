"""Settings are seen wherever a frozen layer has them, and what a comparison changes is put back."""

import functools
import itertools
import random
import re
import threading
import weakref
from abc import ABC
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from tests.devices import on_any_device
from tests.models import tiny
from tests.replays import FIRST, Pair, call, ids, warnings

pytestmark = [on_any_device, pytest.mark.usefixtures("made_on_device")]

GLOBAL = {"scale": 1.0}


T = TypeVar("T")


@dataclass
class Params:
    scale: float = 1.0
    inner: Any = None


@dataclass(slots=True)
class Slots:
    scale: float = 1.0


class Typed(ABC, Generic[T]):
    """With what Python notes on a class."""

    __slots__ = ("empty",)
    pattern = re.compile("a")


class Listed(list):
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Cyclic:
    def __init__(self, scale: float) -> None:
        self.scale, self.me, self.all = scale, self, [self]


class Number(float):
    pass


class Scaled(nn.Module):
    """Multiplies with what `read` makes of the attribute `name`."""

    def __init__(self, name: str, read: Any) -> None:
        super().__init__()
        self.name, self.read = name, read

    def forward(self, x: Any) -> Any:
        return x * float(self.read(getattr(self, self.name)))


def same(value: Any) -> Any:
    return value


def first(value: Any) -> Any:
    return next(iter(value))


def scale(value: Any) -> Any:
    return value.scale


SETTINGS = {
    "float": (float, same),
    "float's subclass": (Number, same),
    "numpy's number": (np.float32, same),
    "Decimal": (lambda s: Decimal(str(s)), same),
    "array": (np.array, same),
    "array of objects": (lambda s: np.array([Params(s)], dtype=object), lambda v: v[0].scale),
    "tensor": (torch.tensor, same),
    "dataclass": (Params, scale),
    "dataclass inside": (lambda s: Params(1.0, Params(s)), lambda v: v.inner.scale),
    "slots": (Slots, scale),
    "namespace": (lambda s: SimpleNamespace(scale=s), scale),
    "cycle": (Cyclic, scale),
    "list": (lambda s: [s], first),
    "attribute of a list": (lambda s: Listed(s), scale),
    "deque": (lambda s: deque([s]), first),
    "set": (lambda s: {s}, first),
    "dict of objects": (lambda s: {"a": [Slots(s)]}, lambda v: v["a"][0].scale),
    "ordered dict": (lambda s: OrderedDict(a=s), lambda v: v["a"]),
    "text": (str, float),
    "bytes": (lambda s: bytearray(str(s), "ascii"), lambda v: v.decode()),
    "module in a list": (lambda s: [nn.Threshold(s, 0.0)], lambda v: v[0].threshold),
    "function": (lambda s: lambda: s, lambda v: v()),
    "partial": (lambda s: functools.partial(float, s), lambda v: v()),
    "bound method": (lambda s: {"a": s}.get, lambda v: v("a")),
}


def put(model: Any, name: str, value: Any) -> None:
    setattr(model.model.layers[0].mlp, name, value)


class TestSettings:
    @pytest.mark.parametrize("kind", SETTINGS)
    @pytest.mark.parametrize("name", ["scale", "_scale"])
    def test_of_any_kind_are_seen(self, kind, name):
        make, read = SETTINGS[kind]
        model = tiny("llama", 4, initializer_range=0.3).eval()
        model.model.layers[0].mlp = Scaled(name, read)
        put(model, name, make(1.0))
        pair = Pair(model)
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            for value in (0.5, 0.3, 0.1):
                pair.both(lambda model, value=value: put(model, name, make(value)))
                assert pair.replays(call(), call()) == [0, 1]

    @pytest.mark.parametrize(
        "name",
        ["output_scale", "applied_scale", "ds_scale", "use_cache", "gradient_checkpointing",
         "output_attentions"],
    )  # fmt: skip
    def test_of_any_name_are_seen(self, name):
        model = tiny("llama", 4, initializer_range=0.3).eval()
        model.model.layers[0].mlp = Scaled(name, same)
        put(model, name, 1.0)
        pair = Pair(model)
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(lambda model: put(model, name, 0.5))
            assert pair.replays(call(), call()) == [0, 1]

    @pytest.mark.parametrize("kind", ["dataclass", "slots", "cycle", "list", "array", "tensor",
                                      "dict of objects"])  # fmt: skip
    def test_changed_in_place_are_seen(self, kind):
        make, read = SETTINGS[kind]
        model = tiny("llama", 4, initializer_range=0.3).eval()
        model.model.layers[0].mlp = Scaled("scale", read)
        put(model, "scale", make(1.0))

        def halve(model: Any) -> None:
            value: Any = model.model.layers[0].mlp.scale
            value = value["a"] if isinstance(value, dict) else value
            value = value[0] if isinstance(value, list) and kind != "list" else value
            if kind == "list":
                value[0] *= 0.5
            elif kind in ("array", "tensor"):
                value *= 0.5
            else:
                value.scale *= 0.5

        pair = Pair(model)
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(halve)
            assert pair.replays(call(), call()) == [0, 1]


class Callable:
    def __init__(self, forward: Any) -> None:
        self.forward, self.scale = forward, 1.0

    def __call__(self, x: Any) -> Any:
        return self.forward(x) * self.scale

    def method(self, x: Any) -> Any:
        return self.forward(x) * self.scale


def patched(how: str, own: Any) -> tuple[Any, Any]:
    """A forward in place of a module's own, and what sets its scale."""
    held, value = {"scale": 1.0}, 1.0

    def closing(x: Any) -> Any:
        return own(x) * held["scale"]

    def nonlocal_(x: Any) -> Any:
        return own(x) * value

    def set_nonlocal(new: float) -> None:
        nonlocal value
        value = new

    def of_default(x: Any, held: Any = held) -> Any:
        return own(x) * held["scale"]

    def of_keyword(x: Any, *, held: Any = held) -> Any:
        return own(x) * held["scale"]

    def of_attribute(x: Any) -> Any:
        return own(x) * vars(of_attribute)["scale"]

    vars(of_attribute)["scale"] = 1.0

    def of_global(x: Any) -> Any:
        return own(x) * GLOBAL["scale"]

    def given(held: Any, x: Any) -> Any:
        return own(x) * held["scale"]

    set_held = functools.partial(held.__setitem__, "scale")
    made = Callable(own)
    return {
        "closure": (closing, set_held),
        "wrapped": (functools.wraps(own)(closing), set_held),
        "no_grad": (torch.no_grad()(closing), set_held),
        "lambda around": (lambda x: closing(x), set_held),
        "nonlocal": (nonlocal_, set_nonlocal),
        "default": (of_default, set_held),
        "keyword": (of_keyword, set_held),
        "attribute": (of_attribute, lambda new: setattr(of_attribute, "scale", new)),
        "global": (of_global, lambda new: GLOBAL.update(scale=new)),
        "partial": (functools.partial(given, held), set_held),
        "object": (made, lambda new: setattr(made, "scale", new)),
        "method": (made.method, lambda new: setattr(made, "scale", new)),
    }[how]


WAYS = ["closure", "wrapped", "no_grad", "lambda around", "nonlocal", "default", "keyword",
        "attribute", "global", "partial", "object", "method"]  # fmt: skip


class TestFunctions:
    @pytest.mark.parametrize("how", WAYS)
    def test_in_place_of_a_forward_have_settings(self, how, monkeypatch):
        monkeypatch.setitem(GLOBAL, "scale", 1.0)
        pair, sets = Pair(tiny("llama", 4, initializer_range=0.3).eval()), []

        def patch(model: Any) -> None:
            mlp = model.model.layers[0].mlp
            mlp.forward, set_scale = patched(how, mlp.forward)
            sets.append(set_scale)

        pair.both(patch)
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            for value in (0.5, 0.3):
                for set_scale in sets:
                    set_scale(value)
                assert pair.replays(call(), call()) == [0, 1]

    def test_that_lie_too_deep_keep_layers_from_being_replayed(self):
        class Deep:
            def __init__(self, next_: Any) -> None:
                self.next = next_

        model = tiny("llama", 4, initializer_range=0.3).eval()
        model.model.layers[0].mlp = Scaled("other", lambda _: 1.0)
        pair = Pair(model)
        for size in (3000, 30000):
            deep: Any = None
            for _ in range(size):
                deep = Deep(deep)
            pair.both(lambda model, deep=deep: put(model, "other", deep))
            with pair.batch():
                assert not any(pair.replays(*[call()] * 3))

    @pytest.mark.parametrize("of", ["attribute", "forward", "known class"])
    def test_and_classes_have(self, of, monkeypatch):
        class Own(nn.Module):
            scale: ClassVar[float] = 1.0

            @property
            def other(self) -> float:
                return self.scale

            @staticmethod
            def times(x: Any, by: float) -> Any:
                return x * by

            @classmethod
            def name(cls) -> str:
                return cls.__name__

            def forward(self, x: Any) -> Any:
                return self.times(x, self.other)

        model = tiny("llama", 4, initializer_range=0.3).eval()
        if of != "known class":
            model.model.layers[0].mlp = Own()
        pair = Pair(model)
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            if of == "attribute":
                monkeypatch.setattr(Own, "scale", 0.5)
            else:
                cls = type(model.model.layers[0].mlp)
                monkeypatch.setattr(cls, "forward", lambda self, x: x * 0.5)
            assert pair.replays(call(), call()) == [0, 1]


class TestWhatCannotBeSeenInto:
    @pytest.mark.parametrize("where", ["module", "object", "closure"])
    def test_keeps_layers_from_being_replayed(self, where, caplog):
        class Drawing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                scales = itertools.cycle([1.0, 0.5])
                self.scales: Any = Params(inner=scales) if where == "object" else scales
                if where == "closure":
                    del self.scales
                    self.forward = lambda x: x * next(scales)

            def forward(self, x: Any) -> Any:
                scales = self.scales.inner if where == "object" else self.scales
                return x * next(scales)

        model = tiny("llama", 4, initializer_range=0.3).eval()
        model.model.layers[1].mlp = Drawing()
        pair = Pair(tiny("llama", 4).eval())
        pair.model.model.layers[1].mlp = Drawing()
        pair.plain.model.layers[1].mlp = Drawing()
        with pair.batch():
            assert not any(pair.replays(*[call()] * 4))
        [warning] = warnings(caplog)
        assert "or has some that cannot be compared" in warning

    @pytest.mark.parametrize(
        "value",
        [threading.Lock(), object(), print, np.random.default_rng(0), random.Random(0), int,
         torch.float32, range(3), itertools, re.compile("a"), Path("a"), date(2020, 1, 1),
         Typed(), functools.reduce(lambda inner, _: [inner], range(300), 0), slice(0, 2), ...,
         torch.Tensor.mul, tuple[int, int], int | None],
    )  # fmt: skip
    def test_is_not_what_stays_as_it_is(self, value):
        model = tiny("llama", 4, initializer_range=0.3).eval()
        model.model.layers[0].mlp = Scaled("other", lambda _: 1.0)
        pair = Pair(model)
        pair.both(lambda model: put(model, "other", value))
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]


class Dotted(dict):
    """As users make dicts with attributes."""

    __slots__ = ()
    __getattr__ = dict.__getitem__


class Forwarding:
    __slots__ = ("inner",)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Raising:
    @property
    def __dict__(self) -> Any:
        raise RuntimeError("none")


class Gone:
    pass


RAISING = {
    "dotted": Dotted,
    "forwarding": Forwarding,
    "raising": Raising,
    "entropy": random.SystemRandom,
    "gone": lambda: weakref.proxy(Gone()),
    "expanded": lambda: torch.full((1,), float("nan")).expand(3),
}


class TestValuesWhoseOwnCodeRaises:
    @pytest.mark.parametrize("where", ["model", "model.layers.0", "model.layers.3"])
    @pytest.mark.parametrize("kind", RAISING)
    def test_change_no_result(self, kind, where):
        pair = Pair(tiny("llama", 4, initializer_range=0.3).eval())
        pair.both(lambda m: vars(m.get_submodule(where)).update(other=RAISING[kind]()))
        with pair.batch():
            pair.replays(*[call()] * 3)
            pair.replays(*[call()] * 3, grad=True)


class Stateful(nn.Module):
    """Counts its passes in some way, and computes with the count."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.held: Any = {
            "int": 0, "list": [], "deque": deque(maxlen=9), "set": set(), "dict": {"n": 0},
            "counter": Counter(), "nested": {"a": [{"n": 0}]}, "listed": Listed(0),
            "dataclass": Params(0), "slots": Slots(0), "array": np.zeros(2), "bytes": bytearray(),
            "tensor": torch.zeros(2), "tensor in place": torch.zeros(2),
            "tensor through data": torch.zeros(2), "tensor in a list": [torch.zeros(2)],
            "Random": random.Random(0),
            "numpy": np.random.default_rng(0), "torch": torch.Generator().manual_seed(0),
        }.get(kind)  # fmt: skip
        if kind in ("buffer", "parameter"):
            del self.held
        if kind == "buffer":
            self.register_buffer("held", torch.zeros(2), persistent=False)
        if kind == "parameter":
            self.held = nn.Parameter(torch.zeros(2), requires_grad=False)
        if kind == "closure":
            count = 0

            def forward(x: Any) -> Any:
                nonlocal count
                count += 1
                return x * (1 + count)

            self.forward = forward

    def count(self) -> Any:
        held: Any = self.held
        match self.kind:
            case "int":
                self.held += 1
                return self.held
            case "list" | "deque" | "bytes":
                held.append(1)
                return len(held)
            case "set":
                held.add(len(held))
                return len(held)
            case "dict" | "counter":
                held["n"] += 1
                held[f"pass {held['n']}"] = 1
                return len(held)
            case "nested":
                held["a"].append({"n": len(held["a"])})
                held["a"][0]["n"] += 1
                return held["a"][0]["n"] + len(held["a"])
            case "dataclass" | "slots" | "listed":
                held.scale += 1
                return held.scale
            case "tensor":
                self.held = held + 1
                return self.held[0]
            case "array" | "tensor in place" | "buffer":
                held += 1
                return held[0].item()
            case "tensor through data" | "parameter":
                held.data.add_(1)
                return held[0].item()
            case "tensor in a list":
                held[0].add_(1)
                return held[0][0]
            case "Random":
                return held.random()
            case "numpy":
                return held.random()
            case "torch":
                return torch.rand((), generator=held, device="cpu").item()
            case "new attribute":
                self.fresh = getattr(self, "fresh", 0) + 1
                return self.fresh
        raise AssertionError(self.kind)

    def forward(self, x: Any) -> Any:
        return x * (1 + self.count())


STATES = ["int", "list", "deque", "set", "dict", "counter", "nested", "listed", "dataclass",
          "slots", "array", "bytes", "tensor", "tensor in place", "tensor through data",
          "tensor in a list", "buffer", "parameter", "Random", "numpy", "torch", "new attribute",
          "closure"]  # fmt: skip


class TestState:
    @pytest.mark.parametrize("kind", STATES)
    @pytest.mark.parametrize("grad", [False, True])
    def test_of_a_trained_layer_is_of_the_passes_alone(self, kind, grad):
        found = []
        for replays in (False, True):
            model = tiny("llama", 4, initializer_range=0.3).eval()
            model.model.layers[FIRST].mlp = Stateful(kind)
            pair = Pair(model)
            logits = []
            with pair.batch(), torch.set_grad_enabled(grad):
                for _ in range(4):
                    run = pair.model if replays else pair.plain
                    logits.append(run(input_ids=ids(), use_cache=False).logits.detach().clone())
            assert pair.replay.num_replayed == 3 * replays
            found.append(logits)
        assert all(map(torch.equal, *found))
        assert not torch.equal(found[0][0], found[0][1])

    def test_of_the_last_of_very_many_modules(self):
        pair = Pair(tiny("llama", 4, initializer_range=0.3).eval())

        def add(model: Any) -> None:
            layer = model.model.layers[FIRST]
            for index in range(5000):
                layer.register_module(f"m{index}", nn.Identity())
                layer.get_submodule(f"m{index}").held = [index]
            layer.mlp = Stateful("list")

        pair.both(add)
        with pair.batch():
            assert pair.replays(*[call()] * 3) == [0, 1, 1]

    def test_stays_the_same_object(self):
        model = tiny("llama", 4, initializer_range=0.3).eval()
        mlp = model.model.layers[FIRST].mlp = Stateful("nested")
        pair, before = Pair(model), (mlp.held, mlp.held["a"], mlp.held["a"][0])
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
        after = mlp.held, mlp.held["a"], mlp.held["a"][0]
        assert all(a is b for a, b in zip(before, after, strict=True))

    def test_with_a_graph_can_be_differentiated_once(self):
        @dataclass
        class Losses:
            all: list[Any] = field(default_factory=list)
            total: Any = None

        class Auxiliary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inside, self.losses = nn.Linear(16, 16), Losses()

            def forward(self, x: Any) -> Any:
                y = self.inside(x)
                self.losses.all.append(y.pow(2).mean())
                self.losses.total += y.abs().mean()
                return y

        def backward(model: Any) -> Any:
            model.zero_grad()
            losses = model.model.layers[FIRST].mlp.losses
            losses.all.clear()
            losses.total = torch.zeros(())
            logits = model(input_ids=ids(), use_cache=False).logits
            (logits.pow(2).mean() + sum(losses.all) + losses.total).backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return {**grads, "losses": torch.stack(losses.all).detach()}

        model = tiny("llama", 4, initializer_range=0.3).eval()
        model.model.layers[FIRST].mlp = Auxiliary()
        pair = Pair(model)
        with pair.batch():
            assert pair.replays(*[backward] * 3, grad=True) == [0, 1, 1]

    @pytest.mark.parametrize("kind", ["int", "list", "tensor", "closure"])
    def test_below_the_layers_is_of_the_passes_alone(self, kind):
        class Embedding(nn.Module):
            def __init__(self, inside: Any) -> None:
                super().__init__()
                self.inside, self.state = inside, Stateful(kind)

            def forward(self, tokens: Any) -> Any:
                self.state(torch.ones(()))
                return self.inside(tokens)

        pair = Pair(tiny("llama", 4).eval())
        pair.both(lambda model: setattr(model.model, "embed_tokens", Embedding(
            model.model.embed_tokens)))  # fmt: skip
        with pair.batch():
            assert pair.replays(*[call()] * 4) == [0, 1, 1, 1]
            found = [float(m.model.embed_tokens.state(torch.ones(()))) for m in
                     (pair.model, pair.plain)]  # fmt: skip
        assert found[0] == found[1] == 6.0
