"""Run the frozen prefix once per batch: record what enters the first trained layer, replay it.

The layers below the first trained one compute the same for the reference, the old and the current
policy, and in every pass over the same rows. Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerrl.blocks import find_blocks, replaced_forwards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from layerrl.selection import LayerSelection

    Forward = Callable[..., Any]
    Compute = Callable[[], Any]

logger = logging.getLogger(__name__)

# Largest difference of a log-probability that the first replay may show. In float32 on a CPU there
# is none; other kernels round differently for other batch shapes.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_TOLERANCE_16_BIT = 2e-2


@dataclass(slots=True)
class Recording:
    """What left the frozen prefix in one pass over a batch."""

    tokens_BT2: Tensor | None = None
    """Token ids and attention mask of the batch, to know its rows again."""
    hidden_BTH: Tensor | None = None
    """The hidden states; None where they were not recorded."""
    num_rows: int = 0
    """Rows recorded so far."""
    sampled: bool = False
    """Whether they were recorded while generating."""

    def holds(self, rows_B: Tensor | None, tokens_BT2: Tensor) -> bool:
        """Whether these rows of the recording are exactly those tokens."""
        if self.tokens_BT2 is None or self.num_rows < len(self.tokens_BT2):
            return False
        if rows_B is None:
            return torch.equal(self.tokens_BT2, tokens_BT2)
        return bool((rows_B < self.num_rows).all()) and torch.equal(
            self.tokens_BT2[rows_B], tokens_BT2
        )


class PrefixReplay:
    """Recordings of the hidden states that leave a model's frozen prefix.

    Passes run through `run`. Inside `generating`, the first one over the batch is recorded; inside
    `rows`, a pass over some of its rows replays those, if their tokens are what was recorded. The
    first time, it runs plainly too and everything it returns is compared: if that differs, or the
    replay fails, nothing is ever replayed again and one warning says why. Once it has matched, the
    other passes inside `generating` are replayed as well. Batches for training and for evaluation
    have recordings, and first times, of their own.

    Inside `repeating`, each pass over tokens that were not seen before is recorded, and a later one
    over the same tokens is replayed: a policy that is scored before its reference.

    Inside `sampling`, what leaves the prefix while the model generates can be recorded instead, so
    that not even the first pass runs it. That is compared, too, and given up alone if it differs.

    Args:
        model: The model whose prefix is replayed.
        selection: What trains; nothing is recorded when no whole layer lies below.
        max_bytes: A batch that would take more is not recorded.
        record_while_generating: Record inside `sampling`.
        agree: Whether something is so in all processes that train together. A pass that one of them
            replays and another does not would leave them waiting for each other.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: LayerSelection,
        max_bytes: int,
        *,
        record_while_generating: bool = False,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        blocks = find_blocks(model)
        self._agree = agree
        self._prefix = [blocks.modules[layer] for layer in selection.frozen_prefix]
        self._max_bytes = max_bytes
        self._extras: list[tuple[None, ...] | None] = [None] * len(self._prefix)
        self._generating = False
        self._rows_B: Tensor | None = None
        self._recordings: dict[bool, Recording] = {}
        self._repeated: list[Recording] | None = None
        self._verified: set[tuple[bool, bool]] = set()
        self.samples = record_while_generating
        """Whether to record inside `sampling`; False for good once that did not match."""
        self._sampled: list[Tensor] = []
        self.enabled = bool(self._prefix) and agree(max_bytes > 0)
        """Whether passes are recorded at all; False for good once a replay did not match."""

    @property
    def num_bytes(self) -> int:
        """Memory that the recordings take."""
        recordings = [*self._recordings.values(), *(self._repeated or ())]
        held = (recording.hidden_BTH for recording in recordings)
        return sum(hidden.nbytes for hidden in held if hidden is not None)

    def clear(self) -> None:
        """Forget all recordings."""
        self._recordings.clear()
        self._sampled = []

    @contextmanager
    def generating(self, *, training: bool) -> Iterator[Recording]:
        """Passes inside run over a whole new batch, always in the same order of rows.

        Args:
            training: Whether the batch is for training or for evaluation.

        Yields:
            The recording, filled by the first pass.
        """
        self._recordings[training] = Recording()
        self._generating = True
        self._sampled = []
        try:
            yield self._recordings[training]
        except BaseException:
            self._sampled = []
            raise
        finally:
            self._generating = False

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The model generates inside: one pass over the prompts, then token by token."""
        if not (self.enabled and self.samples and self._generating):
            yield
            return

        left = self._max_bytes - sum(part.nbytes for part in self._sampled)

        def record(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            nonlocal left
            hidden, extras = _parts(output)
            self._extras = [extras] * len(self._prefix)
            left -= hidden.nbytes
            if left >= 0:
                self._sampled.append(hidden)

        hook = self._prefix[-1].register_forward_hook(record)
        try:
            yield
        finally:
            hook.remove()

    def take_sampled(self, recording: Recording, tokens_BT2: Tensor) -> bool:
        """Make a recording of what was recorded while generating.

        Args:
            recording: A new recording, filled.
            tokens_BT2: Token ids and attention mask of the whole batch.

        Returns:
            Whether there was one, of exactly these tokens' shape and small enough.
        """
        num_rows, num_tokens = tokens_BT2.shape[:2]
        parts, self._sampled = self._sampled, []
        # The last token was sampled but never run; nothing is read from its position.
        parts += [part[:, -1:] for part in parts[-1:]]
        fits = (
            {len(part) for part in parts} == {num_rows}
            and sum(part.shape[1] for part in parts) == num_tokens
            and sum(part.nbytes for part in parts) <= self._max_bytes
        )
        if not self._agree(fits):
            return False
        hidden_BTH = torch.cat(parts, dim=1)
        recording.tokens_BT2, recording.hidden_BTH = tokens_BT2, hidden_BTH
        recording.num_rows, recording.sampled = num_rows, True
        return True

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Passes inside run over whole batches, those over the same tokens with the same inputs."""
        self._repeated = []
        try:
            yield
        finally:
            self._repeated = None

    @contextmanager
    def rows(self, rows_B: Tensor | None) -> Iterator[None]:
        """Passes inside run over these rows of the recorded batch; None: over unknown ones."""
        self._rows_B = rows_B
        try:
            yield
        finally:
            self._rows_B = None

    def run(self, compute: Compute, *, tokens_BT2: Tensor, training: bool) -> Any:  # noqa: ANN401
        """The result of `compute`, with the prefix recorded or replayed where that is possible.

        Args:
            compute: Runs the model over a batch, in one or more forward passes, and gives a tuple
                or a transformers output.
            tokens_BT2: Token ids and attention mask of that batch.
            training: Whether the batch is for training or for evaluation.

        Returns:
            What `compute` returns.
        """
        if not self.enabled:
            return compute()
        if self._repeated is not None:
            return self._run_repeated(compute, self._repeated, tokens_BT2, training)
        recording = self._recordings.get(training)
        if recording is None:
            return compute()
        rows_B = self._rows_B
        if self._generating and recording.tokens_BT2 is None:
            if self.samples and self.take_sampled(recording, tokens_BT2):
                if (training, True) in self._verified:
                    with self._replaying(recording, None):
                        return compute()
                return self._verify(compute, recording, None, training)
            recording.tokens_BT2 = tokens_BT2
            with self._recording(recording):
                return compute()
        known = self._generating or rows_B is not None
        if not self._agree(known and recording.holds(rows_B, tokens_BT2)):
            return compute()
        if (training, recording.sampled) in self._verified:
            with self._replaying(recording, rows_B):
                return compute()
        return compute() if self._generating else self._verify(compute, recording, rows_B, training)

    def _run_repeated(
        self, compute: Compute, before: list[Recording], tokens_BT2: Tensor, training: bool
    ) -> Any:  # noqa: ANN401
        recording = next((made for made in before if made.holds(None, tokens_BT2)), None)
        known = self._agree(recording is not None)
        if recording is None or not known:
            recording = Recording(tokens_BT2=tokens_BT2)
            before.append(recording)
            with self._recording(recording):
                return compute()
        if (training, False) not in self._verified:
            return self._verify(compute, recording, None, training)
        with self._replaying(recording, None):
            return compute()

    def _verify(
        self, compute: Compute, recording: Recording, rows_B: Tensor | None, training: bool
    ) -> Any:  # noqa: ANN401
        plain = compute()
        problem, compared = None, False
        try:
            with torch.no_grad(), torch.random.fork_rng(), self._replaying(recording, rows_B):
                replayed = compute()
            difference = self._difference(plain, replayed, recording, rows_B)
            compared = difference is not None  # or nothing but padding: the next pass may tell
            assert recording.hidden_BTH is not None
            tolerance = _TOLERANCE.get(recording.hidden_BTH.dtype, _TOLERANCE_16_BIT)
            if difference is not None and not difference <= tolerance:
                problem = f"results differ by {difference:.3g} (at most {tolerance:.0e})"
        except Exception as error:  # whatever a model does with a shortened stack, training goes on
            problem = f"the model cannot run on it: {type(error).__name__}: {error}"
        if self._agree(problem is None):
            if self._agree(compared):
                self._verified.add((training, recording.sampled))
            return plain
        problem = problem or "it did not match in another process"
        self.clear()
        if recording.sampled:
            self.samples = False
            what = "what was recorded while generating"
        else:
            self.enabled = False
            what = f"the frozen prefix ({len(self._prefix)} layers)"
        logger.warning(
            "%s will not be replayed: %s. Training goes on, with the same results, and runs the "
            "prefix in %s pass.",
            what[0].upper() + what[1:],
            problem,
            "one" if recording.sampled else "every",
        )
        return plain

    @staticmethod
    def _difference(
        plain: Any,  # noqa: ANN401
        replayed: Any,  # noqa: ANN401
        recording: Recording,
        rows_B: Tensor | None,
    ) -> float | None:
        """Largest difference in what was computed for tokens, padding aside; None: no tokens."""
        assert recording.tokens_BT2 is not None
        mask_BT = (
            recording.tokens_BT2[..., 1] if rows_B is None else recording.tokens_BT2[rows_B, :, 1]
        )
        largest = []
        for a, b in zip(_values(plain), _values(replayed), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                of_tokens = (a.detach() - b).abs().double()
                if a.dim() == 2:
                    of_tokens = of_tokens[mask_BT[:, -a.shape[1] :].bool()]
                if of_tokens.numel():
                    largest.append(of_tokens.max().item())
        return max(largest, key=lambda value: (math.isnan(value), value), default=None)

    def _recording(self, recording: Recording) -> Any:  # noqa: ANN401 - a context manager
        last = len(self._prefix) - 1

        def record(index: int, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                output = forward(*args, **kwargs)
                hidden, self._extras[index] = _parts(output)
                if index == last:
                    self._store(hidden.detach(), recording)
                return output

            return run

        return replaced_forwards(self._prefix, record)

    def _store(self, hidden_BTH: Tensor, recording: Recording) -> None:
        assert recording.tokens_BT2 is not None
        num_rows = len(recording.tokens_BT2)
        left = self._max_bytes - sum(
            made.hidden_BTH.nbytes for made in self._repeated or () if made.hidden_BTH is not None
        )
        if recording.num_rows == 0 and num_rows * hidden_BTH[0].nbytes <= left:
            recording.hidden_BTH = hidden_BTH.new_empty((num_rows, *hidden_BTH.shape[1:]))
        if recording.hidden_BTH is not None:
            end = recording.num_rows + len(hidden_BTH)
            recording.hidden_BTH[recording.num_rows : end] = hidden_BTH
            recording.num_rows = end

    def _replaying(self, recording: Recording, rows_B: Tensor | None) -> Any:  # noqa: ANN401
        hidden_BTH = recording.hidden_BTH
        assert hidden_BTH is not None
        last = len(self._prefix) - 1
        passed = 0

        def replaying(index: int, _: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                nonlocal passed
                hidden = args[0] if args else kwargs["hidden_states"]
                if index == last:
                    chosen = slice(passed, passed + len(hidden))
                    passed += len(hidden)
                    # A copy either way: what comes after may work in place.
                    picked = chosen if rows_B is None else rows_B[chosen]
                    hidden = hidden_BTH[picked].clone()
                extra = self._extras[index]
                return hidden if extra is None else (hidden, *extra)

            return run

        return replaced_forwards(self._prefix, replaying)


def _values(output: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """What a pass returned, one by one."""
    return tuple(output.values() if isinstance(output, dict) else output)


def _parts(output: Any) -> tuple[Tensor, tuple[None, ...] | None]:  # noqa: ANN401
    """A layer's hidden states, and what stands for the rest of its output; None: there is none."""
    if isinstance(output, tuple):
        return output[0], (None,) * (len(output) - 1)
    return output, None
