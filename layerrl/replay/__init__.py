"""Run the frozen prefix once per batch: record what leaves it, replay it where the same enters.

The layers below the first trained one compute the same for the reference, the old and the current
policy, in every log-probability pass and loss over the same rows. They are a function of what
enters layer 0 and of frozen weights, so that is what a recording is known by.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerrl.blocks import replaced_forwards, unwrap
from layerrl.replay.call import Call
from layerrl.replay.recordings import Recordings
from layerrl.selection import LayerSelection

logger = logging.getLogger(__name__)


class PrefixReplay:
    """Recordings of the hidden states that leave a model's frozen prefix.

    Inside `passes`, every call of the model is looked at where it enters layer 0. Inside `batch`,
    and inside passes that stand alone, it is recorded; where all its rows are known, the prefix
    does not run and what left it then is handed on. A row is known by the bits of all that enters
    layer 0 with it (hidden states, masks, positions, whatever the model passes), by what enters the
    other layers of the prefix beside the hidden states, by autocast and the like, and by the
    prefix's weights.

    Nothing is replayed in a call that asks for anything else the prefix contributes to (hidden
    states, attentions, router logits and the loss made of them, a cache, a gradient of its inputs),
    nor while a module of the prefix is random or carries a hook. One line says why, once.

    The first time that a kind of call could be replayed, it runs both ways, and what it returns and
    the trained tensors' gradients are compared. If they differ, or the replay fails, nothing is
    ever replayed again. Gradients are not compared where tensors are sharded or layers are
    checkpointed reentrantly: neither lets them be asked for without a whole backward.

    Args:
        model: The model whose prefix is replayed.
        selection: What trains; nothing is recorded when no whole layer lies below all of it.
        max_bytes: Memory that recordings may take at a time. A batch is not recorded that would
            take more than what is left of it, as an evaluation's beside one to train on.
        agree: Whether something is so in all processes that train together. A pass that one of them
            replays and another does not would leave them waiting for each other.
        compiled: Whether the model is known to be compiled around its layers, or will be. A call
            that is traced cannot say so itself.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: LayerSelection,
        max_bytes: int,
        *,
        agree: Callable[[bool], bool] = bool,
        compiled: bool = False,
    ) -> None:
        blocks = selection.blocks(model)
        self.model = model
        self.selection = selection
        self.prefix = [blocks.modules[layer] for layer in selection.frozen_prefix]
        self.trained_layers = [blocks.modules[layer] for layer in selection.layers]
        self.layers = blocks.modules
        self.agree = agree
        self._compiled = compiled
        self.verified: set[tuple[Any, ...]] = set()
        """Kinds of calls of which a replay has matched."""
        self.refused: dict[tuple[Any, ...], str] = {}
        """Kinds of calls of which none can be replayed, and why; others may be."""
        self.num_replayed = 0
        """Calls of the model so far that did not run the prefix."""
        self.enabled = bool(self.prefix) and agree(max_bytes > 0)
        """Whether calls are recorded at all; False for good once a replay did not match."""
        self.max_bytes = max_bytes
        """Memory that recordings may take at a time."""
        self._batches: dict[bool, Recordings] = {}
        self._alone: Recordings | None = None
        self._is_new_batch = self._inside = False
        self._said: set[str] = set()

    @property
    def num_bytes(self) -> int:
        """Memory that the recordings take."""
        alone = [] if self._alone is None else [self._alone]
        return sum(recordings.num_bytes for recordings in (*self._batches.values(), *alone))

    def clear(self) -> None:
        """Forget all recordings."""
        self._batches.clear()

    def forget_evaluation(self) -> None:
        """Forget the recordings of a batch for evaluation."""
        self._batches.pop(False, None)

    @contextmanager
    def batch(self, *, training: bool) -> Iterator[None]:
        """Forget the batch before, of training or of evaluation; passes inside are recorded."""
        self._batches.pop(training, None)
        self._batches[training] = Recordings(self.max_bytes - self.num_bytes, partly=False)
        self._is_new_batch = True
        try:
            yield
        except BaseException:  # no loss will follow, after which an evaluation's are forgotten
            self._batches.pop(training, None)
            raise
        finally:
            self._is_new_batch = False

    @contextmanager
    def passes(self, *, training: bool, alone: bool = False) -> Iterator[None]:
        """Record or replay calls of the model inside; `training`: over a batch for training.

        `alone`: there are no other passes over this batch, so that its recordings end with these.
        """
        if not self.enabled or self._inside:
            yield
            return

        def look_at(_: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                recordings = self._batches.get(training) if self._alone is None else self._alone
                records = self._alone is not None or self._is_new_batch
                if not self.enabled or recordings is None or not (records or recordings.used):
                    return forward(*args, **kwargs)
                if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                    return forward(*args, **kwargs)  # tensors have no values then
                recordings.used = True
                return Call(self, recordings, forward, args, kwargs).run(records=records)

            return run

        if self._compiled and (alone or self._is_new_batch):
            self.say("the model is compiled around its layers")
        self._inside = True
        left = self.max_bytes - self.num_bytes
        self._alone = Recordings(left, partly=True) if alone else None
        try:
            with replaced_forwards([unwrap(self.model)], look_at):
                yield
        finally:
            self._inside = False
            self._alone = None

    def say(self, why: str) -> None:
        """Log why the prefix runs although it could have been spared, once for each reason."""
        if why not in self._said:
            self._said.add(why)
            logger.warning(
                "The frozen prefix (%d layers) is not replayed in every pass: %s. Results are the "
                "same; such passes take longer.",
                len(self.prefix),
                why,
            )

    def refuse(self, kind: tuple[Any, ...], why: str) -> None:
        """Replay no call of this kind again, and say why."""
        self.refused[kind] = why
        self.say(why)

    def switch_off(self, problem: str) -> None:
        """Never replay again, and say why."""
        self.clear()
        self.enabled = False
        logger.warning(
            "The frozen prefix (%d layers) will not be replayed: %s. Training goes on, with the "
            "same results, and runs the prefix in every pass.",
            len(self.prefix),
            problem,
        )
