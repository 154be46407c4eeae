"""Scores in several processes: each has the whole model and a part of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast, gather_object
from torch import Tensor

from layerrl.blocks import unwrap
from layerrl.errors import ProbeError
from layerrl.replacing import replaced


def refuse_sharded(trainer: Any, asked: str) -> None:
    """Refuse launchers under which not every process has the whole model before training starts."""
    plugins = trainer.accelerator.state
    why, instead = "", ""
    if trainer.is_deepspeed_enabled and plugins.deepspeed_plugin.zero_stage == 3:
        why = "DeepSpeed's ZeRO-3 shards it"
        instead = "Choose with DDP, FSDP2, ZeRO-1, ZeRO-2 or in one process"
    elif trainer.is_fsdp_enabled and plugins.fsdp_plugin.cpu_ram_efficient_loading:
        why = "fsdp_cpu_ram_efficient_loading loads its weights in one"
        instead = "Set fsdp_cpu_ram_efficient_loading: false"
    elif trainer.is_fsdp_enabled and getattr(trainer, "use_vllm", False):
        why = "vLLM is sent its weights in parts under FSDP"
        instead = "Set use_vllm=False, or choose with DDP or in one process"
    if why:
        raise ProbeError(
            f"{asked} needs the whole model in each process, and {why}. {instead}; the selection "
            "of a report works here."
        )


@contextmanager
def whole_model(trainer: Any) -> Iterator[None]:
    """Inside, each process computes with the same whole model, on its own device.

    FSDP and DeepSpeed leave it on the CPU until training starts; DDP gives all the first one's
    weights then.
    """
    accelerator, model = trainer.accelerator, unwrap(trainer.model)
    launched = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    before = next(model.parameters()).device
    try:
        if launched:
            model.to(accelerator.device)
        if accelerator.num_processes > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    give_first(tensor, tensor.device)
        yield
    finally:
        if launched:
            model.to(before)


def give_first(tensor: Tensor, device: torch.device) -> None:
    """Write the first rank's values into a tensor, by way of a device. Collective."""
    # Bits, as few backends send float8 or unsigned integers of two bytes.
    bits: Any = broadcast(tensor.data.to(device).contiguous().view(-1).view(torch.uint8))
    tensor.data.copy_(bits.view(tensor.dtype).view(tensor.shape))


def loss_alone(trainer: Any, inputs: Any) -> Tensor:
    """Return the loss of rows that the other processes may have none of.

    What TRL gathers beside it for its metrics is this process's alone: the others would not answer.
    """
    alone = {"distributed_type": DistributedType.NO}
    # Both, as each accelerator's state takes over what the process's says whenever it is asked for.
    with replaced(trainer.accelerator.state, **alone), replaced(PartialState(), **alone):
        return trainer.compute_loss(trainer.model, inputs)


def first_problem(problem: Exception | None) -> Exception | None:
    """The problem of the first rank that has one; a collective: call it on every rank."""
    return next((found for found in gather_object([problem]) if found is not None), None)


def add_up(gradient: Tensor) -> None:
    """Add a gradient up over all ranks, in place; a collective: call it on every rank."""
    torch.distributed.all_reduce(gradient)
