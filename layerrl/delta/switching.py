"""Several deltas of one base in one model in memory, of which one is in use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.checks import shown
from layerrl.delta.fitting import Marks
from layerrl.delta.in_memory import checked
from layerrl.delta.loaded import LOADED, Loaded, deltas_in, name_of, refuse_another, refuse_disabled
from layerrl.delta.placing import copies, like, memory_form, put_values, surroundings
from layerrl.delta.stacks import read_deltas
from layerrl.errors import DeltaError


class Deltas:
    """Several deltas of one base in one model, of which one is in use, switched in place.

    All checks of `load_delta` are made here, once. It keeps the values of every delta and what
    they replace, in the model's dtype where the model is: of n deltas of one layer, n + 1 times
    the bytes of that layer. They may be of the same layers or of different ones.

    Args:
        model: The base, wrapped or not, with no delta in it. Not changed yet.
        paths: Name of your choice to a delta's folder; or to several, in the order in which they
            were trained on top of each other.

    Raises:
        DeltaError: As `load_delta`, or if a delta is in the model already.

    Example:
        deltas = Deltas(model, {"layer 10": "out/layer-10", "layer 14": "out/layer-14"})
        deltas.use("layer 14")
        deltas.use(None)  # the base
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str | os.PathLike[str] | Iterable[str | os.PathLike[str]]],
    ) -> None:
        there = deltas_in(model)
        named = isinstance(paths, Mapping) and all(isinstance(name, str) for name in paths)
        if not named or not paths:
            raise DeltaError(
                f"paths is {shown(paths)}, expected a name for each delta: "
                '{"a": "out/a", "b": "out/b"}'
            )
        if there:
            raise DeltaError(
                f"the delta at {there[-1].path} is in this {name_of(model)}, expected the base "
                "alone: unload_delta(model) first"
            )
        self._model, self.current = model, None
        deltas = {name: read_deltas(each) for name, each in paths.items()}
        others = [delta for stack in deltas.values() for delta in stack]
        self._values: dict[str, dict[str, Tensor]] = {}
        touched: dict[str, nn.Parameter] = {}
        marks: Marks = {}
        for name, stack in deltas.items():
            trained, tensors = checked(model, stack, others=others, marks=marks)
            values = memory_form(model, trained, tensors)
            self._values[name] = {n: like(value, trained[n]) for n, value in values}
            touched |= trained
        self._base = copies(touched)
        # A dict: sharded values are sent in its order, which every process must have the same.
        self._changed: dict[str, Tensor] = {}
        around = surroundings(model, touched)
        self._loaded = Loaded(
            deltas=others, base=self._base, marks={}, around=around, switching=True
        )
        LOADED[unwrap(model)] = self._loaded

    current: str | None
    """Name of the delta in use; None: the base."""

    def use(self, name: str | None) -> None:
        """Put one of the deltas into the model in place of the one in use.

        Only tensors of the two are copied; parameters stay the same objects in the same memory.
        What was trained since in these tensors is lost.

        Args:
            name: Its name; None: the base, bit for bit.

        Raises:
            DeltaError: If there is none of this name, `unload_delta` took all of them out, or the
                model is inside `disabled`.
        """
        if name is not None and not (isinstance(name, str) and name in self._values):
            names = ", ".join(map(repr, self._values))
            raise DeltaError(f"no delta {shown(name)} here, expected {names}, or None for the base")
        if LOADED.get(unwrap(self._model)) is not self._loaded:
            raise DeltaError(
                f"unload_delta took these deltas out of the {name_of(self._model)}: make another "
                "Deltas to use them"
            )
        refuse_disabled(self._model)
        refuse_another(self._model, self._loaded, self._base)
        values = {} if name is None else self._values[name]
        back = self._base if name is None else {n: self._base[n] for n in self._changed}
        there = {} if self.current is None else self._values[self.current]
        self._changed = self._changed | values  # until all are written
        try:
            put_values(self._model, back | values)
        except BaseException:
            put_values(self._model, {n: there.get(n, self._base[n]) for n in back | values})
            raise
        self._changed, self.current = values, name

    def __repr__(self) -> str:
        return f"Deltas({', '.join(map(repr, self._values))}; in use: {self.current!r})"
