"""The passes over a batch: which are over the same rows, and what is spared in them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerrl.blocks import replaced_forwards, unwrap
from layerrl.checkpointing import KeptActivations
from layerrl.replay import PrefixReplay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from layerrl.selection import LayerSelection


class Passes:
    """Every call of the model while a batch is scored or trained on goes through here.

    Args:
        model: The model that trains.
        selection: What trains.
        prefix_cache_bytes: Memory that recordings of the prefix may take.
        activation_bytes: Memory that kept activations may take.
        shared: Whether the recordings are taken off that memory.
        scores_in_loss: Whether all passes over a batch are in its loss, as those of DPO.
        agree: Whether something is so in all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: LayerSelection,
        *,
        prefix_cache_bytes: int,
        activation_bytes: int,
        shared: bool,
        scores_in_loss: bool,
        agree: Callable[[bool], bool],
    ) -> None:
        self._model = model
        self._shared, self._scores_in_loss = shared, scores_in_loss
        self._kept = KeptActivations(model, selection, activation_bytes)
        self._keeps = activation_bytes > 0
        self._inside = False
        self.replay = PrefixReplay(model, selection, prefix_cache_bytes, agree=agree)
        """The prefix's recordings."""

    def batch(self) -> AbstractContextManager[None]:
        """A new batch is made and scored inside, for training or evaluation by the model's mode."""
        return self.replay.batch(training=self._model.training)

    @contextmanager
    def loss(self, *, stepped: bool) -> Iterator[None]:
        """The loss of a batch is computed inside.

        Args:
            stepped: Whether the optimizer has stepped, and so has all its state.

        Yields:
            Nothing.
        """
        training = self._model.training
        try:
            with self.scored(stepped=stepped, alone=self._scores_in_loss):
                yield
        finally:
            if not training:
                self.replay.forget_evaluation()

    @contextmanager
    def scored(self, *, stepped: bool, alone: bool = False) -> Iterator[None]:
        """Calls of the model inside are passes over the batch.

        Args:
            stepped: Whether the optimizer has stepped, and so has all its state.
            alone: Whether there are no other passes over it.

        Yields:
            Nothing.
        """
        if self._inside:
            yield
            return

        def keep(_: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                held = self.replay.num_bytes if self._shared else 0
                num_tokens = _num_tokens(args, kwargs)
                with self._kept.during(num_tokens, held=held, stepped=stepped):
                    return forward(*args, **kwargs)

            return run

        keeping = replaced_forwards([unwrap(self._model)], keep) if self._keeps else nullcontext()
        self._inside = True
        try:
            with self.replay.passes(training=self._model.training, alone=alone), keeping:
                yield
        finally:
            self._inside = False


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens that a model is called with, padding included."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    ids = args[0] if args else ids
    if isinstance(ids, Tensor):
        return ids.numel()
    return embeddings[..., 0].numel() if isinstance(embeddings, Tensor) else 1
