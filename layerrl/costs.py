"""Multiplications with weights in a step, by the cost model that `plan` explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from layerrl.blocks import Blocks, embedding_of, head_of, plain_name
from layerrl.seams import imported

RANK = 16
"""Of the LoRA that a plan is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Multiplications per token to score and train on a batch; the symbols are `plan`'s."""

    layers: list[float]
    """Weights of each layer that a token meets."""
    head: int
    """Those of the head."""
    num_scored: int
    """Passes without gradient: the reference, the old log-probabilities."""
    num_iterations: int

    @property
    def forward(self) -> float:
        """Of one pass without gradient."""
        return sum(self.layers) + self.head

    def selected(self, first: int, trained: float) -> float:
        """Of a step on trained weights, of which the lowest are in layer `first`."""
        above = sum(self.layers[first:]) + self.head
        scored = [self.forward, *[above] * self.num_scored][: self.num_scored]
        entered = above if scored else self.forward
        return sum(scored) + self.num_iterations * (entered + 2 * above - self.head + trained)

    def lora(self, adapters: float) -> float:
        """Of a step on adapters with that many elements."""
        policy = 3 * self.forward - self.head + 4 * adapters
        return self.num_scored * self.forward + self.num_iterations * policy

    def full(self) -> float:
        """Of a step on all weights."""
        return self.num_scored * self.forward + self.num_iterations * (4 * self.forward - self.head)


def met_by_a_token(base: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Elements of each weight matrix that one token is multiplied with."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = getattr(text, "num_experts_per_tok", 0) / experts if experts else 1.0
    looked_up = getattr(embedding_of(base), "weight", None)  # no product, unless it is the head
    if looked_up is getattr(head_of(base), "weight", None):
        looked_up = None
    return {
        name: p.numel() * (share if ".experts." in name else 1.0)
        for name, p in parameters.items()
        if p.dim() > 1 and p is not looked_up
    }


def linear_weights(blocks: Blocks, layer: int) -> list[str]:
    """Names, in a layer, of the weights that PEFT's `"all-linear"` adapts."""
    with imported():
        from transformers.pytorch_utils import Conv1D

    return [
        plain_name(f"{name}.weight")
        for name, module in blocks.modules[layer].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
