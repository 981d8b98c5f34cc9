"""The loss of reward models by hand, and the metrics of its evaluations."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.settings.schema import LossSettings
from engine.step.metrics import MetricAccumulator
from engine.step.objectives import LossInputs, make_objective
from engine.step.reward_metrics import (
    ScoredRankings,
    calibration_error,
    correlation,
    evaluation_metrics,
    fit_temperature,
)
from losses import LOSSES, MovingState
from reward_losses import reward_loss


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def arguments(*prompts: list[tuple[int, int, float]], weights: list[list[float]] | None = None) -> list[Tensor]:
    """Pairs, margins and weights of the loss, padded; of each pair: better, worse, margin."""
    num_pairs = max(1, *map(len, prompts))
    padded = torch.tensor([[*pairs, *[(0, 0, 0.0)] * (num_pairs - len(pairs))] for pairs in prompts]).double()
    ones = weights or [[1.0] * len(pairs) for pairs in prompts]
    padded_weights = torch.tensor([[*row, *[0.0] * (num_pairs - len(row))] for row in ones]).double()
    return [padded[..., :2].long(), padded[..., 2], padded_weights]


def all_pairs(*ranks: int, margin: float = 0.0) -> list[tuple[int, int, float]]:
    order = list(enumerate(ranks))
    return [(i, j, margin) for i, of_i in order for j, of_j in order if of_i < of_j]


def loss_of(scores: Tensor, *prompts: list[tuple[int, int, float]], **keywords: Any) -> list[float]:
    weights = keywords.pop("weights", None)
    keywords = {"ranking": "pairs", "centering": 0.0, **keywords}
    return reward_loss(scores, *arguments(*prompts, weights=weights), **keywords).tolist()


SCORES = matrix([1.5, 0.2, -0.4])
RANKINGS = pytest.mark.parametrize("ranking", ["pairs", "plackett_luce"])


def test_pairs_by_hand() -> None:
    # Differences 1.3, 1.9 and 0.6: log(1 + e^-x) is 0.2410084538329, 0.1393867582829 and 0.4374879504858.
    assert loss_of(SCORES, all_pairs(0, 1, 2)) == pytest.approx([0.2726277208672], abs=1e-12)
    assert loss_of(SCORES, all_pairs(0, 1, 2)) == pytest.approx(
        [(softplus(-1.3) + softplus(-1.9) + softplus(-0.6)) / 3]
    )
    # The wrong order: b > c > a.
    expected = (softplus(-0.6) + softplus(1.3) + softplus(1.9)) / 3
    assert loss_of(SCORES, all_pairs(2, 0, 1)) == pytest.approx([expected], abs=1e-14)


def test_plackett_luce_by_hand() -> None:
    # log(e^1.5 + e^0.2 + e^-0.4) - 1.5 + log(e^0.2 + e^-0.4) - 0.2
    first = math.log(math.exp(1.5) + math.exp(0.2) + math.exp(-0.4)) - 1.5
    second = math.log(math.exp(0.2) + math.exp(-0.4)) - 0.2
    assert loss_of(SCORES, all_pairs(0, 1, 2), ranking="plackett_luce") == pytest.approx([first + second], abs=1e-14)
    assert first + second == pytest.approx(0.789622892775, abs=1e-9)
    # The order of the columns says nothing.
    turned = loss_of(SCORES[:, [2, 0, 1]], all_pairs(2, 0, 1), ranking="plackett_luce")
    assert turned == pytest.approx([first + second], abs=1e-14)


def test_any_pairs_by_hand() -> None:
    """Pairs that are no order: their mean, each with its margin."""
    chain = [(0, 1, 0.0), (1, 2, 0.5)]
    assert loss_of(SCORES, chain) == pytest.approx([(softplus(-1.3) + softplus(0.5 - 0.6)) / 2], abs=1e-14)
    opposite = [(0, 1, 0.0), (1, 0, 0.0)]
    assert loss_of(SCORES, opposite) == pytest.approx([(softplus(-1.3) + softplus(1.3)) / 2], abs=1e-14)
    repeated = [(0, 1, 0.0), (0, 1, 2.0), (0, 2, 0.0)]
    expected = (softplus(-1.3) + softplus(2 - 1.3) + softplus(-1.9)) / 3
    assert loss_of(SCORES, repeated) == pytest.approx([expected], abs=1e-14)
    weighted = (3 * softplus(-1.3) + softplus(2 - 1.3)) / 4
    assert loss_of(SCORES, repeated[:2], weights=[[3.0, 1.0]]) == pytest.approx([weighted], abs=1e-14)
    center = 0.1 * (1.7**2 + 0.2**2) / 2  # of the same pairs alone
    expected = (softplus(-1.3) + softplus(0.5 - 0.6)) / 2 + center
    assert loss_of(SCORES, chain, centering=0.1) == pytest.approx([expected], abs=1e-14)


def test_margins_and_centering_by_hand() -> None:
    with_margin = (softplus(0.5 - 1.3) + softplus(0.5 - 1.9) + softplus(0.5 - 0.6)) / 3
    assert loss_of(SCORES, all_pairs(0, 1, 2, margin=0.5)) == pytest.approx([with_margin], abs=1e-14)
    center = 0.01 * (1.7**2 + 1.1**2 + 0.2**2) / 3  # sums 1.7, 1.1 and -0.2
    expected = (softplus(-1.3) + softplus(-1.9) + softplus(-0.6)) / 3 + center
    assert loss_of(SCORES, all_pairs(0, 1, 2), centering=0.01) == pytest.approx([expected], abs=1e-14)
    for ranking in ("pairs", "plackett_luce"):  # the same for two responses
        two = loss_of(SCORES[:, :2], all_pairs(0, 1, margin=0.5), ranking=ranking)
        assert two == pytest.approx([softplus(0.5 - 1.3)], abs=1e-14)
    # Each worse response rises by its own margin.
    margins = [(0, 1, 0.5), (0, 2, 1.0), (1, 2, 0.25)]
    first = math.log(math.exp(1.5) + math.exp(0.2 + 0.5) + math.exp(-0.4 + 1.0)) - 1.5
    second = math.log(math.exp(0.2) + math.exp(-0.4 + 0.25)) - 0.2
    assert loss_of(SCORES, margins, ranking="plackett_luce") == pytest.approx([first + second], abs=1e-14)


@RANKINGS
def test_missing_responses_and_pairs_change_nothing(ranking: str) -> None:
    scores = matrix([1.5, 0.2, -0.4], [0.3, 0.9, 77.0])
    both = loss_of(scores, all_pairs(0, 1, 2), all_pairs(0, 1), ranking=ranking)
    assert both[0] == loss_of(SCORES, all_pairs(0, 1, 2), ranking=ranking)[0]
    assert both[1] == pytest.approx(softplus(0.6), abs=1e-14)
    assert loss_of(SCORES, [], ranking=ranking, centering=1.0) == [0]


def test_ties_make_no_pair() -> None:
    scores = matrix([1.5, 0.2, -0.4, -1.0])
    expected = (softplus(-1.3) + softplus(-1.9) + 2 * 0 + softplus(-2.5) + softplus(-1.2) + softplus(-0.6)) / 5
    assert loss_of(scores, all_pairs(0, 1, 1, 3)) == pytest.approx([expected], abs=1e-14)


def test_a_ranking_of_64_responses_by_hand() -> None:
    scores = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ranks = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    pairs, orders = [], []
    for row in scores.tolist():
        best_first = [score for _, score in sorted(zip(ranks, row, strict=True))]
        pairs.append(
            sum(softplus(b - a) for i, a in enumerate(best_first) for b in best_first[i + 1 :]) / (64 * 63 / 2)
        )
        totals = [math.log(sum(map(math.exp, best_first[i:]))) for i in range(64)]
        orders.append(sum(totals) - sum(best_first))
    assert loss_of(scores, *[all_pairs(*ranks)] * 2) == pytest.approx(pairs, rel=1e-12)
    assert loss_of(scores, *[all_pairs(*ranks)] * 2, ranking="plackett_luce") == pytest.approx(orders, rel=1e-12)


@RANKINGS
@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 1, 1, 3], [0, 0, 2]])
def test_gradients_match_differences(ranking: Any, ranks: list[int]) -> None:
    scores = matrix([1.5, 0.2, -0.4, 0.9]).requires_grad_()
    columns = arguments(all_pairs(*ranks, margin=0.3))

    def loss(scores: Tensor) -> Tensor:
        return reward_loss(scores, *columns, ranking=ranking, centering=0.05).sum()

    assert torch.autograd.gradcheck(loss, (scores,))


def test_gradients_of_any_pairs_match_differences() -> None:
    scores = matrix([1.5, 0.2, -0.4], [0.3, 0.9, 77.0]).requires_grad_()
    pairs = [(0, 1, 0.5), (1, 0, 0.0), (0, 1, 1.0), (1, 2, 0.0)]
    columns = arguments(pairs, [(1, 0, 0.0)], weights=[[1.0, 2.0, 0.5, 3.0], [2.0]])

    def loss(scores: Tensor) -> Tensor:
        return reward_loss(scores, *columns, ranking="pairs", centering=0.05).sum()

    assert torch.autograd.gradcheck(loss, (scores,))


def test_gradient_of_pairs_by_hand() -> None:
    scores = SCORES.clone().requires_grad_()
    reward_loss(scores, *arguments(all_pairs(0, 1, 2)), ranking="pairs", centering=0.0).sum().backward()
    first, second, third = (1 / (1 + math.exp(x)) for x in (1.3, 1.9, 0.6))
    expected = [-(first + second) / 3, (first - third) / 3, (second + third) / 3]
    assert scores.grad is not None and scores.grad[0].tolist() == pytest.approx(expected, abs=1e-15)


@RANKINGS
def test_extreme_scores_are_finite(ranking: Any) -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    losses = reward_loss(scores, *arguments(*[all_pairs(0, 1)] * 2), ranking=ranking, centering=0.0)
    losses.sum().backward()
    assert losses.tolist() == [0, 2e4] and scores.grad is not None and scores.grad.isfinite().all()


# ---- Its definition ----


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"head": "lm"}, 'a loss with batch="ranked" needs head="score", not "lm"'),
        ({"batch": "pairs"}, 'a loss with head="score" needs batch="ranked", not "pairs"'),
        ({"batch": "sft"}, 'needs batch="ranked", not "sft"'),
        ({"needs": {"whole batch"}}, "sees scores alone, not whole batch"),
        ({"needs": {"reference"}}, "sees scores alone, not reference"),
        ({"needs": {"kl"}}, "sees scores alone, not kl"),
        ({"state": MovingState({"x": 0.0}, lambda *arguments: {})}, "sees scores alone, not state"),
        ({"log_probs": "either"}, 'has no log-probs: log_probs="sums", takes_sft_weight=False'),
        ({"takes_sft_weight": True}, 'has no log-probs: log_probs="sums", takes_sft_weight=False'),
    ],
)
def test_a_loss_that_cannot_work_is_refused(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(LOSSES["reward"], **changed)


# ---- Metrics of an evaluation ----


def test_the_standard_deviation_is_over_all_ranks_and_batches() -> None:
    def double(totals: Tensor) -> None:
        totals *= 2

    metrics = MetricAccumulator()
    metrics.add(loss=torch.ones(2))
    metrics.add_spread(torch.tensor([[True, True], [True, False]]), std=torch.tensor([[1.0, 2.0], [4.0, 99.0]]))
    metrics.add_spread(torch.tensor([[True]]), std=torch.tensor([[5.0]]))
    means = metrics.reduce(double).means  # of two ranks with the same values
    assert means["std"].item() == pytest.approx(math.sqrt(2.5), abs=1e-12)


def test_calibration_error_by_hand() -> None:
    # Three pairs of confidence 0.72 (margins 0.944...), two of them right, and one right pair of 0.98.
    near, far = math.log(0.72 / 0.28), math.log(0.98 / 0.02)
    margins = torch.tensor([near, near, -near, far], dtype=torch.float64)
    expected = (3 * abs(0.72 - 2 / 3) + (1 - 0.98)) / 4
    assert calibration_error(margins, torch.ones(4)).item() == pytest.approx(expected, abs=1e-12)
    weights = torch.tensor([1, 1, 2, 4], dtype=torch.float64)
    expected = (4 * abs(0.72 - 1 / 2) + 4 * (1 - 0.98)) / 8
    assert calibration_error(margins, weights).item() == pytest.approx(expected, abs=1e-12)


def test_the_temperature_has_the_smallest_log_loss() -> None:
    # Two of three right with the same margin: sigmoid(1 / T) = 2/3 at the optimum.
    margins = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    ones = torch.ones(3)
    assert fit_temperature(margins, ones).item() == pytest.approx(1 / math.log(2), rel=1e-9)
    assert fit_temperature(margins * 7, ones).item() == pytest.approx(7 / math.log(2), rel=1e-9)
    assert fit_temperature(margins.abs(), ones).item() == pytest.approx(0.01)  # never wrong
    assert fit_temperature(-margins, ones).item() == pytest.approx(100)  # mostly wrong
    weights = torch.tensor([1.0, 2.0, 1.0])  # three of four
    assert fit_temperature(margins, weights).item() == pytest.approx(1 / math.log(3), rel=1e-9)


def test_correlation_equals_pearsons() -> None:
    first, second = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert correlation(first, second).item() == pytest.approx(torch.corrcoef(torch.stack([first, second]))[0, 1].item())


def test_metrics_of_an_evaluation_join_batches_of_any_width() -> None:
    def scored(scores: Tensor, lengths: list[int], pairs: list[tuple[int, int, float]]) -> ScoredRankings:
        pairs_of, _, weights = arguments(pairs, [])
        return ScoredRankings(scores, torch.tensor([lengths]), pairs_of[:1], weights[:1])

    first = scored(matrix([2.0, 1.0, 0.0]), [9, 5, 5], all_pairs(0, 1, 2))
    second = scored(matrix([0.5, 1.5]), [3, 4], all_pairs(0, 1))
    third = scored(matrix([1.0, 0.0, 50.0]), [7, 2, 0], all_pairs(0, 1))
    metrics = evaluation_metrics([first, second, third])
    assert metrics["length/accuracy"].item() == pytest.approx(((1 + 1 + 0.5) / 3 + 0 + 1) / 3)
    rewards, lengths = [2, 1, 0, 0.5, 1.5, 1, 0], [9, 5, 5, 3, 4, 7, 2]
    expected = torch.corrcoef(torch.tensor([rewards, lengths], dtype=torch.float64))[0, 1].item()
    assert metrics["length/correlation"].item() == pytest.approx(expected)
    margins, weights = matrix([1, 2, 1, -1, 1])[0], matrix([1, 1, 1, 3, 3])[0]
    assert metrics["calibration_error"].item() == pytest.approx(calibration_error(margins, weights).item())
    assert metrics["temperature"].item() == pytest.approx(fit_temperature(margins, weights).item())
    assert metrics["rewards/mean"].item() == pytest.approx(6 / 7)


def test_metrics_of_a_batch_count_each_prompt_once() -> None:
    """Accuracy, margins and rewards of pairs have the weights of the loss."""
    objective = make_objective(LossSettings(name="reward", keywords={"ranking": "pairs", "centering": 0.0}))
    scores = matrix([1.5, 0.2, 0.9], [0.3, 0.9, 0.0])
    lengths = torch.tensor([[3, 4, 5], [6, 7, 0]])
    columns = arguments([(0, 1, 0.0), (1, 2, 0.0), (0, 2, 0.0)], [(0, 1, 0.0)])
    metrics = MetricAccumulator(keeps_rankings=True)
    inputs = LossInputs([scores, *columns], torch.zeros(2), torch.tensor([1.0, 2.0]), lengths)
    losses = objective.losses(inputs, [], metrics)
    expected = [(softplus(-1.3) + softplus(0.7) + softplus(-0.6)) / 3, 2 * softplus(0.6)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-14)
    means = {name: value.item() for name, value in metrics.reduce(lambda totals: None).means.items()}
    assert means["rewards/accuracies"] == pytest.approx((2 / 3 + 0) / 2)
    assert means["rewards/margins"] == pytest.approx(((1.3 - 0.7 + 0.6) / 3 - 0.6) / 2)
    assert means["rewards/chosen"] == pytest.approx(((1.5 + 0.2 + 1.5) / 3 + 0.3) / 2)
    assert means["rewards/rejected"] == pytest.approx(((0.2 + 0.9 + 0.9) / 3 + 0.9) / 2)
    assert means["rewards/std"] == pytest.approx(torch.tensor([1.5, 0.2, 0.9, 0.3, 0.9]).std(correction=0).item())
    of_evaluation = evaluation_metrics(metrics.rankings or [])
    assert of_evaluation["length/accuracy"].item() == pytest.approx((0 + 0) / 2)
    assert of_evaluation["rewards/mean"].item() == pytest.approx((1.5 + 0.2 + 0.9 + 0.3 + 0.9) / 5)
