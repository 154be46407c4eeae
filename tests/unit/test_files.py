"""Files and folders that appear whole or not at all."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from layerrl.files import made_whole, written_whole


def test_a_file_is_the_old_one_until_the_block_has_ended(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("old")
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
        assert temporary.name.startswith("_")  # what transformers does not push
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["README.md"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_was_cut_short_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "README.md"
    path.write_text("old")

    def cut_short():
        with written_whole(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(type(error)) as raised:
        cut_short()
    assert raised.value is error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["README.md"]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    path = tmp_path / "README.md"
    for text in ("first", "second"):
        with written_whole(path) as temporary:
            temporary.write_text(text)
        temporary.write_text("much longer than what comes next")
    with written_whole(path) as temporary:
        temporary.write_text("third")
    assert path.read_text() == "third"
    assert os.listdir(tmp_path) == ["README.md"]


def test_what_was_not_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "report.json"):
        pass
    assert os.listdir(tmp_path) == []


def in_a_fork(work: Any) -> int:
    """How a process ends that does something; negative: the signal that ended it."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_killed(path: Path, number: int) -> None:
    with made_whole(path) as folder:
        (folder / "half").write_text("of it")
        os.kill(os.getpid(), number)


class TestFolder:
    def test_is_there_when_the_block_has_ended(self, tmp_path):
        with made_whole(tmp_path / "above" / "out") as folder:
            (folder / "a").write_text("1")
            assert not (tmp_path / "above" / "out").exists()
        assert os.listdir(tmp_path / "above") == ["out"]
        assert (tmp_path / "above" / "out" / "a").read_text() == "1"

    def test_of_a_block_that_failed_is_gone(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), made_whole(tmp_path / "out"):
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
    @pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
    def test_of_a_killed_process_goes_with_the_next(self, tmp_path, number):
        value = signal.Signals[number]
        (tmp_path / ".other.1").mkdir()
        (tmp_path / ".out.1").mkdir()  # no name that is given here
        for _ in range(2):
            assert in_a_fork(lambda: is_killed(tmp_path / "out", value)) == -value
        assert len(os.listdir(tmp_path)) == 3
        with made_whole(tmp_path / "out"):
            pass
        assert sorted(os.listdir(tmp_path)) == [".other.1", ".out.1", "out"]

    def test_of_a_living_process_stays(self, tmp_path):
        """Here of another thread, whose lock is as much another's."""
        entered, go_on = threading.Event(), threading.Event()
        failed: list[OSError] = []

        def first() -> None:
            try:
                with made_whole(tmp_path / "out") as folder:
                    entered.set()
                    go_on.wait(600)
                    (folder / "by").write_text("first")
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=first)
        thread.start()
        assert entered.wait(600)
        with made_whole(tmp_path / "out") as folder:
            (folder / "by").write_text("second")
        go_on.set()
        thread.join()
        assert len(failed) == 1  # by the rename alone: its own folder was there until then
        assert "not empty" in str(failed[0]) or "exists" in str(failed[0])
        assert os.listdir(tmp_path) == ["out"]
        assert (tmp_path / "out" / "by").read_text() == "second"
