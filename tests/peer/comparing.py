"""What TRL's tests say of masked trainers, against what they say of TRL's own."""

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PASSED = "passed"


@dataclass(frozen=True)
class Result:
    """What came of one test."""

    outcome: str
    why: str = ""
    trainings: list[str] = field(default_factory=list)
    """The digest of the parameters at the end of each training."""


@dataclass(frozen=True)
class Comparison:
    """Of one selection with plain TRL."""

    run: int
    """Tests that pass with TRL's trainers; the others say nothing about masked ones."""
    passed: int
    failed: dict[str, str]
    """Tests that fail on masked trainers only, and how; without those that are known to."""
    stale: list[str]
    """Tests that are known to fail, and pass."""


def results(path: Path) -> dict[str, Result]:
    """Results by test, from a file that `peer_plugin` has written."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["test"]: Result(line["outcome"], line["why"], line["trainings"]) for line in lines}


def known(path: Path, selection: str) -> set[str]:
    """The tests that are listed with a reason why they fail on masked trainers.

    Args:
        path: A file like `known.toml`.
        selection: What trains.

    Returns:
        Those listed for this selection, or for any.
    """
    listed = tomllib.loads(path.read_text()).get("difference", [])
    groups = [group for group in listed if selection in group.get("selections", [selection])]
    return {test for group in groups for test in group["tests"]}


def compared(
    plain: Mapping[str, Result], masked: Mapping[str, Result], listed: Collection[str]
) -> Comparison:
    """Compare what passes; a test that was not run on masked trainers is one that fails."""
    counted = [test for test, result in plain.items() if result.outcome == PASSED]
    missing = Result("not run", "not run")
    now = {test: masked.get(test, missing) for test in counted}
    failed = {test: result.why for test, result in now.items() if result.outcome != PASSED}
    return Comparison(
        run=len(counted),
        passed=len(counted) - len(failed),
        failed={test: why for test, why in failed.items() if test not in listed},
        stale=sorted(test for test in listed if test in now and test not in failed),
    )


def different_trainings(
    plain: Mapping[str, Result], masked: Mapping[str, Result]
) -> tuple[int, list[str]]:
    """Compare where the trainings of tests that pass on both end, bit for bit.

    Returns:
        How many trainings there are, and the test of each that ends elsewhere.
    """
    number, different = 0, []
    for test, result in plain.items():
        other = masked.get(test)
        if other is None or {result.outcome, other.outcome} != {PASSED}:
            continue
        number += len(result.trainings)
        pairs = zip(result.trainings, other.trainings, strict=True)
        different += [test for one, another in pairs if one != another]
    return number, different
