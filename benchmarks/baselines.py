"""Scores of layers that others use, for comparison: none of them is a method of layerrl."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerrl import ContributionReport, LayerMaskedGRPOTrainer, select_layers
from layerrl.blocks import find_blocks, replaced_forwards
from layerrl.report import Cost, Score
from layerrl.scores.gradient import run_units, units_of_a_pass
from layerrl.scores.rollouts import Rollouts
from layerrl.scores.runs import only_training
from layerrl.trained import TrainedLayers

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 42
"""transformers' default: draws prompts and completions."""


def report(method: str, scores: Sequence[float], fraction: float = 0.0) -> ContributionReport:
    """Scores without intervals, and the share of a full run that they cost."""
    return ContributionReport(
        method=method,
        layers=tuple(Score(score=float(score)) for score in scores),
        cost=Cost(tokens=None, forwards=None, fraction=fraction),
    )


def gradient_norm(suite: Any, num_prompts: int, seed: int = SEED) -> ContributionReport:
    """Euclidean norm of each layer's mean policy gradient at the base."""
    model = suite.model()
    trainer = trainer_for(suite, model, "all", seed)
    rollouts, scored = Rollouts(trainer, num_prompts), 0
    for parts in rollouts:
        for part in parts:
            trainer.compute_loss(trainer.model, part).backward()
            scored += len(part["advantages"])
    passes = _generated(rollouts) + scored * units_of_a_pass(trainer.args)
    by_layer = TrainedLayers(model, select_layers(model, "all")).by_layer
    norms = [
        math.sqrt(math.fsum(p.grad.square().sum().item() for p in layer if p.grad is not None))
        for layer in by_layer.values()
    ]
    return report("gradient norm", norms, passes / run_units(suite.args(), trainer))


def spectrum(suite: Any) -> ContributionReport:
    """Signal-to-noise ratio of the weights' singular values (Spectrum, arXiv:2406.06623).

    Signal: what lies above the edge of the Marchenko-Pastur law, with the deviation of noise taken
    from the quartiles of the singular values; over the rest, and over the largest. Mean of a
    layer's matrices.
    """
    blocks = find_blocks(suite.model())
    scores = []
    for layer in range(len(blocks.modules)):
        ratios = [
            _signal_to_noise(parameter.detach().float())
            for _, parameter in blocks.named_parameters(layer)
            if parameter.ndim == 2
        ]
        scores.append(math.fsum(ratios) / len(ratios))
    return report("spectrum", scores)


def _signal_to_noise(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    low, high = values.quantile(torch.tensor([0.25, 0.75]))
    edge = (high - low) / 1.349 * (1 + math.sqrt(min(matrix.shape) / max(matrix.shape)))
    signal, noise = values[values > edge].sum(), values[values <= edge].sum()
    return (signal / noise.clamp(min=1e-12) / values.max()).item()


@torch.no_grad()
def bypass(suite: Any, num_prompts: int, seed: int = SEED) -> ContributionReport:
    """How much less likely the base's own rewarded answers are without the layer."""
    model = suite.model()
    trainer = trainer_for(suite, model, "all", seed)
    rollouts = Rollouts(trainer, num_prompts)
    batches = _joined([part for parts in rollouts for part in parts])
    blocks = find_blocks(model).modules

    def likelihood() -> float:
        total = 0.0
        for part in batches:
            ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
            mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
            length = part["completion_ids"].size(1)
            logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
            right = part["advantages"] > 0
            total += (logps * part["completion_mask"])[right].sum().item()
        return total

    whole, scores = likelihood(), []
    for block in blocks:
        with replaced_forwards([block], lambda _, __: lambda hidden, *a, **k: hidden):
            scores.append(whole - likelihood())
    scored = sum(len(part["advantages"]) for part in batches)
    passes = _generated(rollouts) + scored * (1 + len(blocks))
    return report("bypass", scores, passes / run_units(suite.args(), trainer))


def _joined(parts: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Micro-batches of equal lengths as one: small passes spend most of their time in Python."""
    names = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"
    by_length: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for part in parts:
        lengths = part["prompt_ids"].size(1), part["completion_ids"].size(1)
        by_length.setdefault(lengths, []).append(part)
    return [
        {name: torch.cat([part[name] for part in same]) for name in names}
        for same in by_length.values()
    ]


def _generated(rollouts: Rollouts) -> int:
    return len(rollouts.with_signal) * rollouts.trainer.num_generations


def weight_change(suite: Any, seed: int = SEED) -> ContributionReport:
    """Relative change of each layer in a full-parameter run."""
    model, base = suite.model(), suite.model()
    trainer = trainer_for(suite, model, "full", seed, full=True)
    trainer.train()
    selection = select_layers(model, "all")
    now, before = (TrainedLayers(m, selection).by_layer for m in (model, base))

    def norm(tensors: Any) -> float:
        return math.sqrt(math.fsum(tensor.square().sum().item() for tensor in tensors))

    with torch.no_grad():
        changes = [
            norm(a - b.to(a.device) for a, b in zip(now[k], before[k], strict=True))
            / norm(before[k])
            for k in now
        ]
    return report("weight change", changes, 1.0)


def trainer_for(
    suite: Any, model: Any, selection: str, seed: int = SEED, *, full: bool = False
) -> Any:
    """A suite's trainer, whose generation batch is one optimizer step."""
    args = only_training(suite.args(full=full))
    args.seed = seed
    args.gradient_accumulation_steps = args.steps_per_generation
    return LayerMaskedGRPOTrainer(
        model,
        suite.reward,
        args=args,
        train_dataset=suite.data[0],
        processing_class=suite.tokenizer,
        selection=selection,
    )
