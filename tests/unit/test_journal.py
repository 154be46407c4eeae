"""A journal loses at most what was being written, and is never continued with something else."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from layerrl.errors import JournalError
from layerrl.journal import Journal, write_beside
from layerrl.sweep import Entry, Sweep

SETTINGS = {"steps": 5, "base": "abc"}


def written(folder, *entries):
    with Journal(folder, SETTINGS) as journal:
        for entry in entries:
            journal.append(entry)


def read(folder, settings=SETTINGS):
    with Journal(folder, settings) as journal:
        return journal.entries


def test_keeps_what_was_appended(tmp_path):
    written(tmp_path / "new" / "folder", {"run": 1}, {"run": (2, 3)})
    assert read(tmp_path / "new" / "folder") == [{"run": 1}, {"run": [2, 3]}]


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, cut):
    written(tmp_path, {"run": 1}, {"run": 2})
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert read(tmp_path) == [{"run": 1}]
    written(tmp_path, {"run": 3})
    assert read(tmp_path) == [{"run": 1}, {"run": 3}]


def test_a_head_that_was_cut_off_is_written_again(tmp_path):
    written(tmp_path)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:7])
    assert read(tmp_path) == []
    assert read(tmp_path) == []


@pytest.mark.parametrize("text", ["somebody's notes", "somebody's notes\nand mo"])
def test_what_is_no_journal_is_left_alone(tmp_path, text):
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(JournalError):
        read(tmp_path)
    assert (tmp_path / "journal.jsonl").read_text() == text


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(JournalError, match=r"cannot lock .*: No locks available. Give a folder"):
        written(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    written(tmp_path)
    with pytest.raises(
        JournalError, match=r"rows: not given there, 3 here.*steps: 5 there, 6 here"
    ) as e:
        read(tmp_path, {"steps": 6, "base": "abc", "rows": 3})
    assert "base" not in str(e.value)


def test_an_edited_line_is_named(tmp_path):
    written(tmp_path, {"run": 1}, {"run": 2})
    path = tmp_path / "journal.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = "{nonsense"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        JournalError, match=r"line 2 of .*journal\.jsonl is no line of it: it is no JSON"
    ):
        read(tmp_path)


@pytest.mark.parametrize("head", [{"version": 2, "settings": SETTINGS}, {"other": 1}, [1]])
def test_something_else_is_refused(tmp_path, head):
    (tmp_path / "journal.jsonl").write_text(json.dumps(head) + "\n")
    with pytest.raises(JournalError, match="expected a journal of version 1"):
        read(tmp_path)


HOLD = (
    "import sys, time; from layerrl.journal import Journal\n"
    f"with Journal(sys.argv[1], {SETTINGS!r}) as journal:\n"
    "    journal.append({'run': 1})\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60 * float(sys.argv[2]))"
)


def test_two_processes_are_refused(tmp_path):
    with Journal(tmp_path, SETTINGS):
        other = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path), "0"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "is open in another process" in other.stderr
    assert read(tmp_path) == []


def test_two_of_one_process_are_refused_in_any_thread(tmp_path):
    with Journal(tmp_path, SETTINGS) as journal:
        with pytest.raises(JournalError, match="is open in another process"):
            read(tmp_path)
        with (
            ThreadPoolExecutor() as pool,
            pytest.raises(JournalError, match="is open in another process"),
        ):
            pool.submit(read, tmp_path).result()
        journal.append({"run": 1})
    assert read(tmp_path) == [{"run": 1}]


def test_a_kill_leaves_neither_a_lock_nor_a_file(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(JournalError, match="is open in another process"):
            read(tmp_path)
        holder.kill()
    assert read(tmp_path) == [{"run": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_that_leaves_takes_no_lock_away(tmp_path):
    program = (
        "import os, sys; from layerrl.journal import Journal\n"
        f"opened = lambda: Journal(sys.argv[1], {SETTINGS!r})\n"
        "with opened():\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        os.waitpid(child, 0)\n"
        "        opened().__enter__()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "is open in another process" in ended.stderr


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot use"):
        read(tmp_path / "file" / "folder")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    with Journal(tmp_path, SETTINGS) as journal:
        journal.append({"run": 1})

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(JournalError, match="No space left on device"):
                journal.append({"run": 2})
        journal.append({"run": 3})
    assert read(tmp_path) == [{"run": 1}, {"run": 3}]


def test_a_disk_that_fills_within_a_line_leaves_what_was_there(tmp_path):
    program = (
        "import resource, sys; from layerrl.journal import Journal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        f"with Journal(sys.argv[1], {SETTINGS!r}) as journal:\n"
        "    journal.append({'run': 1})\n"
        "    journal.append({'run': 2, 'scores': [0.5] * 100})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.stderr.splitlines()[-1].startswith("layerrl.errors.JournalError: cannot write")
    assert (tmp_path / "journal.jsonl").read_bytes().endswith(b'{"run": 1}\n')
    assert read(tmp_path) == [{"run": 1}]


def test_a_file_beside_it_that_cannot_be_written_is_a_sentence(tmp_path):
    write_beside(tmp_path / "report.json", "old")
    write_beside(tmp_path / "report.json", "new")
    assert (tmp_path / "report.json").read_text() == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(JournalError, match=r"cannot write .*folder: .*the same call continues"):
        write_beside(tmp_path / "folder", "new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "report.json"]


def test_two_results_of_one_run_are_refused(tmp_path):
    args = SimpleNamespace(max_steps=8)
    sweep = Sweep(
        Mock(), num_layers=2, layers=(0,), seeds=(0,), args=args, settings={}, halving=False,
        folder=tmp_path,
    )  # fmt: skip
    entry = {"stop": None, "curve": [], "steps": 8, "seconds": 1.0, "scores": [1.0, 0.0]}
    runs = [{"name": "base", "seed": None}, {"name": "full", "seed": 0}, {"name": "0", "seed": 0}]
    with Journal(tmp_path, {}, Entry) as journal:
        for run in [*runs, runs[0]]:  # the same result again does no harm
            journal.append(entry | run)
    assert sweep.run("serial", {}).scores == {0: 0.5}
    with Journal(tmp_path, {}, Entry) as journal:
        journal.append(entry | runs[1] | {"scores": [1.0, 1.0]})
    with pytest.raises(
        JournalError, match=r"lines 3 and 6 of .*journal\.jsonl have different scores of 'full'"
    ):
        sweep.run("serial", {})
