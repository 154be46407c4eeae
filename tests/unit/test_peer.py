"""`make test-peer` counts what it says it counts."""

import json
from pathlib import Path

import pytest
import trl

from tests.peer import __main__ as command
from tests.peer.comparing import BY_HAND, PLAIN, Result, compared, judged, known, results, trainings

PASSES, FAILS = Result("passed"), Result("failed", "AssertionError: no")
KNOWN = """
[[difference]]
reason = "why"
tests = ["a"]
[[difference]]
reason = "why"
selections = ["last"]
tests = ["b"]
[[training]]
reason = "why"
selections = ["last"]
tests = ["c"]
"""
HERE = Result("passed", trainings=["1", "2"])
ELSEWHERE = Result("passed", trainings=["1", "3"])


def test_only_what_passes_on_trl_counts():
    plain = {"a": PASSES, "b": FAILS, "c": Result("skipped")}
    found = compared(plain, {"a": PASSES, "b": FAILS, "c": FAILS}, ())
    assert (found.run, found.passed, found.failed, found.stale) == (1, 1, {}, [])


@pytest.mark.parametrize("masked", [{"a": FAILS}, {"a": Result("skipped")}, {}])
def test_what_does_not_pass_on_a_masked_trainer_fails(masked: dict[str, Result]):
    found = compared({"a": PASSES}, masked, ())
    assert (found.run, found.passed, list(found.failed)) == (1, 0, ["a"])
    assert compared({"a": PASSES}, masked, ["a"]).failed == {}


def test_a_listed_test_that_did_not_fail_is_stale():
    plain = {"a": PASSES, "b": FAILS, "c": FAILS, "d": PASSES}
    masked = {"a": PASSES, "b": PASSES, "c": FAILS, "d": FAILS}
    listed = ["a", "b", "c", "d", "nowhere"]
    assert compared(plain, masked, listed).stale == ["a", "b", "nowhere"]
    assert compared(plain, masked, listed, whole=False).stale == ["a", "b"]


@pytest.mark.parametrize(
    ("end", "different"),
    [(HERE, []), (ELSEWHERE, ["a"]), (Result("passed", trainings=["1"]), ["a"]), (PASSES, ["a"])],
)
def test_trainings_are_compared_where_both_pass(end: Result, different: list[str]):
    failed = Result("failed", trainings=["5"])
    plain = {"a": HERE, "b": HERE, "c": failed, "d": HERE, "e": PASSES}
    masked = {"a": end, "b": failed, "c": HERE, "e": PASSES}
    found = trainings(plain, masked, plain, ())
    assert (found.run, found.different) == (2, different)
    assert trainings(plain, masked, plain, ["a"]).different == []
    assert trainings(plain, masked, plain, ["a"]).stale == [*{"a"} - {*different}]
    assert trainings(plain, masked, plain, ["nowhere"]).stale == ["nowhere"]
    assert trainings(plain, masked, plain, ["nowhere"], whole=False).stale == []


def test_a_training_by_hand_counts_whatever_its_test_wanted():
    by_hand = {"a": Result("failed", "every parameter changed", ["1", "3"])}
    assert trainings({"a": HERE}, {"a": ELSEWHERE}, by_hand, ()).different == []
    assert trainings({"a": HERE}, {"a": ELSEWHERE}, {}, ()).different == ["a"]


def all_right() -> dict[str, dict[str, Result]]:
    """Outcomes by mode that are as `KNOWN` has them."""
    plain = {"a": HERE, "b": HERE, "c": HERE, "d": HERE}
    by_hand = {test: Result("failed", "", HERE.trainings) for test in plain}
    last = {"a": FAILS, "b": FAILS, "c": ELSEWHERE, "d": HERE}
    full = plain | {"a": FAILS}
    return {PLAIN: plain, BY_HAND: by_hand, "full": full, "all": full, "last": last}


@pytest.mark.parametrize(
    ("mode", "test", "outcome", "says"),
    [
        ("full", "d", ELSEWHERE, "full: not the bits of plain TRL: d"),
        ("last", "d", ELSEWHERE, "last: not the bits of by hand TRL: d"),
        ("last", "c", HERE, "last: in known.toml, and the same bits: c"),
        ("all", "d", FAILS, "all: fails: d: AssertionError: no"),
        ("full", "d", Result("skipped"), "full: fails: d: no reason"),
        ("all", "a", HERE, "all: in known.toml, and does not fail: a"),
        ("last", "b", HERE, "last: in known.toml, and does not fail: b"),
        ("plain", "a", None, "full: in known.toml, and does not fail: a"),
        ("full", "d", None, "full: fails: d: not run"),
    ],
)
def test_the_command_fails_for_whatever_is_not_as_it_should_be(
    tmp_path: Path, mode: str, test: str, outcome: Result | None, says: str
):
    listed = tmp_path / "known.toml"
    listed.write_text(KNOWN)
    found = all_right()
    right, text = judged(found, listed)
    assert right, text
    if outcome is None:
        del found[mode][test]
    else:
        found[mode][test] = outcome
    right, text = judged(found, listed)
    assert not right
    assert says in text.splitlines()


def test_no_training_is_no_success(tmp_path: Path):
    (tmp_path / "known.toml").write_text("")
    found = {PLAIN: {"a": PASSES}, "full": {"a": PASSES}}
    assert judged(found, tmp_path / "known.toml", whole=False)[0]
    right, text = judged(found, tmp_path / "known.toml")
    assert not right
    assert "full: no training was compared" in text


def test_nothing_that_passes_is_no_success(tmp_path: Path):
    (tmp_path / "known.toml").write_text("")
    right, text = judged({PLAIN: {"a": FAILS}, "full": {}}, tmp_path / "known.toml")
    assert not right
    assert "no test passes on TRL's trainers" in text


@pytest.mark.parametrize(("full", "status"), [("1", 0), ("2", 1)])
def test_the_exit_status_is_that_of_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str, status: int
):
    checkout = tmp_path / "trl"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "tests" / "test_sft_trainer.py").touch()
    monkeypatch.setattr(command, "CACHE", tmp_path)
    monkeypatch.setattr("sys.argv", ["peer", str(checkout), "-k", "a", "--modes", "plain", "full"])
    for mode, end in (("plain", "1"), ("full", full)):
        line = {"test": "a", "outcome": "passed", "why": "", "trainings": [end]}
        file = command.results_of(mode, checkout, "a")
        file.write_text(json.dumps(line | {"outcome": "begun"}) + "\n" + json.dumps(line) + "\n")
    assert command.main() == status
    (checkout / "tests" / "test_sft_trainer.py").write_text("other tests")
    monkeypatch.setattr("sys.argv", ["peer", str(checkout), "-k", "a", "--modes"])
    with pytest.raises(SystemExit):
        command.main()


def test_a_run_that_broke_off_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("CACHE", "HERE"):  # where there is no plugin
        monkeypatch.setattr(command, name, tmp_path)
    (tmp_path / "full.partial").write_text('{"test": "a", "outcome": "passed"}\n{"te')
    with pytest.raises(SystemExit, match="full: pytest ended early, with status"):
        command.run("full", tmp_path, tmp_path, "", tmp_path / "full.jsonl")
    assert (tmp_path / "full.partial").read_text() == '{"test": "a", "outcome": "passed"}\n'
    assert not (tmp_path / "full.jsonl").exists()


PLUGIN = """
import importlib.util, os
TRL = importlib.util.find_spec("trl").origin

def pytest_sessionfinish():
    with open(os.environ["LAYERRL_PEER_RESULTS"].replace(".partial", ".jsonl"), "w") as file:
        file.write(TRL)
"""


def test_the_tests_are_the_checkouts_and_the_trainers_those_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "HERE", tmp_path)
    (tmp_path / "peer_plugin.py").write_text(PLUGIN)
    checkout = tmp_path / "checkout"
    for file in ("trl/__init__.py", "tests/__init__.py", "tests/test_a_trainer.py"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).touch()
    command.run("full", checkout, tmp_path, "", tmp_path / "full.jsonl")
    assert Path((tmp_path / "full.jsonl").read_text()) == Path(trl.__file__)


TESTS = """
import os, signal
from pathlib import Path

RUN = Path("run")

def test_a():
    RUN.write_text("a")

def test_b():
    with RUN.open("a") as file:
        file.write("b")
    if len(RUN.read_text()) <= ENDINGS + 1:
        ENDING

def test_c():
    with RUN.open("a") as file:
        file.write("c")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "endings", "status"),
    [("os.kill(os.getpid(), signal.SIGKILL)", 1, -9), ("raise KeyboardInterrupt", 2, 2)],
    ids=["killed", "Ctrl-C"],
)
def test_a_run_that_was_ended_goes_on_at_the_test_it_was_in(
    tmp_path: Path, ending: str, endings: int, status: int
):
    tests = TESTS.replace("ENDINGS", str(endings)).replace("ENDING", ending)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a_trainer.py").write_text(tests)
    file = tmp_path / "full.jsonl"
    for _ in range(endings):
        with pytest.raises(SystemExit, match=f"with status {status}"):
            command.run("full", tmp_path, tmp_path, "", file)
    command.run("full", tmp_path, tmp_path, "", file)
    assert (tmp_path / "run").read_text() == f"ab{'b' * endings}c"
    assert [result.outcome for result in results(file).values()] == ["passed"] * 3


def test_files(tmp_path: Path):
    (tmp_path / "known.toml").write_text(KNOWN)
    assert known(tmp_path / "known.toml", "last") == {"a", "b"}
    assert known(tmp_path / "known.toml", "full") == {"a"}
    assert known(tmp_path / "known.toml", "last", "training") == {"c"}
    line = '{"test": "a", "outcome": "passed", "why": "", "trainings": ["1"], "seconds": 1.0}\n'
    (tmp_path / "plain.jsonl").write_text(line)
    assert results(tmp_path / "plain.jsonl") == {"a": Result("passed", "", ["1"])}
