"""Executors: where the runs of a sweep happen, here one after the other, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from layerrl.checks import check_kind, check_number, plain, shown
from layerrl.errors import ProbeError
from layerrl.sweep.harness import Harness, Run

Task = tuple[Run, int]
"""A run, and the step it was brought to before."""
Measured = Generator[tuple[Run, dict[str, Any]]]

EXECUTORS = ("serial", "ray")
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
_RETRIES = 3


@contextmanager
def executor(
    name: str, harness: Harness, resources: Mapping[str, float]
) -> Iterator[Callable[[Iterable[Task]], Measured]]:
    """A function that measures runs, in any order, and yields each when it is done."""
    if name == "serial":
        yield lambda tasks: ((run, harness.measure(run, since)) for run, since in tasks)
        return
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise ProbeError('executor="ray" needs Ray: pip install "layerrl[ray]"') from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        _check_nodes(ray.nodes(), resources)
        takes: dict[str, Any] = {"num_cpus": 1, **resources}
        worker: Any = ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **takes)(_Worker)
        # Inside a list Ray hands on the reference, and the worker loads the model only once.
        arguments = [ray.put(harness)], torch.get_num_threads()

        def measure_all(tasks: Iterable[Task]) -> Measured:
            # A worker for each run: those that start first do what the others wait for. No tasks,
            # which would have to be cancelled: that of one that just ends can end this process.
            queue = list(tasks)
            workers = [worker.remote(*arguments) for _ in queue]
            waiting: dict[Any, tuple[Any, Run | None]]
            waiting = {one.load.remote(): (one, None) for one in workers}
            try:
                while waiting:
                    [ready], _ = ray.wait(list(waiting), num_returns=1)
                    one, run = waiting.pop(ready)
                    found = ray.get(ready)
                    if queue:
                        task = queue.pop(0)
                        waiting[one.measure.remote(*task)] = one, task[0]
                    else:  # what it holds is free for other work
                        ray.kill(one)
                    if not queue:
                        for unused in [key for key, (_, does) in waiting.items() if does is None]:
                            ray.kill(waiting.pop(unused)[0])
                    if run is not None:
                        yield run, found
            except RayTaskError:  # what the run itself raised
                raise
            except RayError as error:
                raise ProbeError(
                    f"Ray lost a run, after {_RETRIES} more tries where it could repeat it. Often "
                    f"there is too little memory for {dict(resources)} a run. Finished runs are "
                    f"kept; the same call continues. {error}"
                ) from error
            finally:
                for one in workers:
                    ray.kill(one)

        yield measure_all
    finally:
        if ours:
            ray.shutdown()


def check_resources(resources: Any) -> dict[str, float]:
    """Check the resources of one run: Ray's names to amounts, from 0 up."""
    check_kind("resources", resources, Mapping, f"a dict of {sorted(_RESOURCES)}", ProbeError)
    unknown = [name for name in resources if not isinstance(name, str) or name not in _RESOURCES]
    if unknown:
        raise ProbeError(
            f"resources has {shown(unknown)}, expected {sorted(_RESOURCES)}: what one run needs"
        )
    for name, amount in resources.items():
        check_number(f"{name} of resources", amount, ProbeError, least=0)
    return {name: plain(amount) for name, amount in resources.items()}


def _check_nodes(nodes: list[dict[str, Any]], resources: Mapping[str, float]) -> None:
    needed = {_RESOURCES[name]: amount for name, amount in resources.items()}
    having = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(node.get(n, 0) >= amount for n, amount in needed.items()) for node in having):
        shown = [{name: node.get(name, 0) for name in needed} for node in having]
        raise ProbeError(
            f"a run needs {needed}, and no node of the Ray cluster has that: {shown}. Ask for less "
            "with resources=, or connect to a larger cluster with ray.init before the call."
        )


class _Worker:
    """Measures one run after the other in a process of the cluster."""

    def __init__(self, shared: list[Any], num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # as in the process that asks: sums round the same way
        [self._reference] = shared
        self._harness: Harness | None = None

    def load(self) -> None:
        """Load the model. Not in `__init__`, whose errors Ray takes for those of a lost worker."""
        import ray

        self._harness = ray.get(self._reference)

    def measure(self, run: Run, since: int) -> dict[str, Any]:
        if self._harness is None:  # in a worker that stands in for a lost one
            self.load()
        assert self._harness is not None
        return self._harness.measure(run, since)
