"""Losses of reward models: pure functions of the scores of ranked responses, for LOSSES in losses.py."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor


def of_pairs(values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the better and of the worse response of each pair, [prompts, p] each.

    Args:
        values: [prompts, k], of the responses.
        pairs: int64 [prompts, p, 2], the better and the worse response as columns of values.
    """
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, pairs[..., 0]], values[rows, pairs[..., 1]]


def mean_over_pairs(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of values [prompts, p] over the pairs of each prompt; 0 without any."""
    totals = weights.sum(1)
    return (weights * values).sum(1) / totals.where(totals > 0, 1)


def reward_loss(
    scores: Tensor,
    pairs: Tensor,
    margins: Tensor,
    weights: Tensor,
    *,
    ranking: Literal["pairs", "plackett_luce"],
    centering: Annotated[float, Ge(0)],
) -> Tensor:
    """Loss of a reward model: better responses get higher scores.

    Pairs: Ouyang et al. 2022 (arXiv 2203.02155), equation 1, with the margins of Touvron et al. 2023 (Llama 2, arXiv
    2307.09288), equation 2. Centering: Eisenstein et al. 2023 (arXiv 2312.09244).

    Args:
        scores: [prompts, k], of the responses.
        pairs: int64 [prompts, p, 2], the better and the worse response as columns of scores. plackett_luce needs those
            of one order without ties.
        margins: [prompts, p], by which the scores of a pair should differ.
        weights: [prompts, p], of the pairs in the means; 0 for padding, the pair (0, 0) with the margin 0.
        ranking: "pairs": the mean of -log sigmoid(better - worse - margin) over the pairs of a prompt.
            "plackett_luce": the negative log-likelihood of the order. The data leave tied responses out.
        centering: of the mean of (better + worse) ** 2 over the same pairs.

    Returns:
        losses [prompts].
    """
    better, worse = of_pairs(scores, pairs)
    if ranking == "pairs":
        losses = mean_over_pairs(-F.logsigmoid(better - worse - margins), weights)
    else:
        losses = _plackett_luce(scores, pairs, margins, weights)
    if centering:
        losses = losses + centering * mean_over_pairs((better + worse) ** 2, weights)
    return losses


def _plackett_luce(scores: Tensor, pairs: Tensor, margins: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihoods of orders, [prompts].

    Each response is the best of itself and the worse ones. A margin adds to the score of the worse response.
    """
    num_prompts, k = scores.shape
    place = torch.arange(num_prompts, device=scores.device)[:, None], pairs[..., 0], pairs[..., 1]
    is_better = torch.zeros(num_prompts, k, k, dtype=torch.bool, device=scores.device)
    is_better = is_better.index_put(place, weights > 0)  # i is better than j
    margin = scores.new_zeros(num_prompts, k, k).index_put(place, margins.to(scores.dtype))
    remains = is_better | torch.eye(k, dtype=torch.bool, device=scores.device)
    log_totals = (scores[:, None, :] + margin).where(remains, -math.inf).logsumexp(2)  # [prompts, k]
    return (log_totals - scores).sum(1)
