"""Files and functions stay short enough to be read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import layerrl

PACKAGE = Path(layerrl.__file__).parent
FILE, FUNCTION = 350, 60
WHY = f"# Over {FUNCTION} lines: "
# What was longer when this rule came. A number may fall, and goes when it is no longer needed.
LONGER_FUNCTIONS = {"trainer/call.py:__init__": 67}


def files() -> Iterator[tuple[str, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8")


def functions(text: str) -> Iterator[tuple[str, int, bool]]:
    """Name and lines of each function, and whether a comment above it says why it is long."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1, WHY in lines[first - 2]


def test_no_file_is_long() -> None:
    sizes = {name: len(text.splitlines()) for name, text in files()}
    assert len(sizes) > 80
    long = {name: size for name, size in sizes.items() if size > FILE}
    assert long == {}, f"over {FILE} lines: move a noun of it into a file of its own"


def test_no_function_is_long_unless_a_comment_above_it_says_why() -> None:
    excused, long, needless = [], [], []
    for file, text in files():
        here = [(f"{file}:{name}", size, why) for name, size, why in functions(text)]
        excused += [name for name, _, why in here if why]
        needless += [name for name, size, why in here if why and size <= FUNCTION]
        long += [
            f"{name} has {size} lines"
            for name, size, why in here
            if size > LONGER_FUNCTIONS.get(name, FUNCTION) and not why
        ]
        assert text.count(WHY) == sum(why for *_, why in here), file  # each above its function
    assert long == [], f"take a step out, or write {WHY!r} and the reason above the function"
    assert needless == [], f"short enough by now: take the comment {WHY!r} out"
    assert "probe.py:contribution_probe" in excused
