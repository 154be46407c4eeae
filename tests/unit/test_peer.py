"""`make test-peer` counts what it says it counts."""

from pathlib import Path

import pytest

from tests.peer.comparing import Result, compared, different_trainings, known, results

PASSES, FAILS = Result("passed"), Result("failed", "AssertionError: no")


def test_only_what_passes_on_trl_counts():
    plain = {"a": PASSES, "b": FAILS, "c": Result("skipped")}
    found = compared(plain, {"a": PASSES, "b": FAILS, "c": FAILS}, ())
    assert (found.run, found.passed, found.failed, found.stale) == (1, 1, {}, [])


@pytest.mark.parametrize("masked", [{"a": FAILS}, {"a": Result("skipped")}, {}])
def test_what_does_not_pass_on_a_masked_trainer_fails(masked: dict[str, Result]):
    found = compared({"a": PASSES}, masked, ())
    assert (found.run, found.passed, list(found.failed)) == (1, 0, ["a"])
    assert compared({"a": PASSES}, masked, ["a"]).failed == {}


def test_a_listed_test_that_passes_is_stale():
    plain = {"a": PASSES, "b": FAILS}
    found = compared(plain, {"a": PASSES, "b": PASSES}, ["a", "b", "of another version"])
    assert found.stale == ["a"]


def test_trainings_are_compared_where_both_pass():
    plain = {"a": Result("passed", trainings=["1", "2"]), "b": Result("failed", trainings=["3"])}
    masked = {"a": Result("passed", trainings=["1", "4"]), "b": Result("passed", trainings=["5"])}
    assert different_trainings(plain, masked) == (2, ["a"])


def test_files(tmp_path: Path):
    (tmp_path / "known.toml").write_text(
        '[[difference]]\nreason = "why"\ntests = ["a"]\n'
        '[[difference]]\nreason = "why"\nselections = ["last"]\ntests = ["b"]\n'
    )
    assert known(tmp_path / "known.toml", "last") == {"a", "b"}
    assert known(tmp_path / "known.toml", "full") == {"a"}
    line = '{"test": "a", "outcome": "passed", "why": "", "trainings": ["1"], "seconds": 1.0}\n'
    (tmp_path / "plain.jsonl").write_text(line)
    assert results(tmp_path / "plain.jsonl") == {"a": Result("passed", "", ["1"])}
