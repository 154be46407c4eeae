"""A command's YAML file, without what YAML 1.1 reads otherwise than it looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from layerrl.checks import check_path
from layerrl.errors import LayerRLError


def read_file(path: str) -> list[str]:
    """The names of the options that a YAML file sets.

    Args:
        path: The file.

    Returns:
        The names, as they stand there.

    Raises:
        LayerRLError: If the path is none.
        ValueError: If the file cannot be read, is no mapping, has something twice, or a number that
            is another one in YAML than it seems.
    """
    file: Path = check_path("--config", path, LayerRLError)
    try:
        text = file.read_text(encoding="utf-8")
        config, top = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected a mapping of options to values, got {config!r:.80}")
    for node in _nodes(top):
        _refuse_twice(node)
    for key, value in top.value:
        for node in _nodes(value):
            if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int"):
                _refuse_number(key.value, node.value)
    return [str(key) for key in config]


def _nodes(node: Any) -> Iterator[yaml.Node]:
    """A node and all below it, each once: an alias may be of the node around it."""
    left, seen = [node], set()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if not isinstance(each, yaml.ScalarNode):
            left += [part for item in each.value for part in _parts(item)]


def _parts(item: Any) -> tuple[Any, ...]:
    """The nodes of an element of a sequence, or of a mapping."""
    return item if isinstance(item, tuple) else (item,)


def _refuse_twice(node: yaml.Node) -> None:
    """Refuse a key that a mapping has twice, of which YAML takes the last."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{key.value} is there twice, in lines {lines[name]} and {line}")
        lines[name] = line


def _refuse_number(name: str, text: str) -> None:
    """Refuse a number that YAML 1.1 counts in sixties (1:30) or in eights (010)."""
    number = yaml.safe_load(text)
    try:
        plain = int(text) == number
    except ValueError:
        plain = text.lstrip("+-").lower().startswith(("0x", "0b"))
    if not plain:
        raise ValueError(
            f'{name}: {text} is the number {number} in YAML. Write "{text}" in quotes, or the '
            "number"
        )
