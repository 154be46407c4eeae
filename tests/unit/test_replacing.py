"""Attributes that are replaced for a while, and what is left of that."""

import types

import pytest

from layerrl.replacing import replaced


class Held:
    own_or_class = "class"

    def __init__(self):
        self.own = "own"
        self._value = "behind"

    @property
    def through(self):
        return self._value

    @through.setter
    def through(self, value):
        self._value = value

    @property
    def fixed(self):
        return "fixed"

    def method(self):
        return "method"


class Slotted:
    __slots__ = ("slot",)

    def __init__(self):
        self.slot = "own"


NEW = {"own": 1, "own_or_class": 2, "through": 3, "method": 4}


def used(held):
    with replaced(held, **NEW):
        assert {name: getattr(held, name) for name in NEW} == NEW


def interrupted(held):
    with pytest.raises(KeyboardInterrupt), replaced(held, **NEW):
        raise KeyboardInterrupt


def nested(held):
    with replaced(held, **NEW):
        used(held)
        assert {name: getattr(held, name) for name in NEW} == NEW


def refused_half_way(held):
    with pytest.raises(AttributeError, match="fixed"), replaced(held, own=1, fixed=2, method=3):
        pytest.fail("entered")


@pytest.mark.parametrize("use", [used, interrupted, nested, refused_half_way])
def test_an_object_is_what_it_was(use):
    held = Held()
    before = dict(vars(held))
    use(held)
    assert vars(held) == before
    assert held.method() == "method"


def test_what_was_its_classs_follows_the_class_again(monkeypatch):
    held = Held()
    used(held)
    monkeypatch.setattr(Held, "own_or_class", "another")
    assert held.own_or_class == "another"


def test_what_covered_the_classs_covers_it_again():
    held = Held()
    held.own_or_class = "own"
    used(held)
    assert vars(held)["own_or_class"] == "own"


def test_classes_modules_and_slots_are_put_back():
    class Inner(Held):
        pass

    module = types.ModuleType("module")
    module.own = "own"
    for holder, name in ((Inner, "own_or_class"), (module, "own"), (Slotted(), "slot")):
        before = getattr(holder, name)
        with replaced(holder, **{name: "new"}):
            assert getattr(holder, name) == "new"
        assert getattr(holder, name) == before
    assert "own_or_class" not in vars(Inner)


def test_what_the_object_has_not_is_refused():
    held = Held()
    with pytest.raises(AttributeError, match="renamed_upstream"):
        replaced(held, own=1, renamed_upstream=2).__enter__()
    assert held.own == "own"
    assert not hasattr(held, "renamed_upstream")


def test_what_was_deleted_inside_is_there_again():
    held = Held()
    with replaced(held, own=1, own_or_class=2):
        del held.own, held.own_or_class
    assert (held.own, held.own_or_class) == ("own", "class")
