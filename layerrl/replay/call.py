"""One call of a model, whose prefix may be replayed, and the comparison with the plain call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from layerrl.activations import checkpoints_reentrantly
from layerrl.blocks import replaced_forwards
from layerrl.randomness import random_state, set_random_state
from layerrl.replay.attributes import Snapshot
from layerrl.replay.comparing import Observed, difference, flat, gradients
from layerrl.replay.entering import Request
from layerrl.replay.prefix import Forward, Prefix, RestartError
from layerrl.replay.recordings import Recordings
from layerrl.replay.state import modules_of, unmoved, without_hooks
from layerrl.shards import is_sharded

if TYPE_CHECKING:
    from layerrl.replay import PrefixReplay


class Call:
    """One call of the model."""

    def __init__(
        self,
        replay: PrefixReplay,
        recordings: Recordings,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._replay, self._recordings = replay, recordings
        self._forward, self._args, self._kwargs = forward, args, kwargs
        self._request = Request(replay.model, args, kwargs)
        self._random_state = random_state(*self._request.devices)

    def run(self, *, records: bool) -> Any:
        """Compute the call's output."""
        prefix = self._prefix(records=records)
        before = Snapshot(modules_of([self._replay.model], but=self._replay.layers))
        try:
            output = self._through(prefix)
        except RestartError:
            before.restore()
            set_random_state(self._random_state)
        else:
            self._replay.num_replayed += prefix.replays
            if not prefix.reached:  # what calls them would be compiled anew each time
                problem = "the model does not call its layers, or is compiled around them"
                self._replay.switch_off(problem)
            return output
        if prefix.compares:
            # What the user counts, or a checkpoint around the call keeps, is of the call alone.
            with without_hooks(self._replay.model), saved_tensors_hooks(_as_it_is, _as_it_is):
                self._verify(prefix.kind)
            set_random_state(self._random_state)
            if self._replay.enabled:
                return self.run(records=records)
            return self._forward(*self._args, **self._kwargs)
        self._replay.refuse(prefix.kind, "the model calls its layers otherwise than when recorded")
        return self._forward(*self._args, **self._kwargs)

    def _through(self, prefix: Prefix) -> Any:
        with replaced_forwards(self._replay.prefix, prefix.layer):
            output = self._forward(*self._args, **self._kwargs)
        prefix.finish()
        return output

    def _verify(self, kind: tuple[Any, ...]) -> None:
        replay, watched, problems = self._replay, self._prefix(watched=True), []
        with _noting(problems):
            replayed = self._observed(self._prefix(trusted=True))
        # The plain pass gathers sharded layers: all processes make it, or none.
        agreed = replay.agree(not problems)
        if agreed:
            with _noting(problems):
                set_random_state(self._random_state)
                plain = self._observed(watched)
                if not watched.random:
                    found = difference(plain, replayed, exact=watched.dtype)
                    problems += [] if found is None else [found]
            agreed = replay.agree(not problems)
        if not agreed:
            replay.switch_off(*problems or ["it did not match in another process"])
        elif not replay.agree(not watched.random):
            replay.refuse(kind, "the layers draw random numbers")
        else:
            replay.verified.add(kind)

    def _prefix(self, **how: bool) -> Prefix:
        return Prefix(self._replay, self._recordings, self._request, **how)

    def _observed(self, prefix: Prefix) -> Observed:
        """What the call returns, and the gradients of a fixed mean of it."""
        with unmoved(self._replay.model):
            outputs = flat(self._through(prefix))
        trained = list(self._replay.selection.parameters(self._replay.model).values())
        if any(map(is_sharded, trained)) or any(
            map(checkpoints_reentrantly, self._replay.trained_layers)
        ):
            trained = []  # which would need a whole backward
        found = gradients(outputs, trained)
        return [v.detach() if isinstance(v, Tensor) else v for v in outputs], found


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Note what ends a call, whatever a model does with fewer layers."""
    try:
        yield
    except (Exception, RestartError) as error:
        problems.append(f"the model cannot run on it: {type(error).__name__}: {error}")


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
