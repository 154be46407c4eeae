"""Launchers (DDP, FSDP2, DeepSpeed): what differs where several processes train together.

A collective is called on every rank or on none: a rank that leaves early keeps the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend, is_compiled_module
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from layerrl.blocks import is_accelerates
from layerrl.errors import DeltaError, LauncherError
from layerrl.selection import LayerSelection
from layerrl.shards import sharded_state, whole_state
from layerrl.stored import bytes_of, refused_as

_Record = TypeVar("_Record")
_DEEPSPEED = "latest"  # the file in which DeepSpeed names the part of a checkpoint that is its own
_ZERO3_MODEL = "zero_pp_rank_*_model_states.pt"  # its parts of a model; ZeRO-1 and 2 write it whole
# Settings of ZeRO-3 with which each process holds one exact part on its device: the defaults.
_ZERO3_IN_PLACE = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "mics_shard_size": -1,
}


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Whether the model is, or will be, sharded by FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


def uses_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains, and keeps the model's tensors in parts."""
    plugins: Any = accelerator.state
    return uses_deepspeed(accelerator) and plugins.deepspeed_plugin.zero_stage == 3


def shards_model(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the model, or will."""
    return uses_fsdp(accelerator) or uses_zero3(accelerator)


def refuse_launcher(
    selection: LayerSelection, accelerator: Accelerator, *, quantised: bool
) -> None:
    """Refuse launchers that cannot hold frozen and trained tensors side by side."""
    if quantised and (uses_fsdp(accelerator) or uses_deepspeed(accelerator)):
        raise LauncherError(
            f"a quantised base was given for {selection} under FSDP or DeepSpeed, which has not "
            "been tested with packed weights. Use DDP or one process, or load the model without "
            "quantisation."
        )
    if selection.token_rows and (uses_fsdp(accelerator) or uses_deepspeed(accelerator)):
        raise LauncherError(
            f"{selection} under FSDP or DeepSpeed, whose optimizers hold the embedding in pieces: "
            "its other rows could not be kept as they are. Use DDP or one process, or train the "
            'whole embedding (also=("embeddings", "head")).'
        )
    plugins: Any = accelerator.state
    if uses_fsdp(accelerator) and plugins.fsdp_plugin.fsdp_version == 1:
        raise LauncherError(
            f"FSDP1 was given for {selection}: it flattens tensors into one, which wants a "
            "gradient for all or none of them, and in which the reference and the frozen check "
            "cannot tell them apart. Use FSDP2: fsdp_version: 2 in "
            'accelerate\'s config, or fsdp_config={"version": 2} in the args.'
        )
    if uses_deepspeed(accelerator) and "optimizer" in plugins.deepspeed_plugin.deepspeed_config:
        raise LauncherError(
            f'DeepSpeed\'s config has an "optimizer" for {selection}, whose optimizer the trainer '
            "makes from its args: what trains, each tensor at its layer's rate. Leave it out of "
            "the config, and set optim, learning_rate and weight_decay in the args."
        )
    if uses_zero3(accelerator):
        settings = plugins.deepspeed_plugin.deepspeed_config["zero_optimization"]
        _refuse_parts_elsewhere(selection, settings)


def refuse_threads(args: Any) -> None:
    """Refuse several devices in one process (`nn.DataParallel`), as the oldest TRL does not."""
    if args.n_gpu > 1:
        raise LauncherError(
            f"transformers would run {args.n_gpu} devices from one process, through "
            "nn.DataParallel, whose copies of the model are not masked. Start one process for each "
            "(accelerate launch), or show this one a single device: CUDA_VISIBLE_DEVICES=0."
        )


def casts_model(accelerator: Accelerator) -> bool:
    """Whether the model itself goes over to the dtype of mixed precision when training starts."""
    return uses_deepspeed(accelerator) and accelerator.mixed_precision in ("bf16", "fp16")


def compiles_around_layers(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether the whole model is compiled, or will be, and not layer by layer."""
    plugin: Any = accelerator.state.dynamo_plugin
    whole = plugin.backend != DynamoBackend.NO and not plugin.use_regional_compilation
    return whole or is_compiled_module(model)


def _refuse_parts_elsewhere(selection: LayerSelection, settings: Mapping[str, Any]) -> None:
    given = {
        "offload_param": (settings.get("offload_param") or {}).get("device", "none"),
        **{name: settings.get(name, usual) for name, usual in _ZERO3_IN_PLACE.items()},
    }
    usual = {"offload_param": "none", **_ZERO3_IN_PLACE}
    other = {name: value for name, value in given.items() if value not in (None, usual[name])}
    if other:
        raise LauncherError(
            f"DeepSpeed's ZeRO-3 was given for {selection} with "
            + ", ".join(f"{name}: {value}" for name, value in other.items())
            + ", which keeps the model's parts on another device, more than once or rounded: the "
            "reference and the frozen check read and write them where they usually are. Leave it "
            "out (offload_optimizer may stay), or use FSDP2."
        )


def refuse_schedule(args: Any) -> None:
    """Refuse launchers that settle once which tensors have gradients, as DDP may."""
    kind = AcceleratorState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise LauncherError(
            f"LayerSchedule was given under {kind.value}, which settles before the first step "
            "which tensors get gradients: layers could not take turns. Use DDP, or one process."
        )
    if args.world_size > 1 and not args.ddp_find_unused_parameters:
        raise LauncherError(
            f"LayerSchedule was given to {args.world_size} processes, and DDP would wait for the "
            "gradients of layers whose turn it is not: set ddp_find_unused_parameters=True in the "
            "args."
        )


def refuse_checkpoint(folder: Path, accelerator: Accelerator, *, has_delta: bool) -> None:
    """Refuse checkpoints of a launcher whose optimizer state this one cannot read."""
    by_deepspeed = (folder / _DEEPSPEED).is_file()
    if by_deepspeed != uses_deepspeed(accelerator):
        wrote, runs = ("with", "without") if by_deepspeed else ("without", "with")
        raise DeltaError(
            f"the checkpoint {folder} was written {wrote} DeepSpeed and this run is {runs} it: "
            "their optimizer states cannot be converted. Resume with the launcher that wrote it, "
            "or start a new run from its weights"
            f"{' (load_delta)' if has_delta else ''}."
        )
    if by_deepspeed:
        with refused_as(DeltaError, f"{folder / _DEEPSPEED} is damaged"):
            name = bytes_of(folder / _DEEPSPEED).decode(errors="replace").strip()
        states = folder / name.replace("\0", "")
        by_zero3 = any(states.glob(_ZERO3_MODEL))
        if by_zero3 != uses_zero3(accelerator):
            wrote, runs = ("with", "without") if by_zero3 else ("without", "with")
            raise DeltaError(
                f"the checkpoint {folder} was written {wrote} DeepSpeed's ZeRO-3 and this run is "
                f"{runs} it: DeepSpeed cannot convert between its stages. Resume with the stage "
                "that wrote it."
            )
    by_fsdp = any(folder.glob(f"{FSDP_MODEL_NAME}*"))
    if not has_delta and not by_deepspeed and by_fsdp != uses_fsdp(accelerator):
        wrote, runs = ("with", "without") if by_fsdp else ("without", "with")
        raise DeltaError(
            f"the checkpoint {folder} is a whole model, or adapters, written {wrote} FSDP, and "
            f"this run is {runs} it: only checkpoints with a delta "
            '(checkpoint_format="delta", of a selection other than "full", without adapters) can '
            "be resumed under another launcher."
        )


def forget_evaluation(trainer: Any) -> None:
    """Let DDP wrap a model that has been evaluated before training.

    Accelerate marks it as prepared then, and would train it in each process alone. Plain TRL
    evaluates so only without a reference model; a masked trainer never has a second one.
    """
    model, accelerator = trainer.model, trainer.accelerator
    if accelerator.num_processes == 1 or uses_fsdp(accelerator) or uses_deepspeed(accelerator):
        return
    wrapped = trainer.model_wrapped
    if isinstance(getattr(wrapped, "_orig_mod", wrapped), DistributedDataParallel):
        return  # it has trained before
    if vars(model).pop("_is_accelerate_prepared", False):
        trainer.model_wrapped = model  # or compiled for the evaluation, it would train as it is
        own = vars(model).get("_original_forward")
        if own is not None and is_accelerates(model.forward):  # or autocast is put around it twice
            model.forward = own
            del model._original_forward


@contextmanager
def optimizer_in_one_piece(optimizer: Optimizer) -> Iterator[None]:
    """Inside, an optimizer gives and takes the state that it would have in one process.

    What it gives is gathered once, on entry: afterwards one rank may ask alone. Collective: enter
    on every rank.
    """
    gathered = whole_state(optimizer.state_dict())
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    hooks = [
        optimizer.register_state_dict_post_hook(lambda _, state_dict: gathered),
        optimizer.register_load_state_dict_pre_hook(
            lambda _, state_dict: sharded_state(state_dict, parameters)
        ),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def as_in_one_process(trainer: Any) -> Iterator[None]:
    """Inside, a masked trainer saves and loads FSDP2's optimizer as any other, beside a delta.

    Such a checkpoint is for any number of processes. Whole models keep transformers' own format.
    Collective: enter on every rank.
    """
    if trainer.checkpoint_format == "full" or not uses_fsdp(trainer.accelerator):
        yield
        return
    trainer.is_fsdp_enabled = False  # what decides in transformers between its formats
    try:
        with optimizer_in_one_piece(trainer.optimizer.optimizer):
            yield
    finally:
        trainer.is_fsdp_enabled = True
