"""Run TRL's tests of its trainers on masked ones: what `make test-peer TRL=path` does.

    python -m tests.peer PATH-OF-A-CHECKOUT-OF-TRL [--modes full last] [-k NAMES]

Plain TRL is run first: what fails there, for want of a GPU, a package or a network, does not count.
Everything that passes there must pass with the trained layers selected, unless `known.toml` says
why not. Under "full" each training must end at the bits of TRL's, and with the last layer at those
of TRL's with the others frozen by hand.

Results are kept in `.cache/peer` under a digest of what was run: code, tests and versions. A run
that was broken off goes on at the next test, and a mode that has ended is not run again. As many
modes run at a time as there are cores.
"""

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.peer.comparing import BY_HAND, PLAIN, SELECTIONS, judged, results

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "peer"
MODES = (PLAIN, BY_HAND, *SELECTIONS)


def digest(files: Iterable[Path], *others: str) -> str:
    """Of files, of Python's version and of those of all packages: tests skip what is not there."""
    there = {f"{one.name} {one.version}" for one in importlib.metadata.distributions()}
    made = hashlib.sha256(repr([others, sys.version, *sorted(there)]).encode())
    for file in sorted(files):
        made.update(file.read_bytes())
    return made.hexdigest()[:12]


def results_of(mode: str, checkout: Path, names: str) -> Path:
    """The file of a mode's results: another one where anything differs that is run."""
    files = [HERE / "peer_plugin.py", HERE / "stand_ins.py"]
    files += [*checkout.glob("scripts/**/*.py"), *checkout.glob("tests/**/*.py")]
    if mode in SELECTIONS:
        files += ROOT.glob("layerrl/**/*.py")
    return CACHE / f"{mode}-{digest(files, names)}.jsonl"


def environment() -> dict[str, str]:
    """What the checkout's scripts and tests are run with."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # The folder itself, as a checkout of TRL has a package named tests, too.
    paths = [str(HERE), str(ROOT), *map(os.path.abspath, given)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONSAFEPATH": "1",  # the TRL that is installed, not the one that the checkout has
    }


def stand_ins(checkout: Path) -> Path:
    """The folder with models and data, made if it is not there."""
    scripts = [HERE / "stand_ins.py", *checkout.glob("scripts/**/*.py")]
    folder = CACHE / f"hub-{digest(scripts)}"
    if not folder.exists():
        made = CACHE / "hub.partial"
        subprocess.run(["rm", "-rf", str(made)], check=True)
        made.mkdir(parents=True)
        command = [sys.executable, str(HERE / "stand_ins.py"), str(checkout)]
        log = made / "log"
        with log.open("w") as output:
            done = subprocess.run(
                command, cwd=made, env=environment(), stdout=output, stderr=output, check=False
            )
        if done.returncode:
            sys.exit(f"the models and data for the tests were not made: see {log}; run again")
        made.rename(folder)
    return folder


def run(mode: str, checkout: Path, hub: Path, names: str, file: Path) -> None:
    """Run the tests in one process; its output is beside the results.

    Raises:
        SystemExit: If it did not come to its end.
    """
    written = file.with_suffix(".partial")
    if written.exists():  # without a line that was not written to its end
        os.truncate(written, written.read_bytes().rfind(b"\n") + 1)
    settings = {
        "LAYERRL_PEER": mode,
        "LAYERRL_PEER_HUB": str(hub),
        "LAYERRL_PEER_RESULTS": str(written),
    }
    command = [sys.executable, "-m", "pytest", "-p", "peer_plugin", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, f"--rootdir={checkout}", "-q", "-W", "ignore", "--tb=short"]
    # A file that cannot be imported is one of tests that fail on TRL's trainers.
    command += ["--continue-on-collection-errors", "-m", "not slow", "-k", names]
    log = file.with_suffix(".log")
    with log.open("a") as output:
        status = subprocess.run(
            [*command, *trainer_tests(checkout)],
            cwd=checkout,
            env=environment() | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,  # what fails is in the results
        ).returncode
    if not file.exists():
        sys.exit(f"{mode}: pytest ended early, with status {status}: see {log}; run again to go on")


def trainer_tests(checkout: Path) -> list[str]:
    """The files of tests of trainers, those of TRL's stable part first."""
    files = [*checkout.glob("tests/test_*_trainer.py")]
    files += checkout.glob("tests/experimental/test_*_trainer.py")
    return [str(file.relative_to(checkout)) for file in sorted(files, reverse=True)]


def main() -> int:
    """Run, compare, print.

    Returns:
        1 if anything is not as it should be, and not known to be so.
    """
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.peer")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("-k", default="", help="tests by name, as pytest has it")
    asked = parser.parse_args()
    checkout = asked.checkout.resolve()
    if not (checkout / "tests" / "test_sft_trainer.py").is_file():
        parser.error(f"{checkout} is no checkout of TRL: it has no tests/test_sft_trainer.py")
    files = {mode: results_of(mode, checkout, asked.k) for mode in MODES}
    if missing := [mode for mode in asked.modes if not files[mode].exists()]:
        hub = stand_ins(checkout)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda mode: run(mode, checkout, hub, asked.k, files[mode]), missing))
    found = {mode: results(file) for mode, file in files.items() if file.exists()}
    if PLAIN not in found:
        parser.error(f"nothing to compare with: {PLAIN!r} has not been run on these tests")
    right, text = judged(found, HERE / "known.toml", whole=not asked.k)
    print(text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
