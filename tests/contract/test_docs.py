"""The documentation names what the code has: keywords, messages, modules."""

import ast
import dataclasses
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import layerrl
from layerrl import LayerMaskedMixin, LayerSelection, contribution_probe, errors, select_layers
from layerrl.probe import METHODS
from layerrl.scores.method import Method, Request
from layerrl.selection.exports import TOOLS
from layerrl.selection.parsing import PARTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def section(page: str, heading: str) -> str:
    """The text below a heading, down to the next one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.split(r"^#+ ", text[text.index(f"# {heading}\n") :][2:], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of tables but their heads, without the code marks around a cell."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip("`") for cell in row] for row in cells]


@pytest.mark.parametrize(
    ("function", "page", "heading", "left_out"),
    [
        (LayerMaskedMixin.__init__, "guide.md", "Keywords", {"self"}),
        (contribution_probe, "choosing.md", "Arguments of contribution_probe", set()),
        (select_layers, "choosing.md", "Select", {"model", "layers"}),
    ],
)
def test_tables_of_keywords_are_those_of_the_code(
    function: Callable[..., Any], page: str, heading: str, left_out: set[str]
) -> None:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in kinds and name not in left_out
    }
    text = section(page, heading)
    table = {name: default for name, default, *_ in rows(text[text.index("default") :])}
    assert [*table] == [*parameters], f"the rows of docs/{page}, {heading}, and the arguments"
    for name, default in parameters.items():
        shown = {inspect.Parameter.empty: "required", 2 * 2**30: "2 GiB"}
        if isinstance(default, type) and default is not inspect.Parameter.empty:
            assert table[name] == default.__name__
        else:
            expected = shown.get(default, repr(default).replace("'", '"'))
            assert table[name] == expected, name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_needs_known_arguments_and_is_in_the_tables(name: str) -> None:
    method = import_module(METHODS[name]).METHOD
    assert isinstance(method, Method)
    assert {*method.needs} <= {field.name for field in dataclasses.fields(Request)}
    for text in (section("choosing.md", "Probe"), contribution_probe.__doc__ or ""):
        assert f'| `"{name}"' in text


@pytest.mark.parametrize("part", PARTS)
def test_every_part_outside_the_layers_is_in_the_table(part: str) -> None:
    assert f'| `"{part}"' in section("choosing.md", "Outside the layers")
    assert f'`"{part}"`' in (select_layers.__doc__ or "")


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_that_takes_a_selection_is_in_the_docs(tool: str) -> None:
    page = (DOCS / "integrations.md").read_text(encoding="utf-8")
    for text in (section("choosing.md", "In other tools"), page):
        assert tool in text.lower()
    assert f'`"{tool}"`' in (LayerSelection.to_config.__doc__ or "")


def texts() -> Iterator[str]:
    """All text in the code, with a mark for what is filled in."""
    for file in (ROOT / "layerrl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                yield "".join(map(str, parts))


def test_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    code = "\n".join(texts())
    first = re.findall(r"^\| (`.+?) \|", page, flags=re.MULTILINE)
    quoted = re.findall(r"`([^`]+)`", "\n".join(first))
    assert len(quoted) > 80
    gone = [m for m in quoted if any(part.strip(" ,") not in code for part in m.split("..."))]
    assert gone == []


def test_troubleshooting_has_every_error() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    expected = {e.__name__ for e in vars(errors).values() if inspect.isclass(e)} - {"LayerRLError"}
    assert {*re.findall(r"^## (\w+Error)$", page, flags=re.MULTILINE)} == expected


def test_modules_of_the_glossary_exist() -> None:
    page = (DOCS / "glossary.md").read_text(encoding="utf-8")
    modules = re.findall(r"`(layerrl/\S+)`", page)
    assert len(modules) > 30
    assert [module for module in modules if not (ROOT / module).is_file()] == []


def test_files_that_contributing_names_exist() -> None:
    """Those of the package without its name, and of the folder that a row is about without it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {*re.findall(r"`([\w/.]+\.(?:py|pyi|md|toml|txt|cff))\b[^`]*`", text)}
    files = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("*.*")}
    for folder in ("layerrl", "tests", "benchmarks", "docs", "examples"):
        found = (ROOT / folder).rglob("*.*")
        files |= {file.relative_to(ROOT).as_posix() for file in found}
    assert len(named) > 90
    gone = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
    assert gone <= {"docs/NAME.md", "examples/NAME.py"}


PAGES = [
    file.relative_to(ROOT).as_posix() for file in [*ROOT.glob("*.md"), *sorted(DOCS.glob("*.md"))]
]


def headings(file: Path) -> set[str]:
    """What a link to a part of a page may name."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    lines = (re.sub(r"[`*]", "", line) for line in re.findall(r"^#+ (.+)$", text, flags=re.M))
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    """In a clone, and as absolute addresses of this repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = rf"{re.escape(project['urls']['Repository'])}/(?:blob|raw)/main/"
    text = (ROOT / page).read_text(encoding="utf-8")
    for alternative, target in re.findall(r"(!\[[^]]*)?\]\((?!#)([^)\s]+)\)", text):
        assert not alternative or len(alternative) > 20, f"{target} says nothing to the blind"
        from_root = re.sub(f"^{own}", "/", target)
        if from_root.startswith("http"):
            continue
        name, _, anchor = from_root.partition("#")
        file = ROOT / name[1:] if name.startswith("/") else (ROOT / page).parent / name
        assert file.is_file(), target
        assert not anchor or anchor in headings(file), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_home_page_leads_to_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = {file.name for file in DOCS.glob("*.md")} - {"index.md"}
    linked = {*re.findall(r"\]\((\w[\w-]*\.md)\)", index)}
    assert pages - linked == set(), "give each a row in docs/index.md"
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    listed = {name for entry in nav for name in entry.values()}
    assert listed == pages | {"index.md"}, "list each page in the nav of zensical.toml"


@pytest.mark.parametrize("page", PAGES)
def test_code_on_pages_needs_no_scrolling(page: str) -> None:
    """Of 86 characters at most; the home page's is seen on a phone."""
    limit = 54 if page == "docs/index.md" else 86
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python|yaml)\n(.*?)^```", text, flags=re.DOTALL | re.M)
    assert [line for code in blocks for line in code.splitlines() if len(line) > limit] == []
    if page == "docs/index.md":
        assert sum("selection=" in code for code in blocks) >= 3


def test_the_version_is_the_same_everywhere() -> None:
    released = re.findall(
        r"^## \[(\d\S+)\] - 20\d\d-\d\d-\d\d$",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        flags=re.M,
    )
    assert released[0] == layerrl.__version__
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {layerrl.__version__}\n" in cited
