"""`make bundle` makes a folder that pip installs layerrl from where there is no network."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, output_of

HERE = f"3.{sys.version_info.minor}"
THERE = ["torch", "transformers", "accelerate"]

pytestmark = pytest.mark.slow  # pip resolves and downloads


def bundle(python: str, without: str = "", extra: str = "") -> subprocess.CompletedProcess[str]:
    command = ["make", "bundle", f"PYTHON={python}", f"WITHOUT={without}", f"EXTRA={extra}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("python", "without", "extra", "message"),
    [
        ("python3", "", "", "PYTHON is 'python3', expected the target's version, as PYTHON=3.12"),
        ("3.99", "", "", "no bundle for Python 3.99: no wheel fits of torch; layerrl"),
        (
            "3.10",
            "",
            "",
            "no bundle for Python 3.10: Package 'layerrl' requires a different Python",
        ),
        (HERE, "tensorflow", "", "WITHOUT has tensorflow, which layerrl does not need"),
        (HERE, "torch=2", "", "WITHOUT is 'torch=2', expected names or name==version"),
        (HERE, "torch", "magic", "EXTRA is 'magic', which layerrl does not have: expected one of"),
    ],
)
def test_what_cannot_be_is_said(python: str, without: str, extra: str, message: str) -> None:
    ended = bundle(python, without, extra)
    assert ended.returncode != 0
    [line] = [line for line in ended.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith(message)
    assert not (ROOT / "dist" / f"bundle-{python}").exists()


def test_it_installs_beside_what_was_left_out(
    environment: Callable[..., Path], tmp_path: Path
) -> None:
    folder = ROOT / "dist" / f"bundle-{HERE}"
    ended = bundle(HERE, " ".join(THERE))
    assert ended.returncode == 0, ended.stderr
    assert sum(file.stat().st_size for file in folder.iterdir()) < 64e6
    ended = bundle(HERE, " ".join(THERE), "gpu")
    assert ended.returncode == 0, ended.stderr
    names = {file.name.partition("-")[0] for file in folder.iterdir()}
    assert {"layerrl", "trl", "datasets", "pyarrow", "pytest", "peft"} <= names
    assert not {*THERE, "numpy"} & names
    python = environment(*THERE)
    pip = sys.executable, "-m", "pip", "--isolated", "--python", python
    output_of(*pip, "install", "--no-index", "--find-links", folder, "layerrl")
    output_of(*pip, "check")
    printed = output_of(python, Path(__file__).parent / "alone.py", cwd=tmp_path)
    assert printed.splitlines()[-1] == "all of it"
    output_of(*pip, "install", "--no-index", "--find-links", folder, "layerrl[gpu]")
    output_of(*pip, "check")
