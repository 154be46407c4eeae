"""verl trains the layers of a selection: an engine for its registry.

verl imports this module where `VERL_USE_EXTERNAL_MODULES=layerrl.integrations.verl` says so, in
every process, and takes its engine where `VERL_ENGINE_VENDOR=layerrl` does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerrl.blocks import plain_name, with_fused_siblings
from layerrl.errors import LauncherError
from layerrl.frozen import FrozenRecord
from layerrl.integrations import given, mask, read_selection, require
from layerrl.optimizer import check_optimizer, scale_learning_rates
from layerrl.selection import LayerSelection
from layerrl.trained import TrainedLayers

TESTED = "0.9.1"
require("verl", TESTED)

from verl.utils.device import get_device_id  # noqa: E402  # pyright: ignore[reportMissingImports]
from verl.workers.config.optimizer import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    build_optimizer,
)
from verl.workers.engine import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    EngineRegistry,
    FSDPEngineWithLMHead,
)

logger = logging.getLogger(__name__)

SYNC = "LAYERRL_SYNC"


# For the others too: where this vendor has no engine, verl would take its own and train everything.
_BACKENDS = ["fsdp2", "fsdp", "fsdp_turbo", "megatron", "torchtitan", "veomni", "automodel"]


@EngineRegistry.register(
    "language_model", _BACKENDS, device=["cuda", "npu", "cpu"], vendor="layerrl"
)
class LayerMaskedFSDPEngine(FSDPEngineWithLMHead):
    """verl's FSDP2 engine for language models, of which only the selected layers train.

    `LAYERRL_SELECTION` says which. What is not selected is frozen as soon as the model is loaded,
    and never reaches the optimizer; engines that only go forward (the reference) are verl's own.
    The backward ends at the first trained layer. Frozen tensors are compared with their
    fingerprints at every save and after every load of a checkpoint.

    `LAYERRL_SYNC=trained` sends the rollout only what was trained and what vLLM fuses it with,
    after everything once. The engine cannot see the rollout, and this is right only where the
    rollout keeps its weights and takes a part of them:

    - `actor_rollout_ref.rollout.free_cache_engine=False`. With verl's default, the rollout drops
      its weights before each sync, colocated or not, and would generate from garbage.
    - A dense model that is not quantised in the rollout. After a sync verl lets vLLM process all
      weights again, which for some kernels (mixtures of experts, FP8) is not the same twice.
    - No replica joins or restarts later, as it would start from `load_format=dummy`.
    - The checkpoint engine is not `delta_sharded`, which sends what changed by itself.

    Everything is sent (`LAYERRL_SYNC=all`) by default.

    Raises:
        LauncherError: If the settings are not FSDP2, or are LoRA or quantisation-aware training.
    """

    _selection: LayerSelection | None = None
    _sent = False

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        self._sync = os.environ.get(SYNC) or "all"
        _refuse(model_config, engine_config, self._sync)
        super().__init__(model_config, engine_config, *args, **kwargs)

    def _build_module(self) -> nn.Module:
        module = super()._build_module()
        if self.engine_config.forward_only:
            return module
        self._selection = selection = read_selection(module, given())
        self._mask = mask(module, selection)
        if self.rank == 0:  # as a warning: verl shows no less, and silence means full training
            logger.warning("layerrl trains %s", selection)
        return module

    def _build_optimizer(self, module: nn.Module) -> Optimizer:
        selection = self._selection
        assert selection is not None  # an engine that only goes forward has no optimizer
        layers = TrainedLayers(module, selection)
        optimizer = build_optimizer([*layers.parameters.values()], self.optimizer_config)
        scale_learning_rates(optimizer, layers)
        check_optimizer(optimizer, layers)
        return optimizer

    def initialize(self) -> None:
        """Build model, optimizer and schedule, and remember the frozen tensors."""
        super().initialize()
        if self._selection is not None:
            # Not the parameters' own, which verl may have moved to the CPU by now.
            device = torch.device(get_device_id())
            self._frozen = FrozenRecord(self.module, self._selection, device=device)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save verl's checkpoint, of the whole model.

        Raises:
            FrozenTensorError: If a frozen tensor is not what it was.
        """
        self._check()
        super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load verl's checkpoint. The next sync sends everything.

        Raises:
            FrozenTensorError: If the checkpoint is of another base.
        """
        self._sent = False
        super().load_checkpoint(*args, **kwargs)
        self._check()

    def _check(self) -> None:
        if self._selection is not None:
            self._frozen.check(self.module)

    def get_per_tensor_param(self, *args: Any, **kwargs: Any) -> tuple[Iterator[Any], Any]:
        """The tensors that the rollout is to be sent.

        Returns:
            Names and whole tensors as verl gives them, and None. With `LAYERRL_SYNC=trained`, only
            those of trained tensors and their fused siblings, once everything has been taken.
        """
        selection = self._selection
        if selection is None or self._sync == "all":
            return super().get_per_tensor_param(*args, **kwargs)
        hook = None
        if self._sent:
            names = [plain_name(name) for name, _ in self.module.named_parameters()]
            kept = frozenset(with_fused_siblings(names, selection.parameters(self.module)))
            # Before verl renames and gathers: what is not in the state is not gathered.
            hook = self.module.register_state_dict_post_hook(
                lambda module, state, prefix, _: _keep(state, kept) if not prefix else None
            )
        self._sent = False  # until everything that is given out has been taken
        try:
            tensors, adapter = super().get_per_tensor_param(*args, **kwargs)
        finally:
            if hook is not None:
                hook.remove()
        return self._until_taken(tensors), adapter

    def _until_taken(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield from tensors
        self._sent = True


def _keep(state: dict[str, Any], names: frozenset[str]) -> None:
    for name in [name for name in state if plain_name(name) not in names]:
        del state[name]


def _refuse(model_config: Any, engine_config: Any, sync: str) -> None:  # verl's
    strategy, problem = engine_config.strategy, None
    if strategy == "fsdp" and engine_config.forward_only:
        return
    if strategy != "fsdp2":
        problem = (
            f"of strategy {strategy!r} layerrl knows nothing, and FSDP1 ('fsdp') flattens frozen "
            "and trained tensors into one. Set actor_rollout_ref.actor.strategy=fsdp2, or leave "
            "VERL_ENGINE_VENDOR unset"
        )
    elif model_config.lora_rank > 0:
        problem = (
            f"lora_rank={model_config.lora_rank} freezes the model and trains adapters. Set "
            "actor_rollout_ref.model.lora_rank=0, or leave VERL_ENGINE_VENDOR unset"
        )
    elif getattr(getattr(engine_config, "qat", None), "enable", False):
        problem = (
            "quantisation-aware training replaces the modules that would train. Set "
            "actor_rollout_ref.actor.fsdp_config.qat.enable=False"
        )
    elif sync not in ("all", "trained"):
        problem = f"{SYNC}={sync!r} is unknown, expected 'all' or 'trained'"
    if problem:
        raise LauncherError(f"verl cannot train chosen layers here: {problem}.")
