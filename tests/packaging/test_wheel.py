"""The wheel holds what the checkout does, and runs where only its dependencies are."""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from email import message_from_string
from email.message import Message
from email.policy import default
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.packaging.conftest import BARE, ROOT, output_of


def own_files(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if name.startswith("layerrl/")]
        return {name: opened.read(name) for name in names}


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    tracked = output_of("git", "ls-files", "layerrl", cwd=ROOT).splitlines()
    assert {"layerrl/py.typed", "layerrl/data/published_contributions.json"} < {*tracked}
    assert own_files(wheel) == {name: (ROOT / name).read_bytes() for name in tracked}


def test_a_wheel_of_the_sdist_is_the_same(built: Path, wheel: Path, tmp_path: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        opened.extractall(tmp_path, filter="data")
    folder = tmp_path / sdist.name.removesuffix(".tar.gz")
    output_of(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=folder)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as opened:
        [name] = [name for name in opened.namelist() if name.endswith("/METADATA")]
        return message_from_string(opened.read(name).decode(), policy=default)


def test_its_page_shows_the_readme_with_absolute_links(wheel: Path) -> None:
    headers = metadata(wheel)
    page = str(headers.get_payload())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert headers["Description-Content-Type"] == "text/markdown"
    relative = re.findall(r"\]\((?!https?://)([^)\s]+)\)", page)
    assert relative == []
    [address] = [
        url.removeprefix("Repository, ")
        for url in headers.get_all("Project-URL", [])
        if url.startswith("Repository, ")
    ]
    assert f"]({address}/blob/main/docs/guide.md)" in page
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (ROOT / image.removeprefix(f"{address}/raw/main/")).is_file(), image
    back = re.sub(rf"{re.escape(address)}/(blob|raw)/main/", "", page)
    assert back.strip() == readme.strip()
    code = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
    assert code.findall(page) == code.findall(readme)


def test_all_addresses_are_of_one_repository(wheel: Path) -> None:
    urls = dict(url.split(", ") for url in metadata(wheel).get_all("Project-URL", []))
    assert {*urls} == {"Repository", "Documentation", "Changelog", "Issues"}
    for name, url in urls.items():
        assert url.startswith(urls["Repository"]), name
        _, main, file = url.partition("/blob/main/")
        assert not main or (ROOT / file).is_file(), name


def test_the_sdist_holds_what_a_wheel_is_built_of(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    package = {*output_of("git", "ls-files", "layerrl", cwd=ROOT).split()}
    beside = {"hatch_build.py", "pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff"}
    assert names == package | beside | {"LICENSE", "PKG-INFO", ".gitignore"}


def test_pypi_takes_both(built: Path) -> None:
    pytest.importorskip("twine", reason="the dev extra brings twine")
    output_of(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


def test_it_works_with_nothing_but_its_dependencies(
    install: Callable[..., Path], tmp_path: Path
) -> None:
    python, program = install(), tmp_path / "alone.py"
    program.write_bytes((Path(__file__).parent / "alone.py").read_bytes())
    printed = output_of(python, program, cwd=tmp_path)
    assert printed.splitlines()[-1] == "all of it"


@pytest.mark.slow
def test_a_user_is_at_home_with_it(install: Callable[..., Path], tmp_path: Path) -> None:
    python = install("nbclient", "ipykernel", "matplotlib", "reasoning-gym")
    program = Path(__file__).parent / "at_home.py"
    environment = {**BARE, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    printed = output_of(python, program, cwd=tmp_path, env=environment)
    assert printed.splitlines()[-1] == "at home"


@pytest.mark.slow
def test_it_installs_into_a_bare_environment(wheel: Path, tmp_path: Path) -> None:
    output_of(sys.executable, "-m", "venv", tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    ended = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", wheel],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "No broken requirements found" in output_of(python, "-m", "pip", "check")
    output_of(python, Path(__file__).parent / "alone.py", cwd=tmp_path)
