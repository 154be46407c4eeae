"""Digests that lie on disk must stay what they were: in deltas, journals, reports."""

import collections
import enum
import functools
import inspect
import json
import logging
import os
import random
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from layerrl.delta import DeltaBase
from layerrl.digests import json_digest
from layerrl.scores import canonical
from layerrl.scores.identity import digest as digest_of_run
from layerrl.scores.identity import identity_of, known_afterwards
from layerrl.sweep.harness import weights_digest

VALUE = {"b": 1, "a": [1.5, None, "é"], "c": {"y": True, "x": {}}}
MARKS = {"layers.1.w": "00112233aabbccdd", "layers.0.w": "ffeeddccbbaa9988"}


def test_of_a_deltas_description():
    expected = "e8c7114776d6b3a25ea955c0d732eb1f1e0330f3ae93190a7f05fb683375b477"
    assert json_digest(VALUE) == json_digest(dict(reversed(VALUE.items()))) == expected


def test_of_a_deltas_base():
    nothing = dict.fromkeys(("name", "revision", "model_type", "vocabulary", "config"))
    base = DeltaBase(
        **nothing, trained=(), dtypes={}, shapes={}, fingerprints=MARKS, tied={}, quantised=()
    )
    assert base.digest == "9f969e54819af5aba97aa2edf52312827901fa8f40865f83939a9e8973301562"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((), "e3b0c44298fc1c14"),
        ((None,), "74234e98afe7498f"),
        (("x", "y"), "2f51c6b5f4cb95c2"),
        (({"p": object},), "7c81337b4c50fa3c"),
        ((VALUE, MARKS, {1: 2}.keys()), "28491fbe58d7bb1d"),
    ],
)
def test_of_a_runs_settings(values, expected):
    assert digest_of_run(*values) == expected


def test_of_a_sweeps_base_follows_the_models_order():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))  # "10" comes before "2" if sorted
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, number)
    assert weights_digest(model) == "c3f3915d272efa3f"


def plain(completions, **_):
    return [1.0 for _ in completions]


class Reward:
    """Its attributes are its settings."""

    def __init__(self, held, **others):
        self.held = held
        vars(self).update(others)

    def __call__(self, completions, **_):
        return [self.held for _ in completions]

    def method(self, completions, **_):
        return self(completions)


class Slots:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held

    def __call__(self, **_):
        return [self.held]


class Kept:
    """Says itself what it is, as pickle asks for it."""

    def __init__(self, held):
        self.held, self.noise = held, random.random()

    def __getstate__(self):
        return {"held": self.held}


class Wrapping:
    def __init__(self, function, by):
        functools.update_wrapper(self, function)
        self.by = by

    def __call__(self, **others):
        return [self.by * value for value in self.__wrapped__(**others)]


class Judge(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held


class Kind(enum.Enum):
    ONE = 1
    TWO = 2
    THREE = 3
    FOUR = 4
    FIVE = 5
    SIX = 6


def closure(held):
    def reward(completions, **_):
        return [held for _ in completions]

    return reward


def default(held):
    def reward(completions, by=held, **_):
        return [by for _ in completions]

    return reward


def keyword(held):
    def reward(completions, *, by=held, **_):
        return [by for _ in completions]

    return reward


def decorated(held):
    @functools.wraps(plain)
    def wrapper(**others):
        return [held * value for value in plain(**others)]

    return wrapper


def with_attribute(held):
    function = closure(0)
    function.by = held
    return function


def local_class(held):
    class Local:
        def __call__(self, completions, **_):
            return [held for _ in completions]

    return Local()


def without_source(held):
    names = {}
    exec(f"def reward(completions, **_):\n    return [{held}] * len(completions)", names)
    return names["reward"]


def in_a_cycle(held):
    reward = Reward(held)
    reward.itself = {"all": [reward, reward.method]}
    return reward


def busy(held):
    """Holds what cannot be pickled, and numbers of this process."""
    running = threading.Thread(target=lambda: None)
    running.start()
    open_things = [threading.Lock(), logging.getLogger("x"), running, (i for i in ()), object()]
    return Reward(held, things=open_things, file=Path(os.devnull).open())


def judge(held):
    with torch.random.fork_rng():
        torch.manual_seed(held)
        return nn.Linear(2, 2)


def words(held):
    return {f"word{number}" for number in range(20 + held)}


class Sibling:
    def __init__(self, number, all_of_them):
        self.number, self.all_of_them = number, all_of_them


def siblings(held):
    found = set()
    found |= {Sibling(number, found) for number in range(3 + held)}
    return found


class UnhashableType(type):
    def __eq__(cls, other):
        return cls is other


class OfThatType(metaclass=UnhashableType):
    def __init__(self, held):
        self.held = held


def array(held):
    numbers = np.arange(5000)
    numbers[2500] = held
    return numbers


OBJECTS = {
    "instance": Reward,
    "method": lambda held: Reward(held).method,
    "slots": Slots,
    "getstate": Kept,
    "wrapping": partial(Wrapping, plain),
    "closure": closure,
    "default": default,
    "keyword": keyword,
    "decorated": decorated,
    "attribute": with_attribute,
    "cached": lambda held: functools.lru_cache(closure(held)),
    "builtin": lambda held: re.compile(f"a{held}").search,
    "lambda": lambda held: lambda completions: held,
    "local class": local_class,
    "made class": lambda held: type("Made", (Reward,), {"by": held})(0),
    "without source": without_source,
    "type without a hash": lambda held: Reward(0, other=OfThatType(held)),
    "cycle": in_a_cycle,
    "busy": busy,
    "module": Judge,
    "weights": judge,
    "partial": lambda held: partial(plain, by=held),
    "partial of a method": lambda held: partial(Reward(held).method, by=1),
    "trainer class": lambda held: type("Trainer", (Judge,), {"by": held}),
}
HELD = {
    "set": words,
    "frozenset": lambda held: frozenset(words(held)),
    "keys": lambda held: {(held, "a"): 1, 1: {"x"}, "1": None},
    "views": lambda held: dict.fromkeys(words(held)).keys(),
    "array": array,
    "array of objects": lambda held: np.array([Reward(held), None], dtype=object),
    "number": lambda held: np.float32(held),
    "tensor": lambda held: torch.from_numpy(array(held)),
    "dtype": lambda held: (torch.float32, torch.float16)[held - 1],
    "bytes": lambda held: bytes([held]),
    "enum": Kind,
    "set of enums": lambda held: {*Kind} - {Kind(held)},
    "set of objects that hold it": siblings,
    "pattern": lambda held: re.compile(f"a{held}"),
    "path": lambda held: Path(f"a{held}"),
    "counter": lambda held: collections.Counter("a" * held),
    "defaultdict": lambda held: collections.defaultdict(set, {held: {held}}),
    "generator": random.Random,
    "rows": lambda held: Dataset.from_dict({"answer": [held]}),
    "large": lambda held: 10 ** (5000 + held),
    "deep": lambda held: functools.reduce(lambda inner, _: [inner], range(50), held),
    "functions": lambda held: [closure(held), len, nn.functional.relu, str.lower],
}
REWARDS = {
    **OBJECTS,
    **{f"{name} in a partial": lambda n, v=v: partial(plain, by=v(n)) for name, v in HELD.items()},
    **{f"{name} in an instance": lambda n, v=v: Reward(v(n)) for name, v in HELD.items()},
}


@pytest.mark.parametrize("name", REWARDS)
def test_of_a_reward_with_other_settings(name):
    identities = [identity_of(REWARDS[name](held)) for held in (1, 2, 1, 2)]
    assert identities[:2] == identities[2:]
    assert identities[0] != identities[1]


@pytest.mark.parametrize("seed", ["1", "2"])
def test_of_rewards_in_another_process(seed):
    """With other addresses, and sets in another order."""
    code = (
        "import json; from tests.unit.test_digests import REWARDS, identity_of;"
        "print(json.dumps({name: identity_of(made(1)) for name, made in REWARDS.items()}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    there = json.loads(ended.stdout.splitlines()[-1])
    assert there == {name: identity_of(made(1)) for name, made in REWARDS.items()}


@pytest.mark.parametrize("holder", [list, set])
def test_of_many_objects_looks_for_their_source_once(monkeypatch, holder):
    sought, source = [], canonical._source
    monkeypatch.setattr(canonical, "_source", lambda value: sought.append(value) or source(value))
    identity_of(Reward(holder(Kept(number) for number in range(50))))
    assert sought.count(Kept) == 1


def test_of_a_complex_array_leaves_room_for_the_rest():
    numbers = np.zeros(250_000, dtype=complex)
    first, second = (identity_of(Reward([numbers, Slots(held)])) for held in (1, 2))
    assert first != second


def test_of_a_model_is_read_once_for_a_run(monkeypatch):
    model, read = judge(1), []
    fingerprints = canonical.fingerprints
    monkeypatch.setattr(canonical, "fingerprints", lambda t: read.append(1) or fingerprints(t))
    with known_afterwards([model]):
        first = identity_of(model)
        once = len(read)
    assert len(read) == once
    assert identity_of(model) == first
    with torch.no_grad():
        model.bias += 1
    assert identity_of(model) != first


def test_of_rewards_that_have_it_in_journals():
    """Of functions that their source says all of, and plain values beside them."""
    assert identity_of(plain) == f"plain {digest_of_run(inspect.getsource(plain), None)}"
    held = {"by": [1, 2.5, "x", None, {"a": True}]}
    assert identity_of(partial(plain, 1, **held)) == (
        f"{identity_of(plain)} with {digest_of_run((1,), held)}"
    )
    assert identity_of("org/judge") == "org/judge"


def test_of_a_reward_that_counts_its_calls():
    """It is known again in this process, and by what it is at first in another one."""
    reward, first = Reward(1, calls=0), identity_of(Reward(1, calls=0))
    for _ in range(2):
        with known_afterwards([reward]):
            assert identity_of(reward) == first
            reward.calls += 1
    assert identity_of(reward) == first
    reward.held = 2
    assert identity_of(reward) != first
    assert identity_of(Reward(1, calls=9)) != first
