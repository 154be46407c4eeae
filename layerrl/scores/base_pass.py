"""Passes of a model of which one layer has moved, started where it differs from the base.

Legend: L layers that move.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from layerrl.blocks import replaced_forwards

logger = logging.getLogger(__name__)


class BasePass:
    """The outputs of all decoder layers in one forward pass without gradients.

    A pass in which one layer has other weights can start at this layer: the layers before it return
    again what they returned. It keeps as much as a backward with activation checkpointing does, one
    tensor of hidden states a layer.

    Args:
        layers: The decoder layers, 0 nearest the embedding.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._called: list[int] = []
        self._returned: list[Any] = []
        self._versions: list[int | None] = []

    @property
    def usable(self) -> bool:
        """Whether each layer was called once, in order, and the tensors returned are as they were.

        No proof that a pass can start here, as a layer may hand on more than it returns.
        """
        in_order, now = self._called == [*range(len(self._layers))], _versions(self._returned)
        return in_order and None not in now and self._versions == now

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside runs the pass at the base."""

        def noting(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                self._called.append(index)
                self._returned.append(output)
                self._versions += _versions([output])
                return output

            return run

        with replaced_forwards(self._layers, noting):
            yield

    @contextmanager
    def started_at(self, layer: int) -> Iterator[None]:
        """Inside, the layers before this one do not run."""

        def returning(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._returned[index]

        with replaced_forwards(self._layers[:layer], returning):
            yield


class ShortPasses:
    """Compute a number with the base model, and again with each of some layers changed alone.

    Where a pass from the moved layer on gives the same bits as a whole one, which is compared for
    each kind of call and each layer, until its move has shown in the number. Where it does not
    (layers that share weights, or hand on more than they return), all passes of the kind are whole.

    Args:
        model: The model, which computes nothing at random.
        layers: Its decoder layers, 0 nearest the embedding.
        whole: Make whole passes only, to compare with.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], *, whole: bool = False
    ) -> None:
        self._layers = layers
        self._shares = shares_of_passes(model, layers)
        # What was compiled for one way would be compiled again for each layer, or be other code.
        self._whole = whole or any(
            module._compiled_call_impl is not None or "_orig_mod" in module._modules
            for module in model.modules()
        )
        self._compared: set[tuple[Hashable, int]] = set()
        self._refused: set[Hashable] = set()
        self.passes = 0.0
        """Passes so far, where one that starts at a layer counts as its share of the weights that a
        whole pass computes with. (Of a mixture of experts this is a little too few: it counts all
        experts, which makes the share of the head too small.)"""

    def values(
        self,
        compute: Callable[[], Tensor],
        moves: Mapping[int, Callable[[], AbstractContextManager[None]]],
        kind: Hashable = None,
        weight: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Compute a number by a pass of the model, at the base and after each move.

        Args:
            compute: Computes it, shape (), by one pass of the model.
            moves: By the number of the layer, what moves its parameters inside.
            kind: What calls of the model have in common that are compared only once.
            weight: What a pass counts.

        Returns:
            The number at the base, shape (), and those after the moves, shape (L,), in their order.
        """

        def after(base: BasePass | None, layers: Iterable[int] = moves) -> list[Tensor]:
            values = []
            for layer in layers:
                with moves[layer](), nullcontext() if base is None else base.started_at(layer):
                    values.append(compute())
                self.passes += weight * (1.0 if base is None else self._shares[layer])
            return values

        self.passes += weight
        if self._whole or kind in self._refused:
            return compute(), torch.stack(after(None))
        base = BasePass(self._layers)
        with base.recorded():
            value = compute()
        short: list[Tensor] | None = None
        why = (
            "layers are not called once each, in order, or what one returned is written into, or "
            "no tensor"
        )
        if base.usable:
            try:
                short, why = after(base), "the model writes into what a layer returned"
            except Exception as error:  # whatever a model does where layers before did not run
                why = f"{type(error).__name__}: {error}"
        if short is not None and base.usable:
            by_layer, why = dict(zip(moves, short, strict=True)), "the result would be another"
            unsure = [layer for layer in moves if (kind, layer) not in self._compared]
            whole = dict(zip(unsure, after(None, unsure), strict=True))
            if all(torch.equal(by_layer[layer], whole[layer]) for layer in unsure):
                # A number of weights that are all zero is the same whatever a layer does.
                shown = (layer for layer in unsure if not torch.equal(whole[layer], value))
                self._compared |= {(kind, layer) for layer in shown}
                return value, torch.stack(short)
        del base  # what it keeps may be what the memory lacked
        self._refused.add(kind)
        logger.warning(
            "Passes after a layer's step run the layers before it, too: %s. Scores are the same; "
            "the probe takes up to twice as long.",
            why,
        )
        return value, torch.stack(after(None))


def shares_of_passes(model: nn.Module, layers: Sequence[nn.Module]) -> list[float]:
    """Of the weights that a whole pass computes with, the share in one that starts at each layer.

    Embeddings do not count: to look a row up takes no time. A head that is tied to one does.

    Returns:
        By layer, 1 or nearly for the first.
    """
    sizes = {
        parameter: parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    last_in = {p: index for index, layer in enumerate(layers) for p in layer.parameters()}
    whole = sum(sizes.values())
    return [
        sum(size for p, size in sizes.items() if last_in.get(p, len(layers)) >= index) / whole
        for index in range(len(layers))
    ]


def _versions(outputs: Sequence[Any]) -> list[int | None]:
    """How often each tensor that layers returned was written into; None of what shows no writes."""
    return [
        value._version if isinstance(value, Tensor) else None
        for output in outputs
        for value in (output if isinstance(output, tuple | list) else [output])
        if value is not None
    ]
