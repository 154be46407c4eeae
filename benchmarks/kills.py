"""Processes killed while they write: nothing is half there, and the next call makes it good.

    python benchmarks/kills.py --times 100          # each operation, SIGTERM and SIGKILL in turn
    python benchmarks/kills.py --times 20 --operations merge push

Every second process is killed at a random moment of its operation, the others just before one of
its calls that open, make, rename or delete a file, in an order that visits all of them. What lies
there then must be whole or absent, and the same call must succeed, leave nothing else behind, and
make what an undisturbed one makes. Each process is a fork of this one, which has everything
imported. Runs are lines of a journal in `--output`; the same command continues after them. POSIX
only.
"""

import argparse
import hashlib
import math
import os
import random
import shutil
import signal
import socketserver
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from layerrl import merge_delta, save_delta, select_layers  # noqa: E402
from layerrl.delta import DeltaBase, push_delta  # noqa: E402
from layerrl.journal import Journal  # noqa: E402
from tests import hub  # noqa: E402
from tests.grpo import make, tokenizer  # noqa: E402
from tests.integration.test_probe import numbers, probe  # noqa: E402
from tests.models import tiny  # noqa: E402
from tests.runs import load, saved, train  # noqa: E402

WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
LINES = 200


class Operation:
    """Something that writes: by default into `folder / "out"`, which is its result."""

    def __init__(self, given: Path) -> None:
        self.given = given

    def prepare(self, folder: Path) -> None:
        """Before the process that is killed."""

    def run(self, folder: Path) -> None:
        """What is killed, and then called again."""
        raise NotImplementedError

    def check_killed(self, folder: Path, expected: Any) -> None:
        """Raise if something is half there."""
        if (folder / "out").exists():
            assert self.result(folder) == expected, "half-written under its final name"
            shutil.rmtree(folder / "out")  # or the next call would refuse it

    def result(self, folder: Path) -> Any:
        """To compare with an undisturbed one's."""
        return contents(folder / "out")

    def left_over(self, folder: Path) -> list[str]:
        """What a call that went well should not leave."""
        return sorted({*os.listdir(folder)} - {"out"})


class Save(Operation):
    """`save_delta`."""

    def run(self, folder: Path) -> None:
        model = load(self.given / "base")
        selection = select_layers(model, 2)
        base = DeltaBase.of(model, selection)
        with torch.no_grad():
            for parameter in selection.parameters(model).values():
                parameter.add_(1)
        save_delta(
            model, folder / "out", selection=selection, base=base, processing_class=tokenizer()
        )


class Merge(Operation):
    """`merge_delta`."""

    def run(self, folder: Path) -> None:
        merge_delta(self.given / "base", self.given / "delta", folder / "out")


class Push(Operation):
    """`push_delta`, to the hub of the tests, which lives in the process that forks."""

    def __init__(self, given: Path, server: hub.Hub) -> None:
        super().__init__(given)
        self.server, self.files = server, {}

    def prepare(self, folder: Path) -> None:
        self.server.repositories.clear()

    def run(self, folder: Path) -> None:
        with hub.at(self.server.url, folder / "cache", token=hub.WRITES):
            push_delta(self.given / "delta", "me/delta")

    def check_killed(self, folder: Path, expected: Any) -> None:
        time.sleep(0.05)  # a request that was sent may still be answered
        repository = self.server.repositories.get("me/delta")
        if repository is not None and {*repository.files()} != {".gitattributes"}:
            assert self.result(folder) == expected, "a commit of half a delta"

    def result(self, folder: Path) -> Any:
        files = self.server.repositories["me/delta"].files()
        return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    def left_over(self, folder: Path) -> list[str]:
        return sorted({*os.listdir(folder)} - {"cache"})


class Lines(Operation):
    """`Journal.append`."""

    def run(self, folder: Path) -> None:
        with Journal(folder / "out", {"of": "kills"}) as journal:
            for number in range(len(journal.entries), LINES):
                journal.append({"number": number, "text": "x" * 500})

    def check_killed(self, folder: Path, expected: Any) -> None:
        if (folder / "out").exists():
            with Journal(folder / "out", {"of": "kills"}) as journal:
                numbers = [entry["number"] for entry in journal.entries]
            assert numbers == list(range(len(numbers))), "an entry is lost"


class Sweep(Operation):
    """`contribution_probe(method="train")`."""

    def run(self, folder: Path) -> None:
        found = probe(tiny("llama", 3), folder / "out", layers=[1])
        (folder / "numbers").write_text(repr(numbers(found)), encoding="utf-8")

    def check_killed(self, folder: Path, expected: Any) -> None:
        pass  # the journal's lines are those of the operation above

    def result(self, folder: Path) -> Any:
        return (folder / "numbers").read_text(encoding="utf-8")

    def left_over(self, folder: Path) -> list[str]:
        return [name for name in os.listdir(folder / "out") if name[0] in "._"]


class Checkpoints(Operation):
    """A training that saves every step, and resumes."""

    def run(self, folder: Path) -> None:
        from layerrl.trainer.checkpoints import last_complete

        last = last_complete(folder / "out")
        if last is not None and last.name == "checkpoint-4":
            return  # it was killed after its last save: transformers would train a step more
        resume = {} if last is None else {"resume_from_checkpoint": True}
        trainer = make(
            load(self.given / "base"), folder / "out", selection=2, max_steps=4, beta=0.04,
            save_strategy="steps", save_steps=1, save_total_limit=2,
        )  # fmt: skip
        train(trainer, **resume)

    def check_killed(self, folder: Path, expected: Any) -> None:
        from layerrl.trainer.checkpoints import is_complete

        for path in (folder / "out").glob("checkpoint-*"):
            if is_complete(path):
                lost = {*expected} - {*contents(path)}
                assert not lost, f"{path.name} lacks {lost}, and would be resumed"

    def result(self, folder: Path) -> Any:
        last = folder / "out" / "checkpoint-4"
        return {
            name: digest
            for name, digest in contents(last).items()
            # The others hold times and the names of folders.
            if name.endswith((".safetensors", ".pt", ".pth")) or name == "delta.json"
        }

    def left_over(self, folder: Path) -> list[str]:
        # What is left of an older checkpoint is transformers' to delete, with a later save.
        return [name for name in os.listdir(folder / "out") if name[0] in "._"]


def contents(folder: Path) -> dict[str, str]:
    """Name to digest of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def forked(work: Callable[[], Any], log: Path) -> int:
    """The id of a process that does something, and prints to a file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # a fork: what ends the process that it is a copy of is not its own


def watched(folder: Path, call: Callable[[str], None]) -> None:
    """Call something before everything that changes a file below a folder."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event in WRITING else ""
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # of a folder that is deleted
            with suppress(OSError):  # no /proc
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if path.startswith(str(folder)):
            writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes:
                call(event)

    sys.addaudithook(hook)


def calls_of(operation: Operation, folder: Path, log: Path) -> tuple[float, int]:
    """Seconds and number of writing calls of an operation that is let alone."""
    made = folder.with_name("calls")

    def work() -> None:
        with made.open("a", encoding="utf-8") as stream:
            watched(folder, lambda event: stream.write(f"{event}\n"))
            operation.run(folder)

    operation.prepare(folder)
    begun = time.monotonic()
    _, status = os.waitpid(forked(work, log), 0)
    if status:
        sys.exit(f"{type(operation).__name__} fails by itself: see {log}")
    seconds = time.monotonic() - begun
    calls = len(made.read_text(encoding="utf-8").splitlines())
    made.unlink()
    return seconds, calls


def killed(
    operation: Operation, folder: Path, log: Path, case: dict[str, Any], seconds: float, calls: int
) -> bool:
    """Start an operation and kill it; whether it was still running."""
    number = signal.Signals[case["signal"]]
    draw = random.Random(f"{case['operation']} {case['number']}")
    by_call = bool(case["number"] % 2 and calls)
    calls = max(calls, 1)
    # Fifty kills are spread over all calls, and the next fifty come before others.
    strides = range(max(1, calls // 50), calls + 2)
    at = case["number"] // 2 * next(n for n in strides if math.gcd(n, calls) == 1) % calls
    count = 0

    def work() -> None:
        def count_down(event: str) -> None:
            nonlocal count
            if count == at:
                os.kill(os.getpid(), number)
            count += 1

        if by_call:
            watched(folder, count_down)
        operation.run(folder)

    pid = forked(work, log)
    if not by_call:
        time.sleep(draw.uniform(0, seconds))
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise AssertionError("it failed before it was killed")
    return os.WIFSIGNALED(status)


def trial(
    operation: Operation, folder: Path, case: dict[str, Any], measured: tuple[Any, float, int]
) -> dict[str, Any]:
    """One process killed, and one that makes it good."""
    expected, seconds, calls = measured
    log = folder.with_name(f"{folder.name}.log")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log.unlink(missing_ok=True)
    try:
        operation.prepare(folder)
        in_time = killed(operation, folder, log, case, seconds, calls)
        operation.check_killed(folder, expected)
        _, status = os.waitpid(forked(lambda: operation.run(folder), log), 0)
        assert status == 0, f"the next call failed: {log.read_text(encoding='utf-8')[-1500:]}"
        assert operation.result(folder) == expected, "the next call made something else"
        assert not operation.left_over(folder), f"left over: {operation.left_over(folder)}"
    except AssertionError as error:
        return {"found": "failed", "why": str(error), "killed": True}
    return {"found": "survived", "killed": in_time}


@contextmanager
def operations(given: Path) -> Iterator[dict[str, Operation]]:
    """All of them, by name, with what they read."""
    saved(given / "base")
    # Requests of processes that are gone by now are no news.
    with mock.patch.object(socketserver.BaseServer, "handle_error"), hub.served() as server:
        made = {
            "merge": Merge(given), "save": Save(given), "checkpoint": Checkpoints(given),
            "sweep": Sweep(given), "push": Push(given, server), "journal": Lines(given),
        }  # fmt: skip
        (given / "saved").mkdir()
        forked_save = forked(lambda: made["save"].run(given / "saved"), given / "log")
        os.waitpid(forked_save, 0)
        (given / "saved" / "out").rename(given / "delta")
        yield made


NAMES = ("merge", "save", "checkpoint", "sweep", "push", "journal")


def main(arguments: list[str] | None = None) -> int:
    """Kill what the journal does not have yet, and say how many survived."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=100, help="kills of each operation")
    parser.add_argument("--operations", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "kills")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    failed = 0
    with (
        tempfile.TemporaryDirectory() as temporary,
        Journal(options.output, {"kills": 1}) as journal,
        operations(Path(temporary)) as all_of_them,
    ):
        for name in options.operations:
            done = [entry for entry in journal.entries if entry["operation"] == name]
            kills = sum(entry["killed"] for entry in done)
            if kills < options.times:
                measured = undisturbed(all_of_them[name], Path(temporary) / name)
            while kills < options.times:
                number = len(done)
                case = {
                    "operation": name, "number": number,
                    "signal": ("SIGTERM", "SIGKILL")[number // 2 % 2],
                }  # fmt: skip
                found = trial(all_of_them[name], Path(temporary) / name, case, measured)
                journal.append(case | found)
                done.append(case | found)
                kills += found["killed"]
            good = sum(entry["killed"] and entry["found"] == "survived" for entry in done)
            print(f"{name}: {good} of {kills} kills survived", flush=True)
            for entry in done:
                if entry["found"] != "survived":
                    failed += 1
                    print(f"  {entry['number']} {entry['signal']}: {entry['why']}", flush=True)
    return 1 if failed else 0


def undisturbed(operation: Operation, folder: Path) -> tuple[Any, float, int]:
    """Its result, seconds and number of writing calls."""
    folder.mkdir()
    log = folder.with_name("undisturbed.log")
    seconds, calls = calls_of(operation, folder, log)
    result = operation.result(folder)
    assert not operation.left_over(folder), operation.left_over(folder)
    return result, seconds, calls


if __name__ == "__main__":
    sys.exit(main())
