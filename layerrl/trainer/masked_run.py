"""Everything that lives as long as one selection of a trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerrl.activations import backward_from_first_trained
from layerrl.blocks import unwrap
from layerrl.delta import DeltaBase, save_delta
from layerrl.digests import json_digest
from layerrl.errors import SelectionError
from layerrl.frozen import FrozenRecord, fingerprints
from layerrl.reference import ReferenceModel
from layerrl.replay import PrefixReplay
from layerrl.selection import LayerSelection
from layerrl.shards import parts, reshard, sharded_like
from layerrl.trained import TrainedLayers
from layerrl.trainer import adapters, agreement, arguments, launchers, metrics
from layerrl.trainer.announced import AnnouncedSync
from layerrl.trainer.callbacks import SyncReference
from layerrl.trainer.masked_optimizer import MaskedOptimizer
from layerrl.trainer.sync import WeightSync

if TYPE_CHECKING:
    from layerrl.trainer.call import TrainerCall


class MaskedRun:
    """What a masked trainer keeps of its model while one selection of it trains.

    Another one takes its place when `"auto"` has chosen, or `model_init` has made a new model.
    """

    def __init__(self, trainer: Any, call: TrainerCall, selection: LayerSelection) -> None:
        model, accelerator, full = trainer.model, trainer.accelerator, selection.full
        self._trainer, self._call, self.selection = trainer, call, selection
        self.adapts = call.adapts
        """Whether PEFT's adapters train."""
        self.check_adapters()
        quantised = getattr(unwrap(model), "is_quantized", False)
        launchers.refuse_launcher(selection, accelerator, quantised=quantised)
        launchers.refuse_threads(trainer.args)
        given = {
            "selection": selection if call.decided else str(call.auto),
            "checkpoint_format": call.checkpoint_format,
            "master_weights": call.master_weights,
            **agreement.dataset_sizes(trainer),
        }
        agreement.refuse_disagreement(given, accelerator)
        casts = launchers.casts_model(accelerator)
        arguments.refuse_cast(trainer.args, None if full else model, casts)
        arguments.warn_of_frozen_head(model, selection)
        arguments.warn_of_idle_layers(model, selection)
        self.auto = call.auto
        """The choice of `selection="auto"`, with its report once it is made; None otherwise."""
        self.layers = TrainedLayers(model, selection)
        # A model that will be sharded lies on the CPU until it is.
        self.frozen = FrozenRecord(model, selection, device=accelerator.device)
        together = accelerator.num_processes > 1
        if together and not quantised and not self.layers.in_parts:
            trained = fingerprints(self.layers.parameters, device=accelerator.device)
            marks = self.frozen.fingerprints | trained
            if agreement.share_weights(unwrap(model), marks, accelerator):
                self.frozen.take(model)
        self.base: DeltaBase | None = None
        """What a delta is relative to; None before `"auto"` has chosen, and of adapters."""
        self.adapted: str | None = None
        """The digest of what adapters leave as it is: not of packed weights, whose bits depend on
        the device that packed them."""
        if call.decided and self.adapts and not quantised:
            digest = json_digest(self.frozen.fingerprints)
            self.adapted = agreement.of_main_process(digest, accelerator)
        if call.decided and not self.adapts:
            known = self.frozen.fingerprints
            base = DeltaBase.of(model, selection, frozen=known, device=accelerator.device)
            self.base = agreement.of_main_process(base, accelerator)
        self.replay = self._replay_of(model)
        self.optimizer = MaskedOptimizer(self.layers, master_weights=call.master_weights)
        self._clipped: metrics.Norms | None = None
        self.initial: Mapping[str, Tensor] = {}
        """The trained tensors' values at the start, the reference's own where it keeps them."""
        if call.reference:
            self._set_reference()
        if not self.initial and not full and call.decided:
            self.initial = {
                name: parts(p).detach().clone() for name, p in self.layers.parameters.items()
            }
        self.sync: WeightSync | AnnouncedSync | None = None
        """What sends vLLM the trained tensors. Last, for it takes over the trainer's own."""
        if hasattr(trainer, "vllm_generation") and not full and call.decided:
            self.sync = WeightSync(trainer.vllm_generation, model, selection)
        elif call.early is not None and call.decided:
            self.sync = AnnouncedSync(trainer, selection, call.early)

    def _replay_of(self, model: nn.Module) -> PrefixReplay:
        accelerator = self._trainer.accelerator
        return PrefixReplay(
            model,
            self.selection,
            self._call.prefix_cache_bytes,
            agree=partial(agreement.agree, accelerator),
            compiled=launchers.compiles_around_layers(accelerator, self._trainer.model),
        )

    def _set_reference(self) -> None:
        """Before anything trains, the model is its own reference."""
        trainer, decided = self._trainer, self._call.decided
        reference = ReferenceModel(trainer.model, self.layers.parameters if decided else {})
        trainer.ref_model = reference
        if hasattr(trainer.callback_handler, "ref_model"):  # of TRL's DPO with BEMA
            trainer.callback_handler.ref_model = reference
        if not decided:
            return
        trainer.remove_callback(SyncReference)
        if getattr(trainer.args, "sync_ref_model", False):
            trainer.add_callback(SyncReference(reference, trainer.accelerator))
        elif not self.selection.full:
            self.initial = reference.tensors

    @property
    def reference(self) -> ReferenceModel | None:
        """The trainer's reference, where it is kept as values; None where there is none."""
        reference = getattr(self._trainer, "ref_model", None)
        return reference if isinstance(reference, ReferenceModel) else None

    # What is frozen

    def follow_shards(self) -> None:
        """Go on with a model that a launcher has sharded.

        Not before `check_frozen` has been called on the whole one: its record is taken anew.
        """
        model, shards = self._trainer.model, launchers.shards_model(self._trainer.accelerator)
        if not shards or not self.layers.follow(model):
            return
        self.frozen.take(model)
        self._follow_tensors()

    def find_trained(self) -> None:
        """Find the trained tensors again: a caller may have put others in their places.

        `load_state_dict(assign=True)` does, and another model in `trainer.model`.
        """
        before, model = self.layers.parameters, self._trainer.model
        reshard(model)
        if unwrap(model) is not unwrap(self.layers.model):
            self.replay = self._replay_of(model)
        self.layers.find(model)
        if any(self.layers.parameters[name] is not p for name, p in before.items()):
            self._follow_tensors()

    def fit_optimizer(self) -> None:
        """Fit the optimizer that the training takes, whoever made it, to the trained tensors.

        Raises:
            SelectionError: If it holds other tensors, or cannot have the layers' rates.
        """
        self.follow_shards()
        self.find_trained()
        if not launchers.uses_deepspeed(self._trainer.accelerator):  # which wraps it in its own
            self.optimizer.fit_another(self._trainer)

    def _follow_tensors(self) -> None:
        """Let what was kept of the trained tensors belong to those that train now."""
        trained, reference = self.layers.parameters, self.reference
        initial = {name: sharded_like(v, trained[name]) for name, v in self.initial.items()}
        if reference is not None:
            shared = any(value is reference.initial[0] for value in self.initial.values())
            reference.follow(self._trainer.model, trained)
            initial = reference.tensors if shared else initial
        self.initial = initial

    def check_frozen(self, at: str = "") -> None:
        """Compare every frozen tensor and buffer with what it was when the trainer was made.

        `at` says where every rank checks now, and all raise what one finds: a collective. Empty:
        this rank alone.
        """
        self.follow_shards()
        reshard(self._trainer.model)  # an evaluation leaves some tensors gathered
        if not at:
            self.frozen.check(self._trainer.model)
            return
        accelerator = self._trainer.accelerator
        with agreement.raised_together(at, accelerator):
            self.frozen.check(self._trainer.model)
        in_parts = launchers.shards_model(accelerator) or self.layers.in_parts  # by others: TP
        if accelerator.num_processes > 1 and not in_parts:
            marks = fingerprints(self.layers.parameters, device=accelerator.device)
            agreement.warn_of_divergence(marks, at, accelerator)

    def check_whole(self, at: str) -> None:
        """The same, where a launcher is about to shard the model: the record is taken anew then."""
        if launchers.shards_model(self._trainer.accelerator) and not self.layers.in_parts:
            self.check_frozen(at)

    def check_adapters(self) -> None:
        """Compare the model's adapters with what the trainer was made for."""
        model = self._trainer.model
        has_some = adapters.has_adapters(model)
        adapters.check_adapters(model)
        if has_some != self.adapts:
            since = "has been given PEFT adapters" if has_some else "has lost its PEFT adapters"
            raise SelectionError(
                f"the model {since} since the trainer was made for {self.selection}, whose "
                "optimizer holds other tensors: make another trainer, with this model."
            )

    def save_delta(self, path: str | os.PathLike[str], *, writes: bool) -> Path:
        """Write a delta, after `check_frozen`. Collective: called on every rank; one `writes`."""
        if self.adapts:
            raise SelectionError(
                f"adapters were trained on {self.selection}, and a delta holds a model's own "
                "tensors: save_model(folder) writes them as PEFT reads them. For a delta, train "
                "without peft_config."
            )
        if self.base is None:
            raise SelectionError(
                'selection="auto" chooses its layers when training starts: nothing is trained yet '
                "that a delta could hold"
            )
        return save_delta(
            self._trainer.model,
            path,
            selection=self.selection,
            base=self.base,
            processing_class=self._trainer.processing_class,
            is_main_process=writes,
            check_frozen=self.selection.full,  # others were compared by whoever calls this
        )

    def sync_everything(self) -> None:
        """Send vLLM all weights next time: a checkpoint is loaded, or a training has failed."""
        if self.sync is not None:
            self.sync.reset()

    # Passes over a batch

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Inside, a batch is generated and scored."""
        own_rollout = getattr(self._trainer, "rollout_func", None)  # may ask the engine itself
        if own_rollout is not None and isinstance(self.sync, WeightSync):
            self.sync.freshen()
        with self._flags_kept(), self.replay.batch(training=self._training):
            yield

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside, completions are scored, before the loss or in it."""
        self.follow_shards()
        with self.replay.passes(training=self._training):
            yield

    @contextmanager
    def loss(self) -> Iterator[None]:
        """Inside, a loss is computed, whose backward will end at the first trained layer."""
        self.follow_shards()  # an evaluation shards the model, too
        training = self._training
        # DPO and KTO score each batch in the loss, with the policy and the reference.
        alone = self._call.reference == "ref_model"
        try:
            # Here and not once for the run: TRL enables checkpointing anew after a generation.
            with (
                self._flags_kept(),
                backward_from_first_trained(self._trainer.model, self.selection),
                self.replay.passes(training=training, alone=alone),
            ):
                yield
        finally:
            if not training:
                self.replay.forget_evaluation()

    @contextmanager
    def _flags_kept(self) -> Iterator[None]:
        """Inside, adapters may be switched off and on, after which PEFT lets all of them train."""
        if not self.adapts:
            yield
            return
        flags = [(p, p.requires_grad) for p in self._trainer.model.parameters()]
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @property
    def _training(self) -> bool:
        return self._trainer.model.training

    # What is logged

    def note_gradients(self) -> None:
        """Measure the gradients, which have just been clipped.

        Raises:
            SelectionError: If trained tensors were replaced since the training began, or all of
                them are frozen.
        """
        if not any(p.requires_grad for p in self.layers.parameters.values()):
            self.refuse_frozen()
        if not launchers.uses_deepspeed(self._trainer.accelerator):  # it has none left by now
            trained = self.layers.parameters.values()
            if any(p.requires_grad and p.grad is None for p in trained):
                self._refuse_replaced()
            self._clipped = metrics.clipped_norms(self.layers.by_part, trained)

    def refuse_frozen(self) -> None:
        """Raise an error if every trained tensor was frozen since the training began."""
        trained = self.selection.parameters(self._trainer.model)
        if trained and not any(p.requires_grad for p in trained.values()):
            raise SelectionError(
                f"none of the {len(trained)} tensors of {self.selection} requires a gradient any "
                f"more, as {next(iter(trained))!r}: a callback, or other code, has frozen them "
                "since the training began, so that there is nothing to train. Leave "
                "requires_grad as the trainer sets it; a LayerSchedule lets layers take turns."
            )

    def _refuse_replaced(self) -> None:
        """Raise an error if the loss has other tensors than the optimizer by now."""
        now, trained = self.selection.parameters(self._trainer.model), self.layers.parameters
        replaced = [name for name, p in trained.items() if now.get(name) is not p]
        if replaced:
            raise SelectionError(
                f"{len(replaced)} of {len(trained)} trained tensors were replaced during the "
                f"training, as load_state_dict(assign=True) does: {replaced[0]!r} is not the "
                "tensor that the optimizer holds, and would not be updated any more. Copy values "
                "into the tensors that are there, or replace them between two calls of train()."
            )

    def metrics_of_step(self, grad_norm: float | None) -> dict[str, float]:
        """The layers' metrics by name; `grad_norm` is the gradient's before it was clipped."""
        layers = self.layers
        found = {"layerrl/trained_parameters": float(layers.num_training)}
        if self._clipped is not None and grad_norm is not None:
            norms = metrics.before_clipping(grad_norm, self._clipped)
            found |= metrics.named("grad_norm", norms)
        state = getattr(self._trainer.optimizer, "state", {})
        moved = metrics.relative_updates(
            layers.by_part, layers.parameters, self.initial, state, layers.trained_rows
        )
        return found | metrics.named("relative_update", moved)
