"""Values from a file, checked against types: dataclasses made of JSON, or a sentence why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from layerrl.checks import shown
from layerrl.errors import LayerRLError

T = TypeVar("T")
_Fit = Callable[[Any], Any]

_LARGEST = 2**63


class Misfit(ValueError):
    """A value that is not of its type: a `sentence` to follow on its name, and the way to it."""

    def __init__(self, sentence: str, where: str = "") -> None:
        self.sentence, self.where = sentence, where
        super().__init__((where.removeprefix(".") or "it") + sentence)


def is_not(expected: str, value: object) -> str:
    """What is wrong with a value: `" is 5, expected a text"`."""
    return f" is {shown(value)}, expected {expected}"


@dataclass(frozen=True, slots=True)
class Rule:
    """What else holds for a value of an annotated type: `Annotated[int, Rule(...)]`."""

    expected: str
    """In words."""
    holds: Callable[[Any], Any]
    """Of a value that has the type."""


Count = Annotated[int, Rule("a whole number from 0 up", lambda value: value >= 0)]
Amount = Annotated[float, Rule("a number from 0 up, below 1e15", lambda value: 0 <= value < 1e15)]


def fitted(kind: type[T] | Any, value: Any, where: str = "", *, required: Any = ()) -> T:
    """A value of JSON as one of a type.

    Args:
        kind: A scalar (text, int, float, bool), one of them or None, `Literal`, list, tuple, dict,
            `Annotated` with rules, a dataclass of such fields, or Any. Lists become tuples where
            the type says so. A dataclass takes its fields and no others; those with a default may
            be left out.
        value: The value, as `stored.parsed` returns it.
        where: Its name.
        required: Fields with a default that may not be left out.

    Returns:
        The value, of that type.

    Raises:
        Misfit: If it is not of that type, with the way to what is not.
    """
    if isinstance(value, dict) and not {*required} <= {*value}:
        raise Misfit(_fields_are_not(f"{sorted(required)} among them", value), where)
    return _at(where, _fit(kind), value) if where else _fit(kind)(value)


def _fields_are_not(expected: str, value: dict[str, Any]) -> str:
    return f" has the fields {shown(sorted(value), most=300)}, expected {expected}"


@cache
def _fit(kind: Any) -> _Fit:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if origin is Annotated:
        return _by_rules(_fit(arguments[0]), arguments[1:])
    if origin is Literal:
        return _one_of(arguments)
    if origin in (Union, UnionType):
        [other] = [each for each in arguments if each is not NoneType]
        fit = _fit(other)
        return lambda value: None if value is None else fit(value)
    if origin is dict:
        return _of_items(_fit(arguments[0]), _fit(arguments[1]))
    if origin is tuple and arguments[-1] is not ...:
        return _of_places([_fit(each) for each in arguments])
    if origin in (list, tuple):
        return _of_elements(_fit(arguments[0]), origin)
    if isinstance(kind, type) and is_dataclass(kind):
        return _of_fields(kind)
    return _SCALARS[kind]


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise Misfit(is_not("a text without NUL", value))
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not -_LARGEST <= value < _LARGEST:
        raise Misfit(is_not("a whole number of 64 bits", value))
    return value


def _finite(value: Any) -> float:
    if type(value) not in (float, int) or not math.isfinite(value):
        raise Misfit(is_not("a finite number", value))
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Misfit(is_not("true or false", value))
    return value


_SCALARS: dict[type, _Fit] = {str: _text, int: _whole, float: _finite, bool: _flag}


def _by_rules(fit: _Fit, rules: tuple[Rule, ...]) -> _Fit:
    def fit_by_rules(value: Any) -> Any:
        made = fit(value)
        for rule in rules:
            if not rule.holds(made):
                raise Misfit(is_not(rule.expected, value))
        return made

    return fit_by_rules


def _one_of(values: tuple[Any, ...]) -> _Fit:
    def fit(value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            raise Misfit(is_not(" or ".join(map(repr, values)), value))
        return value

    return fit


def _of_elements(fit: _Fit, kind: Callable[[list[Any]], Any]) -> _Fit:
    def fit_elements(value: Any) -> Any:
        if not isinstance(value, list):
            raise Misfit(is_not("a list", value))
        if fit is _finite and {*map(type, value)} == {float} and all(map(math.isfinite, value)):
            return kind(value)  # as below, and most of what a report holds
        made: list[Any] = []
        try:
            for each in value:
                made.append(fit(each))  # noqa: PERF401 - its length says which one failed
        except (Misfit, LayerRLError) as error:
            raise _inside(f"[{len(made)}]", error) from error
        return kind(made)

    return fit_elements


def _of_places(fits: list[_Fit]) -> _Fit:
    def fit(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(fits):
            raise Misfit(is_not(f"a list of {len(fits)}", value))
        pairs = enumerate(zip(fits, value, strict=True))
        return tuple(_at(f"[{place}]", each, found) for place, (each, found) in pairs)

    return fit


def _of_items(key_fit: _Fit, fit: _Fit) -> _Fit:
    def fit_items(value: Any) -> Any:
        if not isinstance(value, dict):
            raise Misfit(is_not("an object", value))
        return {
            _at(" has a key that", key_fit, key): _at(f"[{key!r:.200}]", fit, each)
            for key, each in value.items()
        }

    return fit_items


def _of_fields(kind: type[Any]) -> _Fit:
    hints = get_type_hints(kind, include_extras=True)
    fits = {each.name: _fit(hints[each.name]) for each in fields(kind)}
    needed = {
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    }

    def fit_fields(value: Any) -> Any:
        if not isinstance(value, dict):
            raise Misfit(is_not(f"an object with the fields {sorted(fits)}", value))
        if not needed <= {*value} <= {*fits}:
            raise Misfit(_fields_are_not(f"{sorted(fits)}", value))
        values = {name: _at(f".{name}", fits[name], each) for name, each in value.items()}
        return kind(**values)

    return fit_fields


def _at(where: str, fit: _Fit, value: Any) -> Any:
    try:
        return fit(value)
    except (Misfit, LayerRLError) as error:  # layerrl's own: of a dataclass that checks itself
        raise _inside(where, error) from error


def _inside(where: str, error: Misfit | LayerRLError) -> Misfit:
    if isinstance(error, Misfit):
        return Misfit(error.sentence, where + error.where)
    return Misfit(f": {error}", where)
