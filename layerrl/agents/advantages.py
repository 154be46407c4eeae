"""How much better a step of an episode was than others from the same state: GiGPO's arithmetic.

arXiv:2505.10978. Legend: B episodes, S steps of all episodes, T completion tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

_EPSILON = 1e-6


def discounted_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    r"""Discounted rewards from each step of an episode: $R_t = \sum_{j \ge t} \gamma^{j-t} r_j$."""
    returns, later = [], 0.0
    for reward in reversed(rewards):
        later = reward + gamma * later
        returns.append(later)
    return returns[::-1]


def anchor_groups(tasks: Iterable[Hashable], observations: Iterable[Hashable]) -> Tensor:
    """Group of each step, shape (S,), from 0 up: one for each task and observation seen in it."""
    numbers: dict[tuple[Hashable, Hashable], int] = {}
    anchors = zip(tasks, observations, strict=True)
    return torch.tensor([numbers.setdefault(anchor, len(numbers)) for anchor in anchors])


def step_advantages(return_S: Tensor, group_S: Tensor, *, scale: bool) -> Tensor:
    r"""How much better each step was than its group: $(R_t - \text{mean}) / F$.

    A group of one gives 0: there is nothing to compare with. So does a group of equal returns.

    Args:
        return_S: Discounted return of each step, shape (S,).
        group_S: Anchor group of each step, shape (S,), numbered from 0.
        scale: F is the group's unbiased standard deviation plus 1e-6; otherwise it is 1.

    Returns:
        One advantage per step, shape (S,), float64: of equal returns, rounding leaves less than
        what counts after the division.
    """
    return_S = return_S.double()
    count_G = group_S.bincount()

    def sum_in_groups(value_S: Tensor) -> Tensor:
        return torch.zeros(len(count_G), dtype=torch.double).index_add(0, group_S, value_S)

    centred_S = return_S - (sum_in_groups(return_S) / count_G)[group_S]
    if not scale:
        return centred_S
    variance_G = sum_in_groups(centred_S.square()) / (count_G - 1).clamp(min=1)
    return centred_S / (variance_G.sqrt() + _EPSILON)[group_S]


def on_response_tokens(
    values: Sequence[Tensor],
    num_tokens: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    length: int,
) -> Tensor:
    """Each step's value on every response token of that step, 0 elsewhere.

    Args:
        values: For each episode the values of its steps.
        num_tokens: For each episode the numbers of response tokens of its steps, in order.
        masks: For each episode 1 where the completion's token is of a response, otherwise 0; as
            many ones as the episode has response tokens.
        length: Tokens to pad to, T.

    Returns:
        The values, shape (B, T), float32.
    """
    value_BT = torch.zeros(len(values), length)
    for row_T, steps, counts, mask in zip(value_BT, values, num_tokens, masks, strict=True):
        responses = torch.tensor(mask, dtype=torch.bool).nonzero().squeeze(1)
        row_T[responses] = steps.float().repeat_interleave(torch.tensor(counts))
    return value_BT
