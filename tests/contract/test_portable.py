"""layerrl imports on systems that lack what only POSIX has, and reads text the same on all."""

import ast

from tests.contract.test_imports import ROOT, run_python

POSIX = ["curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog"]
POSIX += ["termios", "tty"]
# What layerrl imports may use what this system has: all of it is loaded before anything is hidden.
LEFT_OUT = ["layerrl.integrations.openrlhf", "layerrl.integrations.verl"]
PROGRAM = f"""
import importlib, pkgutil, sys

def import_all():
    import layerrl
    for module in pkgutil.walk_packages(layerrl.__path__, "layerrl."):
        if module.name not in {LEFT_OUT}:
            importlib.import_module(module.name)
    return {{name for name in sys.modules if name.partition(".")[0] == "layerrl"}}

first = import_all()
for name in first:
    del sys.modules[name]
sys.modules |= dict.fromkeys({POSIX})
assert import_all() == first
print(*first)
"""
SOURCES = [
    file for name in ("layerrl", "examples", "benchmarks") for file in (ROOT / name).rglob("*.py")
]


def test_every_module_imports_without_what_only_posix_has() -> None:
    assert {"layerrl.journal", "layerrl.probe", "layerrl.trainer"} < {*run_python(PROGRAM)}


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of whoever runs it."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    # `open(file, mode)`, and `path.open(mode)`
    place = 1 if isinstance(call.func, ast.Name) else 0
    mode = keywords.get("mode", call.args[place] if len(call.args) > place else None)
    binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
    if ast.unparse(call.func) == "os.open":  # a descriptor, of bytes
        return False
    reads = name in ("read_text", "write_text") or (name == "open" and not binary)
    return reads and "encoding" not in keywords


def test_every_text_file_is_opened_in_a_named_encoding() -> None:
    assert SOURCES
    unnamed = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    assert unnamed == []
