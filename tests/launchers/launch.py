"""Starts processes that train together, as torchrun would: on a CPU, with gloo.

They come from a server process that has imported everything once, so that a launch takes seconds.
"""

import socket
from pathlib import Path
from typing import Any

import torch

from tests.launchers import worker
from tests.processes import forking

_SECONDS = 1800  # of a launch that hangs; a busy machine takes minutes


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
        process = context.Process(target=worker.main, args=(folder, own, variables))
        process.start()
        processes.append(process)
    try:
        for process in processes:
            process.join(_SECONDS)
        assert [process.exitcode for process in processes] == [0] * num_processes
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
