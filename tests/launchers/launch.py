"""Starts processes that train together, as torchrun would: on a CPU, with gloo.

They come from a server process that has imported everything once, so that a launch takes seconds.
Of one that hangs, the error shows where each rank stands; `LAYERRL_PATIENCE=60` waits as many
seconds for it.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

import torch

from tests.launchers import worker
from tests.processes import forking

PATIENCE = float(os.environ.get("LAYERRL_PATIENCE", "1800"))
"""Seconds until a launch is said to hang; a busy machine takes minutes."""
_LAST_LINES = 40


def launch(
    folder: Path,
    jobs: dict[str, dict[str, Any]],
    *,
    num_processes: int,
    environment: dict[str, str] | None = None,
) -> dict[str, list[Any]]:
    """Run jobs one after the other in processes of one group.

    Args:
        folder: Where they leave what they found.
        jobs: Name to the arguments of `worker.run`; a list has the arguments of each process.
        num_processes: How many.
        environment: What a launcher sets beside the processes' ranks.

    Returns:
        For each job what `worker.run` gave in each process, or its error as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = forking()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        variables = dict(environment or {})
        if num_processes > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        own = {name: job[rank] if isinstance(job, list) else job for name, job in jobs.items()}
        process = context.Process(target=worker.main, args=(folder, own, variables, PATIENCE))
        process.start()
        processes.append(process)
    try:
        until = time.monotonic() + PATIENCE + 5  # in which ranks that wait write their stacks
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in processes]
        assert codes == [0] * num_processes, _what_happened(folder, codes)
    finally:
        for process in processes:
            process.kill()
    return {
        name: [
            torch.load(folder / f"{name}-{rank}.pt", weights_only=False)
            for rank in range(num_processes)
        ]
        for name in jobs
    }


def _what_happened(folder: Path, codes: list[int | None]) -> str:
    """How each rank ended, or that it did not, and the end of what it printed."""
    said = []
    for rank, code in enumerate(codes):
        file = folder / f"log-{rank}.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else ["no log"]
        how = f"waits after {PATIENCE:g} s" if code is None else f"exit code {code}"
        said += [f"rank {rank}: {how}; the end of {file}:", *lines[-_LAST_LINES:]]
    return "\n".join(said)
