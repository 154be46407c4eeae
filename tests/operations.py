"""What torch computes: kernels, where they run, and the memory that their results take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Inside, every operation that makes new memory is noted; views, which launch nothing, are not.

    It sees fake tensors, too: with a `FakeTensorMode` outside of it, those of a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[str, torch.device]] = []
        """Name and device of each."""
        self.num_reads = 0
        """Numbers that Python took out of tensors, which waits for a device."""
        self.peak = 0
        """Most bytes that results held at a time."""
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        found = func(*args, **(kwargs or {}))
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        made = [value for value in tree_leaves(found) if isinstance(value, Tensor)]
        made = [v for v in made if _key(v) not in before and v.device.type != "meta"]
        if made:
            self.kernels.append((str(func.overloadpacket).removeprefix("aten."), made[0].device))
        self._held = {k: (ref, size) for k, (ref, size) in self._held.items() if not ref.expired()}
        for value in made:
            storage = value.untyped_storage()
            self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return found


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def during(function: Callable[[], object]) -> Operations:
    """What a call computes."""
    with Operations() as operations:
        function()
    return operations
