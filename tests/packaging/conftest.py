"""layerrl as its users get it: built, and installed where there is no checkout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
collect_ignore = ["alone.py", "at_home.py", "run_pages.py"]  # run in environments of their own
# Neither a checkout on the path nor a configured index.
BARE = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP"))}


def output_of(*command: object, **options: object) -> str:
    """What a command prints; its errors are shown."""
    ended = subprocess.run(
        [*map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        **({"env": BARE} | options),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("hatchling", reason="the dev extra brings hatchling")
    folder = tmp_path_factory.mktemp("built")
    output_of(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    [wheel] = built.glob("*.whl")
    return wheel


def needed_by(dist: Distribution) -> list[Distribution]:
    """What a distribution needs, and what that needs, as it is installed here."""
    needed: dict[tuple[str, str], Distribution] = {}
    waiting = [(dist, "")]
    while waiting:
        dist, extra = waiting.pop()
        for requirement in map(Requirement, dist.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for wanted in ("", *requirement.extras):
                    key = requirement.name, wanted
                    if key not in needed:
                        needed[key] = distribution(requirement.name)
                        waiting.append((needed[key], wanted))
    return [*needed.values()]


def link(source: Path, target: Path) -> None:
    """Link files one by one: pip may replace a package, and reaches none of the tests' own."""
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target, copy_function=os.symlink)
    elif not target.exists():
        target.symlink_to(source)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes an environment of named distributions and all that they need; returns its Python.

    They are linked from the environment of the tests, so that nothing is downloaded.
    """

    def environment(*names: str, wheel: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        output_of(sys.executable, "-m", "venv", "--without-pip", folder)
        python = folder / "bin" / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(output_of(python, "-c", where).strip())
        pip = sys.executable, "-m", "pip", "--isolated", "--python", python
        if wheel:
            output_of(*pip, "install", "--no-index", "--no-deps", wheel)
        given = [*Distribution.discover(path=[str(site)]), *map(distribution, names)]
        for dist in [*given, *(needed for one in given for needed in needed_by(one))]:
            for top in {file.parts[0] for file in dist.files or ()} - {"..", "__pycache__"}:
                link(Path(str(dist.locate_file(top))), site / top)
        assert "No broken requirements found" in output_of(*pip, "check")
        return python

    return environment


@pytest.fixture(scope="session")
def install(wheel: Path, environment: Callable[..., Path]) -> Callable[..., Path]:
    """Makes an environment with the wheel, what it needs, and what is named; returns its Python."""
    return partial(environment, wheel=wheel)
