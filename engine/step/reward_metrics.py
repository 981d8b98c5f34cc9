"""Metrics of a whole evaluation of a reward model: calibration, and what length alone explains."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reward_losses import of_pairs

NUM_BINS = 10  # of the calibration error
TEMPERATURES = (0.01, 100.0)  # the range of the fit: without wrong pairs, none is the best


class ScoredRankings(NamedTuple):
    """Scores of all responses to some prompts, and pairs of them."""

    scores: Tensor  # [prompts, k]
    lengths: Tensor  # [prompts, k], in tokens; 0 where there is no response
    pairs: Tensor  # int64 [prompts, p, 2], the better and the worse response
    weights: Tensor  # [prompts, p], of the pairs; 0 where there is none

    def cpu(self) -> "ScoredRankings":
        return ScoredRankings(*(values.cpu() for values in self))


def evaluation_metrics(rankings: Sequence[ScoredRankings]) -> dict[str, Tensor]:
    """Metrics of all pairs and responses of an evaluation, scalars in fp64.

    Every prompt counts the same, as in the loss: its pairs share its weight. Responses count the same.

    - rewards/mean: of all responses.
    - calibration_error: expected calibration error of the preference sigmoid(difference of scores).
    - temperature: divided by it, the differences have the smallest log loss.
    - length/accuracy: of the rule that the longer response is better; ties count half.
    - length/correlation: Pearson's, of score and length; NaN where one of them is constant.
    """
    differences, longer, shares, scores, lengths = [], [], [], [], []
    for batch in rankings:
        is_pair, is_response = batch.weights > 0, batch.lengths > 0
        better, worse = of_pairs(batch.scores.double(), batch.pairs)
        length_of_better, length_of_worse = of_pairs(batch.lengths, batch.pairs)
        weights = batch.weights.double()
        differences.append((better - worse)[is_pair])
        longer.append((length_of_better - length_of_worse).sign()[is_pair])
        shares.append((weights / weights.sum(1, keepdim=True))[is_pair])
        scores.append(batch.scores[is_response])
        lengths.append(batch.lengths[is_response])
    margins, weights, rewards = torch.cat(differences), torch.cat(shares), torch.cat(scores).double()
    mean_longer = (torch.cat(longer) * weights).sum() / weights.sum()
    return {
        "rewards/mean": rewards.mean(),
        "calibration_error": calibration_error(margins, weights),
        "temperature": fit_temperature(margins, weights),
        "length/accuracy": (mean_longer + 1) / 2,
        "length/correlation": correlation(rewards, torch.cat(lengths).double()),
    }


def calibration_error(margins: Tensor, weights: Tensor) -> Tensor:
    """Expected calibration error of preferences, a scalar.

    The confidence is sigmoid(|margin|), from 0.5 to 1, in ten bins of equal width. The error is the mean of |confidence
    - share of right pairs| over the bins, weighted by their pairs.

    Args:
        margins: score of the better response minus the other's, [pairs].
        weights: [pairs].
    """
    confidence = margins.abs().sigmoid()
    is_right = (margins > 0).to(confidence.dtype) + (margins == 0) / 2
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=confidence.dtype).index_add(0, bins, weights * (confidence - is_right))
    return gaps.abs().sum() / weights.sum()


def fit_temperature(margins: Tensor, weights: Tensor) -> Tensor:
    """The temperature T with the smallest mean of -log sigmoid(margin / T), within TEMPERATURES.

    Args:
        margins, weights: [pairs], as for calibration_error.
    """
    low, high = (torch.tensor(1 / limit, dtype=margins.dtype) for limit in reversed(TEMPERATURES))
    for _ in range(60):  # the loss is convex in 1 / T: find where its slope is 0
        middle = (low + high) / 2
        slope = -(weights * margins * F.sigmoid(-margins * middle)).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / high


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two vectors."""
    first, second = first - first.mean(), second - second.mean()
    return (first * second).sum() / (first.norm() * second.norm())
