"""What a run will take, before anything is loaded: bytes, and the cost of a step.

The cost model counts multiplications with weights. Say $f_k$ is the weights of layer k that a
token meets (of experts, those it is routed to), $h$ those of the head, $F$ the sum of $f_k$ over
all layers, $S$ that from the first trained layer up, and $t$ the trained weights. A forward costs
$F + h$, or $S + h$ where the frozen prefix is replayed; the recomputation of checkpointed layers
$S$; the backward $S + h + t$. Attention's own products, norms and the optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from layerrl.blocks import find_blocks, plain_name, unwrap

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes and relative cost of training a selection. Printed as a table beside full training."""

    weights: int
    """Bytes of the model's weights."""
    gradients: int
    """Bytes of the gradients: trained tensors only."""
    optimizer: int
    """Bytes of the optimizer's state: trained tensors only."""
    reference: int
    """Bytes of the trained tensors' initial values, which are the reference policy if `beta > 0`.
    In full training: of a second model, or 0 where `beta` is 0."""
    checkpoint: int
    """Bytes of a checkpoint: trained weights, the reference's values, optimizer state."""
    step: float
    """Cost of scoring and training on one batch of completions, full training = 1."""
    full: Plan | None = None
    """The same for `"full"` as TRL does it; None if this is it."""

    @property
    def total(self) -> int:
        """Bytes held during training, without activations."""
        return self.weights + self.gradients + self.optimizer + self.reference

    def __str__(self) -> str:
        rows = [(field.name, field.name) for field in fields(self) if field.name != "full"]
        rows.insert(-2, ("total", "held in all"))
        full = self.full or self
        lines = [f"{'':12}{'selection':>14}{'full':>14}"]
        for name, label in rows:
            ours, theirs = getattr(self, name), getattr(full, name)
            shown = (f"{v:.2f}" if name == "step" else f"{v / 1e9:.3f} GB" for v in (ours, theirs))
            lines.append(f"{label:12}" + "".join(f"{text:>14}" for text in shown))
        lines.append(
            "Without activations. Early layers cost more than late ones: the backward runs from "
            "the head down to the first trained layer."
        )
        return "\n".join(lines)


def make_plan(
    model: nn.Module,
    trained: Mapping[str, Tensor],
    first: int,
    *,
    dtype: torch.dtype | None,
    optimizer_bytes: int,
    beta: float,
    num_iterations: int,
) -> Plan:
    """The plan behind `LayerSelection.plan`, which documents the arguments.

    Args:
        model: The model, `meta` or real.
        trained: Name to tensor of what trains.
        first: Lowest trained layer.
        dtype: The weights' dtype; None: each tensor's own.
        optimizer_bytes: Bytes of optimizer state per trained element.
        beta: KL coefficient; above 0 there is a reference.
        num_iterations: Policy passes over a batch.

    Returns:
        The plan, with that of full training in `full`.
    """
    base, blocks = unwrap(model), find_blocks(model)
    parameters = {plain_name(name): p for name, p in base.named_parameters()}
    active = _active(base, parameters)
    per_layer = [
        sum(count for name, count in active.items() if name.startswith(f"{blocks.path}.{layer}."))
        for layer in range(len(blocks.modules))
    ]
    stack, above = sum(per_layer), sum(per_layer[first:])
    head = _head(base)
    size = {name: p.numel() * (dtype or p.dtype).itemsize for name, p in parameters.items()}

    def plan(names: Mapping[str, Tensor], step: float, *, second_model: bool) -> Plan:
        weights, elements = (
            sum(size[name] for name in names),
            sum(p.numel() for p in names.values()),
        )
        reference = weights if beta or not second_model else 0
        kept = weights if beta and not second_model else 0
        return Plan(
            weights=sum(size.values()),
            gradients=weights,
            optimizer=elements * optimizer_bytes,
            reference=reference,
            checkpoint=weights + kept + elements * optimizer_bytes,
            step=step,
        )

    scored = (beta > 0) + (num_iterations > 1)
    full_step = scored * (stack + head) + num_iterations * (4 * stack + 3 * head)
    everything = len(trained) == len(parameters)
    entered = above if scored else stack
    weights_met = sum(active.get(name, 0) for name in trained)
    step = (stack + head) * min(scored, 1) + (above + head) * max(scored - 1, 0)
    step += num_iterations * (entered + 2 * above + 2 * head + weights_met)
    full = plan(parameters, 1.0, second_model=True)
    if everything:
        return full
    ours = plan(trained, step / full_step, second_model=False)
    return replace(ours, full=full)


def _active(base: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Elements of each weight matrix that one token is multiplied with."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = getattr(text, "num_experts_per_tok", 0) / experts if experts else 1.0
    return {
        name: p.numel() * (share if ".experts." in name else 1.0)
        for name, p in parameters.items()
        if p.dim() > 1
    }


def _head(base: nn.Module) -> int:
    getter = getattr(base, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head.weight.numel() if head is not None else 0
