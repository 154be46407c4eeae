"""Processes killed in the middle of what they write, and runs of thousands of steps."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kills")


@forks
def test_what_a_killed_process_wrote_is_whole_or_absent(
    kills: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--times", "4", "--output", str(tmp_path), "--operations", "merge", "journal"]
    status = kills.main(options)
    said = capsys.readouterr().out
    assert "merge: 4 of 4 kills survived\njournal: 4 of 4 kills survived\n" in said
    assert status == 0
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    kills.main(options)  # has nothing left to do
    assert (tmp_path / "journal.jsonl").read_text().splitlines() == lines


@forks
def test_a_file_that_is_written_in_place_is_found(kills: Any, tmp_path: Path) -> None:
    class InPlace(kills.Operation):
        def run(self, folder: Path) -> None:
            (folder / "out").mkdir(exist_ok=True)
            for name in "abc":
                (folder / "out" / name).write_text(name)

    operation = InPlace(tmp_path)
    measured = kills.undisturbed(operation, tmp_path / "folder")
    assert measured[2] == 4
    case = {"operation": "in place", "number": 5, "signal": "SIGKILL"}  # before the third call
    found = kills.trial(operation, tmp_path / "folder", case, measured)
    assert found["why"] == "half-written under its final name"


@forks
@pytest.mark.slow
def test_every_operation_survives(kills: Any, tmp_path: Path) -> None:
    assert kills.main(["--times", "20", "--output", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_nothing_grows_over_a_long_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importlib.import_module("soak").main([])
    runs = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line[:1] == "{"]
    assert [run["run"] for run in runs] == ["auto", "schedule"]
    for run in runs:
        assert run["steps"] == 2000
        assert run["rss_bytes_a_step"] < 1000
        assert run["fds_grown"] == run["fds_left"] == run["hooks_grown"] == 0
        first, _, last = run["ms_a_step"]
        assert last < 1.3 * first
