"""The frozen layers during one call: they run, are recorded on the way, or are replayed.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerrl.randomness import random_state, same_random_state
from layerrl.replay.arguments import (
    Arguments,
    OpaqueArgumentError,
    RowKeys,
    hidden_states,
    leaves,
    version,
)
from layerrl.replay.entering import Entry, Request, autocast_dtype, entry_of, matmul_precisions
from layerrl.replay.recordings import Extras, Place, Recording, Recordings, gathered, whole_call
from layerrl.replay.state import depends_on_other_rows, state_of, unfit

if TYPE_CHECKING:
    from layerrl.replay import PrefixReplay

Forward = Callable[..., Any]


class RestartError(BaseException):
    """The call has to be computed another way from its start, whatever a model catches."""


class Prefix:
    """The frozen layers during one call.

    It `records` the call where it runs; or is `trusted` to replay without having compared, in order
    to compare; or `watched`, as it runs, for random numbers that it draws.
    """

    def __init__(
        self,
        replay: PrefixReplay,
        recordings: Recordings,
        request: Request,
        *,
        records: bool = False,
        trusted: bool = False,
        watched: bool = False,
    ) -> None:
        self._replay, self._recordings = replay, recordings
        self._request = request
        self._records, self._trusted, self._watched = records, trusted, watched
        self.kind: tuple[Any, ...] = ()
        """Of the call, where it could be replayed."""
        self.replays = False
        """Whether a recording was handed on."""
        self.compares = False
        """Whether one could be, but has to be compared first, here or in another process."""
        self.random = False
        """Whether layers that ran drew random numbers, where that is watched."""
        self.dtype = torch.float32
        """What the layers compute in, where that is watched."""
        self.reached = False
        """Whether the first layer was called, and not traced."""
        self._begin()

    def _begin(self) -> None:
        self._entry: Entry | None = None
        self._places: list[Place] = []
        self._runs = False  # and is recorded or watched
        self._num_done, self._strays = 0, False
        self._left: Tensor | None = None
        self._left_version = self._entered = 0
        self._arguments: list[Arguments] = []
        self._extras: list[Extras] = []

    def layer(self, index: int, forward: Forward) -> Forward:
        """Make what stands in for the forward of a layer."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # what calls the layers: tensors have no values
                return forward(*args, **kwargs)
            if index == 0:
                self.finish()
                self._begin()
                self._decide(args, kwargs)
            if self._places:
                return self._handed_on(index, args, kwargs)
            if not self._runs:
                return forward(*args, **kwargs)
            self._before(index, args, kwargs)
            output = forward(*args, **kwargs)
            if self._runs:
                self._after(output, args, kwargs)
            return output

        return run

    def finish(self) -> None:
        """Make sure that a replay has reached every layer."""
        if not self._places:
            return
        if self._num_done < len(self._replay.prefix):
            self._strays = not self._replay.agree(False)  # the others ask after the last layer
        if self._strays:
            raise RestartError

    def _decide(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        replay, self.reached = self._replay, True
        if self._watched:
            self.dtype = _computed_in(hidden_states(args, kwargs))
            self._run_observed()
            return
        why = unfit(replay.prefix)
        try:
            self._keys = RowKeys(len(hidden_states(args, kwargs)))
            self._entry = entry_of(args, kwargs, self._keys, replay.prefix)
        except OpaqueArgumentError as error:
            why = f"layers are called with {error}"
        fit = self._entry is not None and why is None
        places = self._recordings.places(self._entry) if self._entry and fit else []
        if places and self._entry:
            whole, modes = whole_call(places), sorted({recording.modes for recording, _ in places})
            self.kind = (self._entry.kind, self._request.kind, whole, *modes)
            tensors = [hidden_states(args, kwargs), *(value for _, value in leaves(args, kwargs))]
            why = self._why_not(tensors, whole=whole)
        if self._trusted:
            self._places = places if replay.agree(bool(places) and why is None) else []
            return
        if replay.agree(bool(places) and why is None):
            if not replay.agree(self.kind in replay.verified):
                self.compares = True
                raise RestartError
            self._places, self.replays = places, True
            return
        if why is None and self._request.asked:
            why = self._more_is_asked()
        if why is None and not self._records:
            why = (
                "a call is over rows that no call before was over, or over the same with other "
                "positions, masks, or neighbours"
            )
        if why is not None:
            replay.say(why)
        if self._records and fit and not places:
            self._run_observed()

    def _why_not(self, entering: list[Any], *, whole: bool) -> str | None:
        """What stands against replaying these rows in this call."""
        prefix = self._replay.prefix
        if self._request.asked:
            return self._more_is_asked()
        if self.kind in self._replay.refused:
            return self._replay.refused[self.kind]
        if self._request.written:
            return "the model writes into what it is called with"
        differentiable = [*entering, *(p for layer in prefix for p in layer.parameters())]
        if torch.is_grad_enabled() and any(
            isinstance(tensor, Tensor) and tensor.requires_grad for tensor in differentiable
        ):
            return "a gradient of the layers or of what enters them is asked for"
        if not whole and depends_on_other_rows(prefix):
            return "a row's result depends on its neighbours (8-bit weights), which are others now"
        hidden_BTH = entering[0]
        if not whole and (
            hidden_BTH.dim() != 3 or self._request.num_rows not in (None, len(hidden_BTH))
        ):
            return f"layers are called with hidden states of shape {tuple(hidden_BTH.shape)}"
        return None

    def _more_is_asked(self) -> str:
        return (
            f"a call asks for more than its output ({', '.join(self._request.asked)}), which "
            "frozen layers contribute to"
        )

    def _run_observed(self) -> None:
        self._runs = True
        self._random_before = random_state(*self._request.devices)

    def _give_up(self, why: str) -> None:
        self._runs = False
        self._replay.say(why)

    def _before(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._watched:
            return
        try:
            hidden_BTH = hidden_states(args, kwargs)
            self._arguments.append(self._keys.of(leaves(args, kwargs)))
        except OpaqueArgumentError as error:
            self._give_up(f"layers are called with {error}")
            return
        if not self._is_next(index, hidden_BTH):
            self._give_up("the model computes something between its layers")
        self._entered = version(hidden_BTH)

    def _is_next(self, index: int, hidden_BTH: Tensor) -> bool:
        """Whether a layer follows the one before, and takes what left that."""
        left = self._left
        if index != self._num_done or left is None or hidden_BTH.device != left.device:
            return index == self._num_done
        # Hooks of ZeRO-3 hand on another tensor over the same memory: `output.detach()`.
        same = hidden_BTH is left or _same_memory(hidden_BTH, left)
        return same and version(hidden_BTH) == self._left_version

    def _after(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what left a layer that ran, and after the last one keep the recording."""
        self._num_done += 1
        last = self._num_done == len(self._replay.prefix)
        if last:
            now = random_state(*self._request.devices)
            self.random |= not same_random_state(self._random_before, now)
        if self._watched:
            return
        assert self._entry is not None
        left, *more = output if isinstance(output, tuple) else (output,)
        self._extras.append((None,) * len(more) if isinstance(output, tuple) else None)
        if not isinstance(left, Tensor) or any(extra is not None for extra in more):
            self._give_up("a layer returns more than hidden states")
            return
        self._left, self._left_version = left, version(left)
        written = version(hidden_states(args, kwargs)) != self._entered
        if written or self._keys.of(leaves(args, kwargs)) != self._arguments[-1]:
            self._give_up("a layer writes into its arguments")
        elif last and self.random:
            self._give_up("the layers draw random numbers")
        elif last and state_of(self._replay.prefix) != self._entry.state:
            self._give_up(
                "a layer changes its own tensors or settings when it runs, or has some that "
                "cannot be compared"
            )
        elif last:
            self._keep(left)

    def _keep(self, left_BTH: Tensor) -> None:
        assert self._entry is not None
        num_bytes = left_BTH.numel() * left_BTH.element_size()
        if not self._recordings.fits(num_bytes):
            each = num_bytes // max(1, left_BTH[..., 0].numel())
            self._replay.say(
                "what leaves it in all passes over a batch takes more than prefix_cache_bytes="
                f"{self._replay.max_bytes} has room for ({each} bytes a token, padding included, "
                f"in {left_BTH.dtype})"
            )
            return
        recording = Recording(
            # A copy: what comes after may work in place.
            hidden_BTH=left_BTH.detach().clone(),
            arguments=tuple(self._arguments),
            extras=tuple(self._extras),
            modes=self._entry.modes,
            storages=self._entry.storages,
        )
        self._recordings.add(self._entry, recording)

    def _handed_on(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a layer returns that does not run: after the last one, what left it then."""
        self._strays |= not self._same_arguments(index, args, kwargs)
        self._num_done += 1
        num_left = len(self._replay.prefix) - self._num_done
        # Not in between, where other processes go on, and gather the next layer if it is sharded.
        if num_left == 0:
            self._strays = not self._replay.agree(not self._strays)
        if num_left <= 0 and self._strays:
            raise RestartError
        if num_left == 0:
            hidden_BTH = gathered(self._places)
        elif self._strays and self._left is not None:
            hidden_BTH = self._left  # what enters may be anything
        else:
            hidden_BTH = hidden_states(args, kwargs)
        self._left, self._left_version = hidden_BTH, version(hidden_BTH)
        extras = self._places[0][0].extras[index]
        return hidden_BTH if extras is None else (hidden_BTH, *extras)

    def _same_arguments(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        try:
            is_next = self._is_next(index, hidden_states(args, kwargs))
            now = self._keys.of(leaves(args, kwargs))
        except OpaqueArgumentError:
            return False
        return is_next and all(
            recording.arguments[index].structure == now.structure
            and recording.arguments[index].keys[row] == key
            for (recording, row), key in zip(self._places, now.keys, strict=True)
        )


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors have the same elements in the same order."""
    return all(type(t) is Tensor for t in (tensor, other)) and (
        (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        == (other.data_ptr(), other.dtype, other.shape, other.stride())
    )


def _computed_in(hidden_BTH: Tensor) -> torch.dtype:
    """The dtype that says how far results are rounded."""
    device = hidden_BTH.device
    reduced = device.type != "cpu" and not {*matmul_precisions()} <= {"none", "ieee"}
    return autocast_dtype(device) or (torch.bfloat16 if reduced else hidden_BTH.dtype)
