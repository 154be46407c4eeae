"""What a run will take, before anything is loaded: bytes, and the cost of a step.

The cost model counts multiplications with weights. Say $f_k$ is the weights of layer k that a
token meets (of experts, those it is routed to), $h$ those of the head, $F$ the sum of $f_k$ over
all layers, $S$ that from the first trained layer up, and $t$ the trained weights. A forward costs
$F + h$, or $S + h$ where the frozen prefix is replayed; the recomputation of checkpointed layers
$S$; the backward $S + h + t$. Attention's own products, norms and the optimizer are left out.

Full training runs through everything: $F + h$, $F$ and $2F + 2h$. So does LoRA, whatever layers it
adapts, but for the weights' gradients: with checkpointing, TRL makes the embedding's output require
a gradient. Its adapters' $a$ weights come on top, $4a$ in a policy pass.

Tokens alone are counted. What a vision tower computes of images is left out on every side; where
its layers train, the backward runs through all of the text, $S = F$, whichever they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerrl.blocks import Blocks, find_blocks, head_of, plain_name, unwrap, with_fused_siblings
from layerrl.checks import check_count, check_number, shown
from layerrl.costs import RANK, Costs, linear_weights, met_by_a_token
from layerrl.errors import SelectionError
from layerrl.quantisation import quantised_bytes
from layerrl.tables import as_html, in_units

_HALF, _FLOAT32 = 2, 4  # bytes
_UNCOUNTED = (
    "The cost of a step is that of the text: the vision tower's, which depends on the images, is "
    "not counted."
)
_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference",
    "total": "held in all",
    "checkpoint": "checkpoint",
    "sync": "weight sync",
    "step": "step",
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """Bytes and relative cost of a run. Printed as a table, beside LoRA and full training.

    LoRA is PEFT's: rank 16 on every linear module of the layers, adapters in float32. Experts
    in 3-D tensors are no linear modules: adapters that PEFT can give them are not counted.
    """

    name: str
    """Heading of its column in the table: `"selection"`, `"LoRA+layerrl"`, `"LoRA r16"`,
    `"LoRA all"` or `"full"`."""
    weights: int
    """Bytes of the model's weights; LoRA's adapters included."""
    gradients: int
    """Bytes of the gradients: trained tensors only."""
    optimizer: int
    """Bytes of the optimizer's state: trained tensors only. The float32 master copies, which a
    selection in 16 bits steps on, are part of it; full training in TRL has none."""
    reference: int
    """Bytes of the trained tensors' initial values, which are the reference policy if `beta > 0`.
    In full training: of a second model, or 0 where `beta` is 0. 0 for LoRA, which is switched off
    instead."""
    checkpoint: int
    """Bytes of a checkpoint: trained weights, the reference's values, optimizer state."""
    sync: int
    """Bytes sent to the inference engine after a step, but for the first time: the trained tensors
    and those the engine fuses them with; of adapters, which are merged first, what they adapt. For
    LoRA without layerrl and full training: all weights."""
    step: float
    """Cost of scoring and training on one batch of completions, full training = 1."""
    step_by_layer: tuple[float, ...] = ()
    """`step` if each layer were trained alone, layer 0 first. Only of the plan that was asked
    for, not of those in `lora` and `full`."""
    stepping: int = 0
    """Bytes that are held only while the optimizer steps, when activations are gone: float32
    gradients of trained tensors in 16 bits, all at once."""
    lora_masked: Plan | None = None
    """The same for LoRA on the selected layers, by `peft_config` beside the selection."""
    lora: Plan | None = None
    """The same for LoRA on the selected layers, by TRL and PEFT alone."""
    lora_all: Plan | None = None
    """The same for LoRA on every layer, by TRL and PEFT."""
    full: Plan | None = None
    """The same for `"full"` as TRL does it; None if this is it, and in `lora`."""
    uncounted: str = ""
    """A sentence on costs that `step` does not count; empty if there are none."""

    @property
    def total(self) -> int:
        """Bytes held during training, without activations and without `stepping`."""
        return self.weights + self.gradients + self.optimizer + self.reference

    def _rows(self) -> list[list[str]]:
        others = (self.lora_masked, self.lora, self.lora_all, self.full)
        columns = [plan for plan in (self, *others) if plan is not None]
        rows = [["", *(plan.name for plan in columns)]]
        for field, label in _ROWS.items():
            values = [getattr(plan, field) for plan in columns]
            rows.append([label, *(f"{v:.2f}" if field == "step" else in_units(v) for v in values)])
        return rows

    def _remarks(self) -> list[str]:
        also = f" and the {in_units(self.stepping)} that only a step takes" * (self.stepping > 0)
        remark = f"Without activations{also}."
        if self.step_by_layer:
            remark += (
                f" Early layers cost more than late ones: layer 0 would cost "
                f"{self.step_by_layer[0]:.2f} of a full step, this selection {self.step:.2f}, the "
                f"last layer {self.step_by_layer[-1]:.2f}."
            )
        return [remark, *([self.uncounted] if self.uncounted else [])]

    def __str__(self) -> str:
        rows = (
            f"{label:12}" + "".join(f"{cell:>14}" for cell in cells)
            for label, *cells in self._rows()
        )
        return "\n".join([*rows, *self._remarks()])

    def __repr__(self) -> str:
        return (
            f"<plan of {self.name}: {in_units(self.total)} held, checkpoint "
            f"{in_units(self.checkpoint)}, step {self.step:.2f} of full: print it for its table>"
        )

    def _repr_html_(self) -> str:
        return as_html(self._rows(), self._remarks())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bytes:
    tensors: Mapping[str, Tensor]
    quantised: Mapping[str, int]
    """Bytes of those that are quantised in the base."""
    dtype: torch.dtype | None

    def weights(self, names: Collection[str]) -> int:
        return sum(self.tensors[name].numel() * self._itemsize(name) for name in names)

    def base(self) -> int:
        return self.weights({*self.tensors} - {*self.quantised}) + sum(self.quantised.values())

    def optimizer(self, names: Collection[str], *, masters: bool) -> int:
        total = 0
        for name in names:
            master = _FLOAT32 if masters and self._itemsize(name) == _HALF else 0
            state = 2 * (master or self._itemsize(name))
            total += self.tensors[name].numel() * (master + state)
        return total

    def stepping(self, names: Collection[str]) -> int:
        halves = [name for name in names if self._itemsize(name) == _HALF]
        return _FLOAT32 * sum(self.tensors[name].numel() for name in halves)

    def _itemsize(self, name: str) -> int:
        return (self.dtype or self.tensors[name].dtype).itemsize


def make_plan(
    model: nn.Module,
    trained: Mapping[str, Tensor],
    layers: Collection[int],
    *,
    blocks: Blocks,
    num_below: int,
    dtype: torch.dtype | None,
    beta: float,
    num_iterations: int,
    quantization_config: Any = None,
) -> Plan:
    """The plan behind `LayerSelection.plan`, which documents what it takes, gives and raises."""
    _check_settings(dtype, beta, num_iterations)
    base, text = unwrap(model), find_blocks(model)
    in_text = blocks.path == text.path
    parameters = {plain_name(name): p for name, p in base.named_parameters()}
    quantised = {} if quantization_config is None else quantised_bytes(base, quantization_config)
    _refuse_packed([name for name in trained if name in quantised])
    kept = _Bytes(tensors=parameters, quantised=quantised, dtype=dtype)
    met = met_by_a_token(base, parameters)
    costs = _costs(base, text, met, beta=beta, num_iterations=num_iterations)
    by_layer = [
        costs.selected(layer, weights) / costs.full() for layer, weights in enumerate(costs.layers)
    ]
    beside: dict[str, Any] = {
        "step_by_layer": tuple(by_layer) if in_text else (),
        "uncounted": "" if in_text else _UNCOUNTED,
        **_loras(kept, costs, blocks, layers, num_below=num_below, met=in_text),
    }
    full = _full(kept, second_model=beta > 0)
    if len(trained) == len(parameters):
        return replace(full, **beside)
    tower = () if in_text else f"{blocks.path}."
    multiplied = sum(met.get(name, 0) for name in trained if not name.startswith(tower))
    step = costs.selected(num_below, multiplied) / costs.full()
    selected = _selected(kept, trained, step=step, stores_reference=beta > 0)
    return replace(selected, full=full, **beside)


def _costs(
    base: nn.Module, text: Blocks, met: Mapping[str, float], *, beta: float, num_iterations: int
) -> Costs:
    head = getattr(head_of(base), "weight", None)
    paths = [f"{text.path}.{layer}." for layer in range(len(text.modules))]
    return Costs(
        layers=[sum(met[name] for name in met if name.startswith(path)) for path in paths],
        head=0 if head is None else head.numel(),
        num_scored=int(beta > 0) + int(num_iterations > 1),
        num_iterations=num_iterations,
    )


def _check_settings(dtype: object, beta: object, num_iterations: object) -> None:
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not is_float:
        raise SelectionError(
            f"dtype is {shown(dtype)}, expected a floating-point torch.dtype or None"
        )
    check_number("beta", beta, SelectionError, least=0)
    check_count("num_iterations", num_iterations, SelectionError)


def _refuse_packed(names: list[str]) -> None:
    if names:
        raise SelectionError(
            f"quantization_config quantises {len(names)} selected tensors, the first is "
            f"{names[0]}: they could not be trained. Give it llm_int8_skip_modules="
            "selection.quantization_skip_modules(model)."
        )


def _selected(
    kept: _Bytes, trained: Collection[str], *, step: float, stores_reference: bool
) -> Plan:
    weights, state = kept.weights(trained), kept.optimizer(trained, masters=True)
    return Plan(
        name="selection",
        weights=kept.base(),
        gradients=weights,
        optimizer=state,
        reference=weights,
        checkpoint=weights + (weights if stores_reference else 0) + state,
        sync=kept.weights(with_fused_siblings(kept.tensors, trained)),
        step=step,
        stepping=kept.stepping(trained),
    )


def _full(kept: _Bytes, *, second_model: bool) -> Plan:
    weights, state = kept.weights(kept.tensors), kept.optimizer(kept.tensors, masters=False)
    return Plan(
        name="full",
        weights=weights,
        gradients=weights,
        optimizer=state,
        reference=weights if second_model else 0,
        checkpoint=weights + state,
        sync=weights,
        step=1.0,
    )


def _loras(
    kept: _Bytes,
    costs: Costs,
    blocks: Blocks,
    layers: Collection[int],
    *,
    num_below: int,
    met: bool,
) -> dict[str, Plan]:
    """LoRA in the selected layers, with and without layerrl, and in every layer; met by tokens."""
    here, everything = (
        [f"{blocks.path}.{k}.{name}" for k in chosen for name in linear_weights(blocks, k)]
        for chosen in (layers, range(len(blocks.modules)))
    )
    few, many = (
        RANK * sum(sum(kept.tensors[name].shape) for name in names) for names in (here, everything)
    )
    all_weights, full = kept.weights(kept.tensors), costs.full()
    in_all, in_some = (many, few) if met else (0, 0)
    everywhere = _lora("LoRA all", kept, many, sync=all_weights, step=costs.lora(in_all) / full)
    if not layers:
        return {"lora_all": everywhere}
    sent = kept.weights(with_fused_siblings(kept.tensors, here))
    masked, by_peft = costs.selected(num_below, 4 * in_some) / full, costs.lora(in_some) / full
    return {
        "lora_masked": _lora("LoRA+layerrl", kept, few, sync=sent, step=masked),
        "lora": _lora(f"LoRA r{RANK}", kept, few, sync=all_weights, step=by_peft),
        "lora_all": everywhere,
    }


def _lora(name: str, kept: _Bytes, adapters: int, *, sync: int, step: float) -> Plan:
    of_adapters = adapters * _FLOAT32
    moments = 2 * of_adapters
    return Plan(
        name=name,
        weights=kept.base() + of_adapters,
        gradients=of_adapters,
        optimizer=moments,
        reference=0,
        checkpoint=of_adapters + moments,
        sync=sync,
        step=step,
    )
