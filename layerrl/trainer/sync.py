"""Weight sync: send vLLM the trained parameters, once it has all weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from layerrl.adapters import adapter_tensors, served_names, weights_as_they_were
from layerrl.blocks import plain_name, unwrap, with_fused_siblings
from layerrl.errors import FrameworkError
from layerrl.seams import check_class, check_made, installed_version
from layerrl.selection import LayerSelection

logger = logging.getLogger(__name__)


class PartialSync:
    """What an engine has of a model's weights, and so what it has to be sent.

    The trained tensors and what vLLM fuses them with are sent; everything is sent the first time,
    after `reset`, after a sync that failed, and where a frozen tensor has been written to in place
    since (a delta of other layers was loaded, say; writes through `.data` leave no trace) or is
    another one or of another dtype. Whatever but the first time makes it send everything is logged,
    once for each reason.
    """

    def __init__(self, model: nn.Module, selection: LayerSelection) -> None:
        trained, adapted = selection.parameters(model), adapter_tensors(model)
        names = served_names(model)
        sent = {*with_fused_siblings(names.values(), [adapted.get(n, n) for n in trained])}
        self._served = {name: served for name, served in names.items() if served in sent}
        self._names = frozenset(self._served)
        self._trained, self._adapts = frozenset(trained), bool(adapted)
        self._sent: list[Any] | None = None
        self._said: set[str] = set()

    def reset(self) -> None:
        """Send everything next time."""
        self._sent = None

    def _frozen(self, model: nn.Module) -> list[Any]:
        """What tells whether the frozen tensors are those of another time."""
        return [
            (id(p), p._version, p.dtype)  # torch counts in-place writes
            for name, p in (unwrap(model) if self._adapts else model).named_parameters()
            if plain_name(name) not in self._trained
        ]

    def _has_frozen(self, frozen: list[Any]) -> bool:
        """Whether the engine has all frozen tensors as they are now."""
        if self._sent is not None and self._sent != frozen:
            self._say("a frozen tensor was written to, or replaced, since the last time")
        return self._sent == frozen

    def _say(self, why: str, sent: str = "all weights and not only the trained ones") -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning("vLLM is sent %s: %s.", sent, why)


class WeightSync(PartialSync):
    """Takes over `sync_weights` and `generate` of TRL's `VLLMGeneration`, colocated or server.

    Everything is sent also where the engine sleeps and loses its weights, and every time where
    FSDP1 shards the model, as TRL walks its modules.
    """

    def __init__(self, generation: Any, model: nn.Module, selection: LayerSelection) -> None:
        check_class(type(generation))
        check_made(generation)
        super().__init__(model, selection)
        self._generation = generation
        self._metadata: dict[bool, Any] = {}
        self._stale = False
        # What was put on the instance is called, too.
        self._given = {
            n: v for n, v in vars(generation).items() if n in ("sync_weights", "generate")
        }
        generation.sync_weights = self.sync_weights
        generation.generate = self.generate

    def reset(self) -> None:
        """Send everything next time, and that before anything else is generated."""
        super().reset()
        self._stale = True

    def sync_weights(self) -> None:
        """Send what the engine does not have yet."""
        generation, model = self._generation, self._generation.model
        frozen = self._frozen(model)
        narrow = self._keeps_weights() and self._has_frozen(frozen)
        self._sent = None
        # TRL tells the server names and shapes before the first tensor, and keeps that list.
        generation._weight_metadata = self._metadata.get(narrow)
        part = MergedPart(model, self._served) if self._adapts else Part(model, self._names)
        with weights_as_they_were(model):
            if narrow and self._adapts:
                model.merge_adapter()  # as TRL does when it is given the whole model
            try:
                generation.model = part if narrow else model
                self._call("sync_weights")
            finally:
                generation.model = model
        if narrow and not part.walked:
            raise FrameworkError(
                f"trl {installed_version('trl')} did not ask the model for its parameters to send "
                "vLLM what was trained: the engine would go on generating with old weights. "
                "Install a version that layerrl was tested with, or report this message to layerrl."
            )
        self._metadata[narrow] = generation._weight_metadata
        self._sent, self._stale = frozen, False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, with weights that a checkpoint was loaded into since the last sync."""
        # TRL syncs once a step, and a trainer may be at the same step after it has loaded one.
        self.freshen()
        return self._call("generate", *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in self._given:
            return self._given[name](*args, **kwargs)
        return getattr(type(self._generation), name)(self._generation, *args, **kwargs)

    def freshen(self) -> None:
        """Sync if a checkpoint was loaded since the last time. Collective: call on every rank."""
        if self._stale:
            self.sync_weights()

    def _keeps_weights(self) -> bool:
        if self._generation._dist.fsdp_version == 1:
            self._say("FSDP1 shards the model, and TRL walks its modules")
            return False
        if self._generation.mode == "colocate" and self._generation.enable_sleep_mode:
            self._say("the engine slept and lost its weights (vllm_enable_sleep_mode)")
            return False
        return True


class Part(nn.Module):
    """A model of which TRL sees some parameters only, so that it gathers no others."""

    def __init__(self, model: nn.Module, names: frozenset[str]) -> None:
        super().__init__()
        self._model, self._names = (model,), names
        self.walked = False
        """Whether anybody has asked for them."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those parameters, under the names that the model has for them."""
        self.walked = True
        for name, parameter in self._model[0].named_parameters(*args, **kwargs):
            if plain_name(name) in self._names:
                yield name, parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The same: what TRL walked under FSDP2 once."""
        return dict(self.named_parameters())


class MergedPart(Part):
    """The same of a PEFT model, under the names that merged weights have in the engine."""

    def __init__(self, model: nn.Module, served: Mapping[str, str]) -> None:
        super().__init__(unwrap(model), frozenset(served))
        self._served = served

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those parameters, under the names that the engine has for them."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield self._served[plain_name(name)], parameter
