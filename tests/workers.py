"""Why a process of pytest-xdist died: its own log, and how it ended.

A worker has its stack written where a signal ends it, SIGTERM included, below a line for each test
that it began, with the most memory it had until then. SIGKILL leaves the lines alone: where memory
is the largest, it was the machine that ran out of it.
"""

import faulthandler
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

GIGABYTES = 3
"""Of memory for each worker, with what its tests start."""
_LAST_LINES = 60

log: TextIO | None = None
ended: list[str] = []
"""What is told at the end of a run, of each worker that died."""


def start(folder: Path) -> None:
    """In a worker: write to a log that outlives it."""
    global log
    folder.mkdir(parents=True, exist_ok=True)
    log = log_of(folder, os.environ["PYTEST_XDIST_WORKER"]).open("w", buffering=1, encoding="utf-8")
    faulthandler.enable(log)
    if hasattr(faulthandler, "register"):  # POSIX
        faulthandler.register(signal.SIGTERM, log, chain=True)


def begin(test: str) -> None:
    """In a worker: a test begins."""
    if log is not None:
        log.write(f"{most_memory() >> 20:6d} MiB  {test}\n")


def end(folder: Path, node: Any) -> None:
    """In the process that started it: a worker died."""
    status = None
    with suppress(Exception):  # a private name of execnet, without which the log has to do
        status = node.gateway._io.popen.wait(5)
    file = log_of(folder, node.gateway.id)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else ["no log"]
    how = f"exit status {status}" if status is None or status >= 0 else _name(-status)
    ended.append("\n".join([f"{node.gateway.id} died: {how}; {file}:", *lines[-_LAST_LINES:]]))


def log_of(folder: Path, name: str) -> Path:
    """A worker's log."""
    return folder / f"{name}.log"


def most_memory() -> int:
    """Bytes that this process had at most."""
    with suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0


def as_many_as_fit() -> int | None:
    """Workers that memory is enough for; None where that is not known."""
    sizes = []
    for file, unit in (("/proc/meminfo", 1024), ("/sys/fs/cgroup/memory.max", 1)):
        with suppress(OSError, ValueError, StopIteration):
            text = Path(file).read_text(encoding="utf-8")
            line = next(line for line in text.splitlines() if line[:1].isdigit() or "Avail" in line)
            sizes.append(int(line.removeprefix("MemAvailable:").split()[0]) * unit)
    return max(1, min(sizes) // (GIGABYTES << 30)) if sizes else None


def _name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"
