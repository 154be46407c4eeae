"""Run TRL's tests of its trainers on masked ones: what `make test-peer TRL=path` does.

    python -m tests.peer PATH-OF-A-CHECKOUT-OF-TRL [--modes full last]

Plain TRL is run first: what fails there, for want of a GPU, a package or a network, does not count.
Everything that passes there must pass with the trained layers selected, unless `known.toml` says
why not; where every parameter trains, each training must end at the same bits. Modes that are not
named are compared as they were when they ran last.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.peer.comparing import Comparison, compared, different_trainings, known, results

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "peer"
PLAIN, BY_HAND = "plain", "by hand"
SELECTIONS = ("full", "all", "last")
# Which trainings end at the same bits as which.
SAME = {"full": PLAIN, "last": BY_HAND}
FILES = (
    *(
        f"tests/test_{name}_trainer.py"
        for name in ("grpo", "rloo", "dpo", "kto", "sft", "reward", "distillation")
    ),
    *(
        f"tests/experimental/test_{name}_trainer.py"
        for name in ("cpo", "gkd", "gmpo", "online_dpo", "orpo", "tpo")
    ),
)


def stand_ins(checkout: Path, environment: dict[str, str]) -> Path:
    """The folder with models and data, made if it is not there."""
    folder = CACHE / "hub"
    if not folder.exists():
        made = CACHE / "hub.partial"
        subprocess.run(["rm", "-rf", str(made)], check=True)
        made.mkdir(parents=True)
        command = [sys.executable, str(HERE / "stand_ins.py"), str(checkout)]
        subprocess.run(command, cwd=made, env=environment, check=True)
        made.rename(folder)
    return folder


def run(mode: str, checkout: Path, options: list[str]) -> None:
    """Run the tests in one process; its output is beside the results."""
    # The folder itself, as a checkout of TRL has a package named tests, too.
    paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    hub = stand_ins(checkout, environment)
    written = CACHE / f"{mode}.partial"
    written.unlink(missing_ok=True)
    environment |= {
        "LAYERRL_PEER": mode,
        "LAYERRL_PEER_HUB": str(hub),
        "LAYERRL_PEER_RESULTS": str(written),
    }
    command = [sys.executable, "-m", "pytest", "-p", "peer_plugin", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, f"--rootdir={checkout}", "-q", "-W", "ignore", "--tb=short"]
    # A file that cannot be imported is one of tests that fail on TRL's trainers.
    command.append("--continue-on-collection-errors")
    files = [name for name in FILES if (checkout / name).exists()]
    with (CACHE / f"{mode}.log").open("w") as log:
        subprocess.run(
            [*command, "-m", "not slow", *options, *files],
            cwd=checkout,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,  # what fails is in the results
        )
    written.rename(CACHE / f"{mode}.jsonl")


def told(selection: str, comparison: Comparison) -> str:
    """One line, and one for each test that is not as it should be."""
    lines = [f"{selection}: {comparison.passed} of {comparison.run} tests pass"]
    lines += [f"  fails: {test}: {why.splitlines()[0]}" for test, why in comparison.failed.items()]
    lines += [f"  passes, and is in known.toml: {test}" for test in comparison.stale]
    return "\n".join(lines)


def main() -> int:
    """Run, compare, print.

    Returns:
        1 if a test fails without being known to, or is known to and passes.
    """
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.peer")
    parser.add_argument("checkout", type=Path)
    modes = (PLAIN, BY_HAND, *SELECTIONS)
    parser.add_argument("--modes", nargs="*", choices=modes, default=modes)
    parser.add_argument("-k", default="", help="tests by name, as pytest has it")
    asked = parser.parse_args()
    checkout = asked.checkout.resolve()
    if not (checkout / FILES[0]).is_file():
        parser.error(f"{checkout} is no checkout of TRL: it has no {FILES[0]}")
    for mode in asked.modes:
        run(mode, checkout, ["-k", asked.k] if asked.k else [])
    found = {mode: results(CACHE / f"{mode}.jsonl") for mode in modes if _ran(mode)}
    right = True
    for selection in filter(found.__contains__, SELECTIONS):
        listed = known(HERE / "known.toml", selection)
        comparison = compared(found[PLAIN], found[selection], listed)
        right = right and not comparison.failed and not comparison.stale
        print(told(selection, comparison))
        other = SAME.get(selection)
        if other in found:
            number, different = different_trainings(found[other], found[selection])
            print(f"  {number - len(different)} of {number} trainings end as {other} TRL's do")
            print(*(f"    not: {test}" for test in different), sep="\n")
    return 0 if right else 1


def _ran(mode: str) -> bool:
    return (CACHE / f"{mode}.jsonl").exists()


if __name__ == "__main__":
    sys.exit(main())
