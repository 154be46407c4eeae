"""Files that appear whole or not at all."""

import os

import pytest

from layerrl.files import written_whole


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
