"""How a masked trainer is called: what the wrapped trainer is given, and what the mixin keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from layerrl.blocks import is_peft
from layerrl.quantisation import quantised_base
from layerrl.selection import LayerSelection, select_layers
from layerrl.selection.rows import resolved
from layerrl.trainer import adapters, arguments
from layerrl.trainer.announced import EarlyMask, announces
from layerrl.trainer.auto import AutoSelection
from layerrl.trainer.checkpoints import refuse_readers
from layerrl.trainer.vocabulary import Vocabulary


def is_full(selection: object) -> bool:
    """Whether a selection, resolved or as it was given, is of every parameter."""
    if isinstance(selection, LayerSelection):
        return selection.full
    return isinstance(selection, str) and selection == "full"


class TrainerCall:
    """The arguments of one masked trainer: checked, before weights are loaded where possible.

    `args` and `kwargs` are what the wrapped trainer was given, the keywords the mixin's own.

    Raises:
        LayerRLError: If something does not make sense, or does not fit the model.
    """

    def __init__(
        self,
        cls: type,
        mixin: type,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        selection: Any,
        prefix_cache_bytes: int,
        master_weights: bool,
        checkpoint_format: str,
    ) -> None:
        known = arguments.names(cls, mixin)
        given = {**dict(zip(known, args, strict=False)), **kwargs}
        model, self._trainer_args = given.get("model"), given.get("args")
        arguments.check_given(cls, mixin, given)
        self.adapts = adapters.has_adapters(model, given.get("peft_config"))
        """Whether PEFT's adapters train, and not the model's own tensors."""
        arguments.check_keywords(
            kwargs,
            prefix_cache_bytes=prefix_cache_bytes,
            master_weights=master_weights,
            checkpoint_format=checkpoint_format,
        )
        self.auto = AutoSelection.of(selection)
        """The choice that is left to the trainer; None where it is given."""
        chosen = selection if self.auto is None else "all"
        self._choice = [*chosen] if isinstance(chosen, Iterator) else chosen
        # A path's config will do, so that a typo is not found after minutes of loading weights.
        is_model = isinstance(model, nn.Module)
        described = model if is_model else arguments.config_at(model, self._trainer_args)
        if self.adapts and is_model and not is_peft(model):
            described = getattr(model, "config", None)  # its own tensors may be packed: they stay
        chosen = self._choice if described is None else self._early(described)
        self._full = full = is_full(chosen)
        if full and self.adapts:
            adapters.refuse_full(selection)
        if self.adapts and not (is_model and is_peft(model)):
            config = adapters.config_for(given.get("peft_config"), described, chosen)
            if config is not None:
                args, kwargs = arguments.with_argument(known, args, kwargs, "peft_config", config)
        self.prefix_cache_bytes = int(prefix_cache_bytes)
        self.master_weights = bool(master_weights) and not full
        # Of a PEFT model, a trainer's own checkpoints hold the adapters.
        self.checkpoint_format = "full" if full or self.adapts else checkpoint_format
        refuse_readers(given.get("callbacks") or (), self.checkpoint_format)
        self.early = None
        """The mask under which an asynchronous trainer announces its weights."""
        if self.adapts and announces(cls):
            adapters.refuse_announcing(cls.__name__)
        if not full and announces(cls):
            own_transfer = given.get("weight_transfer") is not None
            self.early = EarlyMask(self._choice, own_transfer=own_transfer)
            callbacks = [*(given.get("callbacks") or ()), self.early]
            args, kwargs = arguments.with_argument(known, args, kwargs, "callbacks", callbacks)
        self._vocabulary = Vocabulary(model, described, given.get("processing_class"))
        self.reference: arguments.Reference = None
        """How the trainer asks for a reference model; known when the trainer has been made."""
        self._mixin = mixin
        self.args, self.kwargs = args, kwargs
        """What the wrapped trainer is given."""

    def _early(self, described: Any) -> Any:
        """What trains of a model that is not loaded yet, as far as its config can tell."""
        chosen = arguments.chosen_early(described, self._choice)
        if self.auto is not None and isinstance(chosen, LayerSelection):
            self.auto.check_number(chosen.num_layers)
        return chosen

    @contextmanager
    def making(self, trainer: Any) -> Iterator[None]:
        """Inside, the wrapped trainer is made."""
        with (
            # That of adapters is TRL's own: they are switched off for it.
            nullcontext()
            if self.adapts
            else arguments.without_reference_model(trainer, self._mixin, self._set_reference),
            nullcontext() if self._full or self.adapts else quantised_base(self._trainer_args),
            adapters.reference_of_default([*self.args, self.kwargs.get("model")][0]),
            self.early or nullcontext(),
        ):
            yield
        self.args, self.kwargs = (), {}  # or data and optimizers would live as long as the trainer

    def _set_reference(self, reference: arguments.Reference) -> None:
        self.reference = reference

    @property
    def decided(self) -> bool:
        """Whether it is known what trains."""
        return self.auto is None or self.auto.report is not None

    def decide(self, trainer: Any, folder: Path | None) -> LayerSelection:
        """Choose what trains, where that is left to the trainer; later models get the same."""
        assert self.auto is not None
        self._choice, self.auto.report = self.auto.choose(trainer, folder)
        return self._choice

    def undecide(self, model: nn.Module) -> LayerSelection:
        """Take back `decide`, whose selection the trainer could not go on with."""
        assert self.auto is not None
        self._choice, self.auto.report = "all", None
        return select_layers(model, self._choice)

    def forget_batches(self) -> None:
        """Forget what was generated to choose by, and not asked for since."""
        if self.auto is not None:
            self.auto.clear()

    def selection_for(self, model: nn.Module, processing_class: object) -> LayerSelection:
        """The selection of a model; all layers if the trainer is still to choose them."""
        choice = self._choice
        if isinstance(choice, LayerSelection) and choice.awaits_rows:
            choice = resolved(choice, model, self._vocabulary.added_rows(model, processing_class))
        return select_layers(model, choice)

    def check_made(self, trainer: Any, selection: LayerSelection) -> None:
        """Refuse what only the trainer that was made shows: its vocabulary, what `"auto"` needs."""
        self._vocabulary.check(trainer.model, trainer.processing_class, selection)
        if self.auto is not None:
            self.auto.check(trainer, selection.num_layers)
