"""Run the frozen prefix once per batch: record what enters the first trained layer, replay it.

The layers below the first trained one compute the same for the reference, the old and the current
policy, and in every pass over the same rows. Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerrl.blocks import find_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from layerrl.selection import LayerSelection

    Forward = Callable[..., Any]
    Compute = Callable[[], tuple[Any, ...]]

logger = logging.getLogger(__name__)

# Largest difference of a log-probability that the first replay may show. In float32 on a CPU there
# is none; other kernels round differently for other batch shapes.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_TOLERANCE_16_BIT = 2e-2


class PrefixReplay:
    """Recordings of the hidden states that leave a model's frozen prefix.

    Passes run through `run`. Inside `generating`, the first one over the batch is recorded and the
    others replay it; inside `rows`, a pass over some of its rows replays those. The first such pass
    also runs plainly and is compared: if they differ, or the replay fails, nothing is ever replayed
    again and one warning says why.

    Args:
        model: The model whose prefix is replayed.
        selection: What trains; nothing is recorded when no whole layer lies below.
        max_bytes: A batch that would take more is not recorded.
    """

    def __init__(self, model: nn.Module, selection: LayerSelection, max_bytes: int) -> None:
        blocks = find_blocks(model)
        self._prefix = [blocks.modules[layer] for layer in selection.frozen_prefix]
        self._max_bytes = max_bytes
        self._hidden_BTH: Tensor | None = None
        self._num_recorded = 0
        self._extras: list[tuple[None, ...] | None] = [None] * len(self._prefix)
        self._generating = False
        self._rows_B: Tensor | None = None
        self._verified = False
        self.enabled = bool(self._prefix) and max_bytes > 0
        """Whether passes are recorded at all; False for good once a replay did not match."""

    @property
    def recorded(self) -> bool:
        """Whether a whole batch is recorded."""
        return self._hidden_BTH is not None and self._num_recorded == len(self._hidden_BTH)

    def clear(self) -> None:
        """Forget the recording."""
        self._hidden_BTH, self._num_recorded = None, 0

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Passes inside run over a whole new batch, always in the same order of rows."""
        self.clear()
        self._generating = True
        try:
            yield
        finally:
            self._generating = False

    @contextmanager
    def rows(self, rows_B: Tensor | None) -> Iterator[None]:
        """Passes inside run over these rows of the recorded batch; None: over unknown ones."""
        self._rows_B = rows_B
        try:
            yield
        finally:
            self._rows_B = None

    def run(self, compute: Compute, num_rows: int) -> tuple[Any, ...]:
        """The result of `compute`, with the prefix recorded or replayed where that is possible.

        Args:
            compute: Runs the model over a batch, in one or more forward passes, and returns the
                log-probabilities first.
            num_rows: Rows of that batch.

        Returns:
            What `compute` returns.
        """
        if not self.enabled:
            return compute()
        if self._generating:
            with self._replaying(None) if self.recorded else self._recording(num_rows):
                return compute()
        if self._rows_B is None or not self.recorded:
            return compute()
        if not self._verified:
            return self._verify(compute, self._rows_B)
        with self._replaying(self._rows_B):
            return compute()

    def _verify(self, compute: Compute, rows_B: Tensor) -> tuple[Any, ...]:
        plain = compute()
        try:
            with torch.no_grad(), torch.random.fork_rng(), self._replaying(rows_B):
                replayed = compute()
            difference = (plain[0].detach() - replayed[0]).abs().max().item()
            tolerance = _TOLERANCE.get(self._dtype, _TOLERANCE_16_BIT)
            problem = None
            if not difference <= tolerance:
                problem = f"log-probabilities differ by {difference:.3g} (at most {tolerance:.0e})"
        except Exception as error:  # whatever a model does with a shortened stack, training goes on
            problem = f"the model cannot run on it: {type(error).__name__}: {error}"
        if problem is None:
            self._verified = True
        else:
            self.enabled = False
            self.clear()
            logger.warning(
                "The frozen prefix (%d layers) will not be replayed: %s. Training goes on, with "
                "the same results, and pays for the prefix in every pass.",
                len(self._prefix),
                problem,
            )
        return plain

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self._hidden_BTH is None else self._hidden_BTH.dtype

    def _recording(self, num_rows: int) -> Any:  # noqa: ANN401 - a context manager
        last = len(self._prefix) - 1
        self.clear()

        def recording(index: int, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                output = forward(*args, **kwargs)
                hidden, *extra = output if isinstance(output, tuple) else (output,)
                self._extras[index] = (None,) * len(extra) if isinstance(output, tuple) else None
                if index == last:
                    self._store(hidden.detach(), num_rows)
                return output

            return run

        return self._patched(recording)

    def _store(self, hidden_BTH: Tensor, num_rows: int) -> None:
        if self._num_recorded == 0:
            if num_rows * hidden_BTH[0].nbytes > self._max_bytes:
                return
            self._hidden_BTH = hidden_BTH.new_empty((num_rows, *hidden_BTH.shape[1:]))
        if self._hidden_BTH is not None:
            end = self._num_recorded + len(hidden_BTH)
            self._hidden_BTH[self._num_recorded : end] = hidden_BTH
            self._num_recorded = end

    def _replaying(self, rows_B: Tensor | None) -> Any:  # noqa: ANN401 - a context manager
        recorded_BTH = self._hidden_BTH
        last = len(self._prefix) - 1
        passed = 0

        def replaying(index: int, _: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                nonlocal passed
                hidden = args[0] if args else kwargs["hidden_states"]
                if index == last:
                    chosen = slice(passed, passed + len(hidden))
                    passed += len(hidden)
                    hidden = recorded_BTH[chosen if rows_B is None else rows_B[chosen]]  # pyright: ignore[reportOptionalSubscript]
                extra = self._extras[index]
                return hidden if extra is None else (hidden, *extra)

            return run

        return self._patched(replaying)

    @contextmanager
    def _patched(self, wrap: Callable[[int, Forward], Forward]) -> Iterator[None]:
        own = [vars(layer).get("forward") for layer in self._prefix]
        try:
            for index, layer in enumerate(self._prefix):
                layer.forward = wrap(index, layer.forward)
            yield
        finally:
            for layer, forward in zip(self._prefix, own, strict=True):
                if forward is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = forward
