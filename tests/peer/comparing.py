"""What TRL's tests say of masked trainers, against what they say of TRL's own."""

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PASSED = "passed"
PLAIN, BY_HAND = "plain", "by hand"
SELECTIONS = ("full", "all", "last")
SAME = {"full": PLAIN, "last": BY_HAND}
"""Which trainings end at the same bits as which."""


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
    """Tests that are known to fail, and did not."""


@dataclass(frozen=True)
class Trainings:
    """Of the tests that pass on both, those of one selection against those it has to equal."""

    run: int
    different: list[str]
    """Tests with a training that ends elsewhere; without those that are known to."""
    stale: list[str]
    """Tests that are known to end elsewhere, and did not."""


def results(path: Path) -> dict[str, Result]:
    """Results by test, from a file that `peer_plugin` has written: the last line of each counts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["test"]: Result(line["outcome"], line["why"], line["trainings"]) for line in lines}


def known(path: Path, selection: str, kind: str = "difference") -> set[str]:
    """The tests that are listed with a reason why they differ on masked trainers.

    Args:
        path: A file like `known.toml`.
        selection: What trains.
        kind: `"difference"` of tests that fail, `"training"` of those that pass and end elsewhere.

    Returns:
        Those listed for this selection, or for any.
    """
    listed = tomllib.loads(path.read_text()).get(kind, [])
    groups = [group for group in listed if selection in group.get("selections", [selection])]
    return {test for group in groups for test in group["tests"]}


def compared(
    plain: Mapping[str, Result],
    masked: Mapping[str, Result],
    listed: Collection[str],
    whole: bool = True,
) -> Comparison:
    """Compare what passes; a test that was not run on masked trainers is one that fails.

    Args:
        plain: With TRL's trainers.
        masked: With masked ones.
        listed: Tests that are known to fail on masked trainers.
        whole: Whether all tests were asked for: a listed one that there is not is then stale.

    Returns:
        What passes, what should, and what should not.
    """
    counted = [test for test, result in plain.items() if result.outcome == PASSED]
    missing = Result("not run", "not run")
    now = {test: masked.get(test, missing) for test in counted}
    failed = {test: result.why for test, result in now.items() if result.outcome != PASSED}
    passes = {test for test, result in masked.items() if result.outcome == PASSED}
    gone = {*listed} - plain.keys() if whole else set()
    return Comparison(
        run=len(counted),
        passed=len(counted) - len(failed),
        failed={test: why for test, why in failed.items() if test not in listed},
        stale=sorted(passes & {*listed} | gone),
    )


def trainings(
    plain: Mapping[str, Result],
    masked: Mapping[str, Result],
    same: Mapping[str, Result],
    listed: Collection[str],
    whole: bool = True,
) -> Trainings:
    """Compare where trainings end, bit for bit.

    Args:
        plain: With TRL's trainers; of the tests that pass here and on masked ones,
        masked: the trainings on these are compared,
        same: with the trainings of the same tests here, whatever else came of them: a test that
            wants every parameter changed fails where most were frozen by hand.
        listed: Tests whose trainings are known to end elsewhere.
        whole: Whether all tests were asked for: a listed one that there is not is then stale.

    Returns:
        How many there are, and the tests of those that do not end as they should.
    """
    number, different, equal = 0, [], set()
    for test, result in plain.items():
        ends = masked.get(test, Result("not run"))
        if {result.outcome, ends.outcome} != {PASSED} or not result.trainings:
            continue
        number += len(result.trainings)
        if ends.trainings != same.get(test, Result("not run")).trainings:
            different.append(test)
        else:
            equal.add(test)
    return Trainings(
        run=number,
        different=[test for test in different if test not in listed],
        stale=sorted((equal | {*listed} - plain.keys() if whole else equal) & {*listed}),
    )


def judged(
    found: Mapping[str, Mapping[str, Result]], path: Path, whole: bool = True
) -> tuple[bool, str]:
    """Judge all that was run.

    Args:
        found: By mode, `"plain"` among them.
        path: The file of known differences.
        whole: Whether all tests were asked for.

    Returns:
        Whether everything is as it should be or known not to, and what to print.
    """
    plain = found[PLAIN]
    passes = sum(result.outcome == PASSED for result in plain.values())
    lines = [
        f"plain: {passes} of {len(plain)} tests pass on TRL's trainers: the others do not count"
    ]
    wrong = [] if passes else ["no test passes on TRL's trainers: their log says why"]
    for selection in SELECTIONS:
        if selection not in found:
            lines.append(f"{selection}: not run")
            continue
        masked = found[selection]
        tests = compared(plain, masked, known(path, selection), whole)
        lines.append(f"{selection}: {tests.passed} of {tests.run} tests pass")
        for test, why in tests.failed.items():
            wrong.append(f"{selection}: fails: {test}: {(why.splitlines() or ['no reason'])[0]}")
        wrong += [f"{selection}: in known.toml, and does not fail: {test}" for test in tests.stale]
        other = SAME.get(selection)
        if other and other in found:
            ends = trainings(plain, masked, found[other], known(path, selection, "training"), whole)
            if whole and not ends.run:
                wrong.append(f"{selection}: no training was compared")
            lines.append(
                f"  {ends.run} trainings; those of {len(ends.different)} tests do not end as "
                f"{other} TRL's, and are not in known.toml"
            )
            wrong += [f"{selection}: not the bits of {other} TRL: {t}" for t in ends.different]
            wrong += [f"{selection}: in known.toml, and the same bits: {t}" for t in ends.stale]
        elif other:
            lines.append(f"  trainings not compared: {other!r} was not run")
    return not wrong, "\n".join([*lines, *wrong])
