"""The mixin that puts a selection into a TRL trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from layerrl.activations import backward_from_first_trained
from layerrl.blocks import plain_name, unwrap
from layerrl.delta import DeltaBase, save_delta
from layerrl.errors import SelectionError
from layerrl.frozen import check_frozen, fingerprints, frozen_tensors
from layerrl.optimizer import (
    check_optimizer,
    check_steps,
    keep_only,
    refuse_updates_in_backward,
    scale_learning_rates,
    updates_in_backward,
)
from layerrl.precision import HALF, step_in_float32, unwrap_optimizer
from layerrl.quantisation import quantised_base
from layerrl.reference import ReferenceModel
from layerrl.replay import PrefixReplay
from layerrl.seams import check_class, check_made
from layerrl.selection import LayerSelection, select_layers
from layerrl.selection.masked import TrainingMask
from layerrl.shards import is_sharded, parts, shape, sharded_like
from layerrl.trained import parameters_by_layer
from layerrl.trainer import arguments, launchers, metrics
from layerrl.trainer.announced import AnnouncedSync, EarlyMask, announces
from layerrl.trainer.auto import AutoSelection
from layerrl.trainer.callbacks import (
    DeltaOnTop,
    EpochOrder,
    FrozenCheck,
    GradNorms,
    SyncReference,
    refuse_callbacks,
)
from layerrl.trainer.checkpoints import Checkpoints, refuse_readers
from layerrl.trainer.sync import WeightSync
from layerrl.trainer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch.optim import Optimizer


class LayerMaskedMixin:
    """Put in front of a TRL trainer, trains only the layers of a selection and pays only for them.

    `class MyTrainer(LayerMaskedMixin, GRPOTrainer)` takes a few keywords more than the trainer it
    wraps. Everything outside the selection is frozen when the trainer has been made, compared with
    its fingerprint at train start, at every save and at train end, and never reaches the optimizer.
    When `train` returns or fails, or making the trainer fails, every `requires_grad` flag is what
    it was before the trainer was made; the next `train` masks anew.

    The backward ends at the first trained layer, and only layers from there up are checkpointed.
    The reference (`beta > 0`; DPO, KTO without a `ref_model`) is the model that was passed, kept as
    the trained tensors' initial values. What enters the first trained layer is recorded in the
    first pass over a batch and replayed in the others. After a first time, vLLM is sent only what
    was trained. None of this changes a result; with `selection="full"` there is nothing to save,
    and the trainer is the plain one, with a copy of the model that was passed for its reference.

    What does change a result, for the better: trained tensors in bfloat16 or float16 are updated in
    float32, where small steps are not rounded away.

    Logged with the trainer's own metrics: `layerrl/trained_parameters`, the number of elements that
    train now; `layerrl/grad_norm/layer_<k>`, the layer's share of `grad_norm`, before clipping;
    `layerrl/relative_update/layer_<k>`, the norm of the layer's change since the trainer was made
    over its norm then (not for `"full"`, which would need a second copy of the model).

    Args:
        *args: The trainer's own arguments.
        selection: What trains: a `LayerSelection` or anything `select_layers` takes, resolved
            against the trainer's model. `"auto"` or `"auto:K"` in a trainer that generates: the K
            layers that `contribution_probe`'s `"gradient"` scores highest when training starts, on
            its first generation batches (64 prompts or more), which are then trained on. Until then
            `selection` is all layers. Checkpoints hold the report, and resume on it.
        prefix_cache_bytes: Most memory that recorded hidden states may take, on the device: those
            of an evaluation beside a batch to train on included; a larger batch is not recorded. 0:
            never record.
        master_weights: Update half-precision trained tensors in float32. The optimizer keeps those
            values, and its checkpoint holds them. Not for `"full"`, which is the plain trainer.
        checkpoint_format: `"delta"`: checkpoints hold the trained tensors, their optimizer state
            and the trainer's state, and resume on the same base; `"full"`: whole models, as the
            trainer's own, for tools that take checkpoints for models. `save_model()` and
            `push_to_hub()` write a whole model either way.
        **kwargs: The trainer's own arguments.

    Raises:
        SelectionError: If the selection does not fit the model, or comes with a `peft_config` or a
            PEFT model, which also choose what trains; if tokens were added whose embedding rows it
            does not train; if a callback takes checkpoints for models that hold a delta.
        TrainerError: If the class behind the mixin is no trainer, or is one that cannot be masked.
        ModelError: If the model's decoder layers cannot be found.
        LauncherError: Under a launcher that cannot train chosen layers, or in processes that do not
            choose the same.
        FrameworkError: If the versions of TRL, transformers, accelerate or torch are too old, or
            lack what the mixin needs of the trainer's class.
    """

    if TYPE_CHECKING:
        model: Any
        ref_model: Any
        vllm_generation: Any
        optimizer: Any
        optimizer_cls_and_kwargs: Any
        accelerator: Any
        is_fsdp_enabled: bool
        args: Any
        processing_class: Any
        state: Any
        remove_callback: Any
        callback_handler: Any
        model_init: Any
        place_model_on_device: bool
        _move_model_to_device: Any
        _save: Any
        _get_output_dir: Any
    else:

        def __init_subclass__(cls, **kwargs: object) -> None:
            """Show the wrapped trainer's arguments, and `selection`, in `help` and editors."""
            super().__init_subclass__(**kwargs)
            arguments.refuse_other_classes(cls, LayerMaskedMixin)
            own = cls.__init__ is not LayerMaskedMixin.__init__
            cls.__signature__ = None if own else arguments.signature(cls, LayerMaskedMixin)

    def __init__(
        self,
        *args: Any,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
        **kwargs: Any,
    ) -> None:
        check_class(type(self))
        known = arguments.names(type(self), LayerMaskedMixin)
        given = {**dict(zip(known, args, strict=False)), **kwargs}
        model = given.get("model")
        arguments.refuse_peft(selection, model, given.get("peft_config"))
        arguments.check_keywords(
            kwargs,
            byte_counts={"prefix_cache_bytes": prefix_cache_bytes},
            switches={"master_weights": master_weights},
            checkpoint_format=checkpoint_format,
        )
        auto = AutoSelection.of(selection)
        if auto is not None:
            selection = "all"
        # A path's config will do, so that a typo is not found after minutes of loading weights.
        args_given = given.get("args")
        is_model = isinstance(model, nn.Module)
        choice = [*selection] if isinstance(selection, Iterator) else selection
        described = model if is_model else arguments.config_at(model, args_given)
        if described is not None:
            selection = arguments.chosen_early(described, choice)
        full = selection == "full" or (isinstance(selection, LayerSelection) and selection.full)
        checkpoint_format = "full" if full else checkpoint_format
        refuse_readers(given.get("callbacks") or (), checkpoint_format)
        early = None
        if not full and announces(type(self)):
            early = EarlyMask(choice, own_transfer=given.get("weight_transfer") is not None)
            callbacks = [*(given.get("callbacks") or ()), early]
            args, kwargs = arguments.with_argument(known, args, kwargs, "callbacks", callbacks)
        vocabulary = Vocabulary(model, described, given.get("processing_class"))
        generates = hasattr(super(), "_generate_and_score_completions")
        reference = arguments.second_model(given, known, generates=generates)
        if reference == "ref_model":
            stand_in = arguments.StandIn()
            args, kwargs = arguments.with_argument(known, args, kwargs, "ref_model", stand_in)
        with (
            arguments.without_reference_model(args_given, reference),
            nullcontext() if full else quantised_base(args_given),
            early or nullcontext(),
        ):
            super().__init__(*args, **kwargs)
        check_made(self)
        self._mask = TrainingMask()
        self._auto = auto
        self._master_weights = master_weights and not full
        self.checkpoint_format = checkpoint_format
        self._checkpoints = Checkpoints(self)
        self._select_now = partial(
            self._select,
            early=early,
            reference=reference,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        if reference == "beta":
            self.beta = self.args.beta
        # The first, as callbacks of the user may write to the gradients.
        self.callback_handler.callbacks.insert(0, GradNorms(self._note_gradients))
        self._epochs_trained = 0
        self.add_callback(EpochOrder(lambda: self._epochs_trained))
        self.add_callback(FrozenCheck(self.check_frozen))
        self.add_callback(DeltaOnTop(self._checkpoints))
        self._choice = choice
        selection = select_layers(self.model, choice)
        vocabulary.check(self.model, self.processing_class, selection)
        if auto is not None:
            auto.check(self, selection.num_layers)
        self._select_now(selection)

    def _select(
        self,
        selection: LayerSelection,
        *,
        early: EarlyMask | None,
        reference: arguments.Reference,
        prefix_cache_bytes: int,
    ) -> None:
        """Everything that depends on what trains; little of it where that is still to be chosen."""
        full, decided = selection.full, self._auto is None or self._auto.report is not None
        arguments.refuse_peft(selection, self.model)
        self._selection = selection
        quantised = getattr(unwrap(self.model), "is_quantized", False)
        launchers.refuse_launcher(self.selection, self.accelerator, quantised=quantised)
        launchers.refuse_threads(self.args)
        launchers.refuse_disagreement(self.selection, self.accelerator)
        arguments.refuse_cast(
            self.args, None if full else self.model, launchers.casts_model(self.accelerator)
        )
        arguments.warn_of_frozen_head(self.model, self.selection)
        self._by_layer = parameters_by_layer(self.model, self.selection)
        self._trained = self.selection.parameters(self.model)
        self._in_parts = is_sharded(next(iter(self._trained.values())))
        self._base: DeltaBase | None = None
        self._frozen = self._fingerprints()
        if decided:
            base = DeltaBase.of(
                self.model, self.selection, frozen=self._frozen, device=self.accelerator.device
            )
            self._base = launchers.of_main_process(base, self.accelerator)
        self._replay = PrefixReplay(
            self.model,
            self.selection,
            prefix_cache_bytes,
            agree=partial(launchers.agree, self.accelerator),
        )
        # DPO and KTO score each batch in `compute_loss`, with the policy and the reference.
        self._scores_in_loss = reference == "ref_model"
        self._weight_sync = None
        if hasattr(self, "vllm_generation") and not full and decided:
            self._weight_sync = WeightSync(self.vllm_generation, self.model, self.selection)
        elif early is not None and decided:
            self._weight_sync = AnnouncedSync(self, self.selection, early)
        self._clipped: metrics.Norms | None = None
        self._optimizer_is_own = False
        self._fitted: Any = None
        self._initial: Mapping[str, Tensor] = {}
        if reference:
            self._set_reference(decided)
        if not self._initial and not full and decided:
            self._initial = {n: parts(p).detach().clone() for n, p in self._trained.items()}
        self._mask.put_on(self.selection, self.model)

    @property
    def selection(self) -> LayerSelection:
        """What trains, resolved against the model.

        Raises:
            SelectionError: On an attempt to set it. The optimizer, the reference and the
                fingerprints of what is frozen belong to this selection.
        """
        return self._selection

    @selection.setter
    def selection(self, selection: object) -> None:
        """Refuse it: a trainer has one selection."""
        raise SelectionError(
            f"selection={selection!r} was set on a trainer that was made for {self.selection}: its "
            "optimizer, reference and frozen tensors are those of that selection. Make another "
            "trainer, with selection=... and this one's model, which goes on from where it is."
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the selected layers; the wrapped trainer's arguments and result.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.

        Returns:
            What the wrapped trainer returns.

        Raises:
            FrozenTensorError: If a frozen tensor changed, at train start, at a save or at the end.
        """
        if args:
            args = (self._checkpoints.resumed(args[0]), *args[1:])
        elif "resume_from_checkpoint" in kwargs:
            resumed = self._checkpoints.resumed(kwargs["resume_from_checkpoint"])
            kwargs = {**kwargs, "resume_from_checkpoint": resumed}
        try:
            refuse_callbacks(self.callback_handler.callbacks, self.selection)
            with self._mask.during_training():
                if self.model_init is None:
                    arguments.refuse_peft(self.selection, self.model)
                    self._mask.put_on(self.selection, self.model)
                if self._auto is not None and self._auto.report is None:
                    self._choose(args[0] if args else kwargs.get("resume_from_checkpoint"))
                return super().train(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except BaseException:
            self._sync_everything()  # what failed may have been a sync
            raise
        finally:
            self._replay.clear()
            if self._auto is not None:
                self._auto.clear()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from the trainer's `model_init`, which it is masked on from now on.

        Args:
            trial: The trial of a hyperparameter search.

        Returns:
            The model.

        Raises:
            SelectionError: If the selection does not fit it.
        """
        model: nn.Module = super().call_model_init(trial)  # pyright: ignore[reportAttributeAccessIssue]
        if hasattr(self, "_choice"):  # not the first one, which is masked when all else is made
            selection = select_layers(model, self._choice)
            self._mask.take_off()
            self.model = model
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)
            self._select_now(selection)
        return model

    def _choose(self, resume_from_checkpoint: str | bool | None) -> None:
        """What trains, where that is left to the trainer."""
        assert self._auto is not None
        selection, self._auto.report = self._auto.choose(self, resume_from_checkpoint)
        self._mask.take_off()
        try:
            self._select_now(selection)
        except BaseException:
            self._auto.report = None
            self._select_now(select_layers(self.model, "all"))
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, after checking that only the selection changed.

        A delta that lies in the folder is brought to the same state.

        Args:
            output_dir: Folder, by default the args' `output_dir`.
            _internal_call: Transformers says so when it writes a checkpoint: that holds a delta
                where `checkpoint_format` is `"delta"`.

        Raises:
            FrozenTensorError: If a frozen tensor changed. Nothing is written then.
        """
        self.check_frozen()
        # Pushing to the hub is an internal call too, but names no folder and wants a whole model.
        is_checkpoint = _internal_call and output_dir is not None
        folder = Path(output_dir or self.args.output_dir)
        if is_checkpoint:
            self._checkpoints.clear(folder)
        if is_checkpoint and self.checkpoint_format == "delta":
            self._checkpoints.save(folder)
        else:
            super().save_model(output_dir, _internal_call)  # pyright: ignore[reportAttributeAccessIssue]
        if is_checkpoint:
            self._checkpoints.save_report(folder)
        else:
            self._checkpoints.refresh(folder, pushes=_internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._checkpoints.all_or_nothing(Path(self._get_output_dir(trial=trial), folder)):
            super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._checkpoints.pushing(Path(checkpoint_folder)):
            super()._push_from_checkpoint(checkpoint_folder)  # pyright: ignore[reportAttributeAccessIssue]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the wrapped trainer's model card, and into it how to load a delta beside it.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.
        """
        super().create_model_card(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._checkpoints.describe(Path(self.args.output_dir))

    def add_callback(self, callback: Any) -> None:
        """Add a callback, as the wrapped trainer does.

        Args:
            callback: A `TrainerCallback`, or a class of one.

        Raises:
            SelectionError: If it takes a checkpoint for a whole model, and checkpoints hold deltas.
        """
        refuse_readers([callback], getattr(self, "checkpoint_format", "full"))
        super().add_callback(callback)  # pyright: ignore[reportAttributeAccessIssue]

    def save_delta(self, path: str | os.PathLike[str]) -> Path | None:
        """Save only what was trained, as a delta on the model the trainer was made with.

        Args:
            path: Folder to make.

        Returns:
            The folder; None on every process but the main one, which writes it.

        Raises:
            DeltaError: If the folder exists or cannot be written.
            FrozenTensorError: If a frozen tensor changed. Nothing is written then.
            SelectionError: If `"auto"` has not chosen yet.
        """
        self.check_frozen()
        saved = self._save_delta(path, writes=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        return saved if self.accelerator.is_main_process else None

    def _save_delta(self, path: str | os.PathLike[str], *, writes: bool) -> Path:
        if self._base is None:
            raise SelectionError(
                'selection="auto" chooses its layers when training starts: nothing is trained yet '
                "that a delta could hold"
            )
        return save_delta(
            self.model,
            path,
            selection=self.selection,
            base=self._base,
            processing_class=self.processing_class,
            is_main_process=writes,
            check_frozen=self.selection.full,  # others were compared by whoever calls this
        )

    def check_frozen(self) -> None:
        """Compare every frozen tensor and buffer with what it was when the trainer was made.

        Raises:
            FrozenTensorError: If one changed.
        """
        self._follow_shards()
        check_frozen(self.model, self.selection, self._frozen, device=self.accelerator.device)

    def _fingerprints(self) -> dict[str, str]:
        """Of all that is frozen. A model that will be sharded lies on the CPU until it is."""
        frozen = frozen_tensors(self.model, self.selection)
        return fingerprints(frozen, device=self.accelerator.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The optimizer that the args name, over the trained tensors, each at its layer's rate.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.

        Returns:
            The optimizer.

        Raises:
            SelectionError: If an optimizer passed to the trainer holds other tensors than the
                selection, or has one learning rate where the selection scales some.
        """
        new = self.optimizer is None
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if new and self.optimizer_cls_and_kwargs is None and updates_in_backward(optim):
            self._refuse_updates_in_backward(f'optim="{optim}"')  # before it hangs up its hooks
        with self.selection.masked(self.model):  # it may be made before or after a training
            optimizer: Optimizer = super().create_optimizer(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            if new and not self.selection.full:
                keep_only(optimizer, self.selection.parameters(self.model).values())
            self._fit_optimizer(optimizer, new)
        except SelectionError:
            if new:
                self.optimizer = None  # or the next attempt would take it for a good one
            raise
        return optimizer

    def _refuse_updates_in_backward(self, name: str) -> None:
        refuse_updates_in_backward(name, self.selection, master_weights=self._keeps_masters())

    def _keeps_masters(self) -> bool:
        return self._master_weights and any(p.dtype in HALF for p in self._trained.values())

    def _fit_optimizer(self, optimizer: Optimizer, new: bool) -> None:
        self._fitted = optimizer = unwrap_optimizer(optimizer)
        if updates_in_backward(optimizer):
            self._refuse_updates_in_backward(type(optimizer).__name__)
            return
        own = self._optimizer_is_own or new
        if not own and set(self.selection.learning_rate_scale) != {1.0}:
            raise SelectionError(
                f"{self.selection}: the scales cannot be put into {type(optimizer).__name__}, "
                "which was passed in ready-made. Let the trainer build an ordinary optimizer from "
                "its args, or select without boost."
            )
        if new:
            scale_learning_rates(optimizer, self.model, self.selection)
        check_optimizer(optimizer, self.model, self.selection)
        if self._keeps_masters():
            step_in_float32(optimizer)
        check_steps(optimizer, lambda: self.selection.parameters(self.model))
        self._optimizer_is_own = own

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped trainer's loss, whose backward ends at the first trained layer.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.

        Returns:
            What the wrapped trainer returns.
        """
        # Here and not once for the run: TRL enables checkpointing anew after every generation.
        self._follow_shards()  # an evaluation shards the model, too
        training = self._replay.model.training
        try:
            with (
                backward_from_first_trained(self.model, self.selection),
                self._replay.passes(training=training, alone=self._scores_in_loss),
            ):
                return super().compute_loss(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            if not training:
                self._replay.forget_evaluation()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the layers' metrics beside those of a training step.

        Args:
            logs: Metrics. Those of a training step (they have a `loss`) are extended.
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.
        """
        if "loss" in logs:
            state = getattr(self.optimizer, "state", {})
            moved = metrics.relative_updates(self._by_layer, self._trained, self._initial, state)
            size = sum(shape(p).numel() for p in self._trained.values() if p.requires_grad)
            logs["layerrl/trained_parameters"] = float(size)
            if self._clipped is not None and "grad_norm" in logs:
                norms = metrics.before_clipping(logs["grad_norm"], self._clipped)
                logs.update(metrics.named("grad_norm", norms))
            logs.update(metrics.named("relative_update", moved))
        super().log(logs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _set_reference(self, decided: bool) -> None:
        # Before anything trains, the model is its own reference.
        self.ref_model = ReferenceModel(self.model, self._trained if decided else {})
        if hasattr(self.callback_handler, "ref_model"):  # of TRL's DPO with BEMA
            self.callback_handler.ref_model = self.ref_model
        if not decided:
            return
        self.remove_callback(SyncReference)
        if getattr(self.args, "sync_ref_model", False):
            self.add_callback(SyncReference(self.ref_model, self.accelerator))
        elif not self.selection.full:
            self._initial = self.ref_model.tensors

    def _follow_shards(self) -> None:
        """Go on in parts: of other parameters under FSDP2, of the same ones under ZeRO-3."""
        if self._in_parts or not launchers.shards_model(self.accelerator):
            return
        parameters = {plain_name(n): p for n, p in unwrap(self.model).named_parameters()}
        self._in_parts = is_sharded(parameters[next(iter(self._trained))])
        if not self._in_parts:
            return
        self._trained = self.selection.parameters(self.model)
        self._by_layer = parameters_by_layer(self.model, self.selection)
        self._frozen = self._fingerprints()
        initial = {
            name: sharded_like(value, self._trained[name]) for name, value in self._initial.items()
        }
        if isinstance(getattr(self, "ref_model", None), ReferenceModel):
            shared = any(value is self.ref_model.initial[0] for value in self._initial.values())
            self.ref_model.follow(self._trained)
            initial = self.ref_model.tensors if shared else initial
        self._initial = initial

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped trainer's scheduler.

        Transformers asks for it when the model has been sharded, before it loads a checkpoint.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.

        Returns:
            What the wrapped trainer returns.
        """
        self._follow_shards()
        if not launchers.uses_deepspeed(self.accelerator):  # which wraps it in one of its own
            optimizer = unwrap_optimizer(self.optimizer)
            if optimizer is not None and optimizer is not self._fitted:  # made in a subclass
                self._fit_optimizer(optimizer, False)
        return super().create_scheduler(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_in_one_process():
            super()._save_optimizer_and_scheduler(output_dir)  # pyright: ignore[reportAttributeAccessIssue]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._as_in_one_process():
            super()._load_optimizer_and_scheduler(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def _as_in_one_process(self) -> Iterator[None]:
        """Beside a delta, FSDP2's optimizer is saved as any other, for any number of processes."""
        if self.checkpoint_format == "full" or not launchers.uses_fsdp(self.accelerator):
            yield
            return
        self.is_fsdp_enabled = False  # what decides in transformers between its formats
        try:
            with launchers.optimizer_in_one_piece(self.optimizer.optimizer):
                yield
        finally:
            self.is_fsdp_enabled = True

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Transformers calls this before it has the model sharded."""
        if launchers.shards_model(self.accelerator):
            self.check_frozen()  # before it takes the tensors apart
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            if launchers.uses_deepspeed(self.accelerator):  # it loads all but the reference itself
                self._sync_everything()
                self._checkpoints.load_reference(folder)
        started = super()._init_training_state(  # pyright: ignore[reportAttributeAccessIssue]
            max_steps,
            num_update_steps_per_epoch,
            num_train_epochs,
            resume_from_checkpoint,
            *args,
            **kwargs,
        )
        self._epochs_trained = started[0]
        return started

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._sync_everything()
        self._follow_shards()
        if not self._checkpoints.load(Path(resume_from_checkpoint), resumes=True):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore[reportAttributeAccessIssue]

    def _load_best_model(self) -> None:
        self._sync_everything()
        self._follow_shards()
        best = self.state.best_model_checkpoint
        if not self._checkpoints.load(Path(best), resumes=False):
            super()._load_best_model()  # pyright: ignore[reportAttributeAccessIssue]

    def _sync_everything(self) -> None:
        if self._weight_sync is not None:
            self._weight_sync.reset()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """What the wrapped trainer makes of a batch, or has made of it to choose the layers."""
        answer = self._answered
        return answer(inputs) if self._auto is None else self._auto.batch(self, inputs, answer)

    def _answered(self, inputs: Any) -> dict[str, Any]:
        own_rollout = getattr(self, "rollout_func", None)  # which may ask the engine itself
        if own_rollout is not None and isinstance(self._weight_sync, WeightSync):
            self._weight_sync.freshen()
        with self._replay.batch(training=self._replay.model.training):
            return super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Score completions, before the loss and in it; generation does not go through here."""
        self._follow_shards()
        with self._replay.passes(training=self._replay.model.training):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _note_gradients(self) -> None:
        if not launchers.uses_deepspeed(self.accelerator):  # which has no gradients left by now
            self._clipped = metrics.clipped_norms(self._by_layer, self._trained.values())
