"""The loss of reward models by hand, and the metrics of its evaluations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.step.metrics import MetricAccumulator
from engine.step.reward_metrics import (
    ScoredRankings,
    calibration_error,
    correlation,
    evaluation_metrics,
    fit_temperature,
)
from losses import reward_loss


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def loss_of(scores: Tensor, ranks: list[list[int]], margins: list[float], **keywords: Any) -> list[float]:
    keywords = {"ranking": "pairs", "centering": 0.0, **keywords}
    margin = torch.tensor(margins, dtype=torch.float64)
    return reward_loss(scores, torch.tensor(ranks), margin, **keywords)[0].tolist()


SCORES = matrix([1.5, 0.2, -0.4])


def test_pairs_by_hand() -> None:
    # Differences 1.3, 1.9 and 0.6: log(1 + e^-x) is 0.2410084538329, 0.1393867582829 and 0.4374879504858.
    assert loss_of(SCORES, [[0, 1, 2]], [0.0]) == pytest.approx([0.2726277208672], abs=1e-12)
    assert loss_of(SCORES, [[0, 1, 2]], [0.0]) == pytest.approx(
        [(softplus(-1.3) + softplus(-1.9) + softplus(-0.6)) / 3]
    )


def test_plackett_luce_by_hand() -> None:
    # log(e^1.5 + e^0.2 + e^-0.4) - 1.5 + log(e^0.2 + e^-0.4) - 0.2
    first = math.log(math.exp(1.5) + math.exp(0.2) + math.exp(-0.4)) - 1.5
    second = math.log(math.exp(0.2) + math.exp(-0.4)) - 0.2
    assert loss_of(SCORES, [[0, 1, 2]], [0.0], ranking="plackett_luce") == pytest.approx([first + second], abs=1e-14)
    assert first + second == pytest.approx(0.789622892775, abs=1e-9)


def test_margins_and_centering_by_hand() -> None:
    with_margin = (softplus(0.5 - 1.3) + softplus(0.5 - 1.9) + softplus(0.5 - 0.6)) / 3
    assert loss_of(SCORES, [[0, 1, 2]], [0.5]) == pytest.approx([with_margin], abs=1e-14)
    center = 0.01 * (1.7**2 + 1.1**2 + 0.2**2) / 3  # sums 1.7, 1.1 and -0.2
    expected = (softplus(-1.3) + softplus(-1.9) + softplus(-0.6)) / 3 + center
    assert loss_of(SCORES, [[0, 1, 2]], [0.0], centering=0.01) == pytest.approx([expected], abs=1e-14)
    for ranking in ("pairs", "plackett_luce"):  # the same for two responses
        two = loss_of(SCORES[:, :2], [[0, 1]], [0.5], ranking=ranking)
        assert two == pytest.approx([softplus(0.5 - 1.3)], abs=1e-14)


@pytest.mark.parametrize("ranking, order", [("pairs", [0, 1, 2]), ("plackett_luce", [0, 1, 2])])
def test_missing_responses_change_nothing(ranking: str, order: list[int]) -> None:
    scores = matrix([1.5, 0.2, -0.4], [0.3, 0.9, 77.0])
    both = loss_of(scores, [order, [0, 1, -1]], [0.0, 0.0], ranking=ranking)
    assert both[0] == loss_of(SCORES, [order], [0.0], ranking=ranking)[0]
    assert both[1] == pytest.approx(softplus(0.6), abs=1e-14)


def test_ties_make_no_pair() -> None:
    scores = matrix([1.5, 0.2, -0.4, -1.0])
    expected = (softplus(-1.3) + softplus(-1.9) + 2 * 0 + softplus(-2.5) + softplus(-1.2) + softplus(-0.6)) / 5
    assert loss_of(scores, [[0, 1, 1, 3]], [0.0]) == pytest.approx([expected], abs=1e-14)
    # Plackett-Luce without both: 1.5 before -1.0.
    losses, metrics = reward_loss(
        scores, torch.tensor([[0, 1, 1, 3]]), torch.zeros(1), ranking="plackett_luce", centering=0.0
    )
    assert losses.tolist() == pytest.approx([softplus(-2.5)], abs=1e-14)
    assert metrics["tied"].tolist() == [2]
    only_ties = reward_loss(matrix([1.0, 2.0]), torch.tensor([[0, 0]]), torch.zeros(1), ranking="pairs", centering=1.0)
    assert only_ties[0].tolist() == [0]


@pytest.mark.parametrize("ranking", ["pairs", "plackett_luce"])
@pytest.mark.parametrize("ranks", [[0, 1, 2, -1], [0, 1, 1, 3], [0, 0, 2, -1]])
def test_gradients_match_differences(ranking: Any, ranks: list[int]) -> None:
    scores = matrix([1.5, 0.2, -0.4, 0.9]).requires_grad_()

    def loss(scores: Tensor) -> Tensor:
        margins = torch.tensor([0.3], dtype=torch.float64)
        return reward_loss(scores, torch.tensor([ranks]), margins, ranking=ranking, centering=0.05)[0].sum()

    assert torch.autograd.gradcheck(loss, (scores,))


def test_gradient_of_pairs_by_hand() -> None:
    scores = SCORES.clone().requires_grad_()
    reward_loss(scores, torch.tensor([[0, 1, 2]]), torch.zeros(1), ranking="pairs", centering=0.0)[0].sum().backward()
    first, second, third = (1 / (1 + math.exp(x)) for x in (1.3, 1.9, 0.6))
    expected = [-(first + second) / 3, (first - third) / 3, (second + third) / 3]
    assert scores.grad is not None and scores.grad[0].tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("ranking", ["pairs", "plackett_luce"])
def test_extreme_scores_are_finite(ranking: Any) -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    losses, _ = reward_loss(scores, torch.tensor([[0, 1, -1]] * 2), torch.zeros(2), ranking=ranking, centering=0.0)
    losses.sum().backward()
    assert losses.tolist() == [0, 2e4] and scores.grad is not None and scores.grad.isfinite().all()


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
    assert calibration_error(margins).item() == pytest.approx(expected, abs=1e-12)


def test_the_temperature_has_the_smallest_log_loss() -> None:
    # Two of three right with the same margin: sigmoid(1 / T) = 2/3 at the optimum.
    margins = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert fit_temperature(margins).item() == pytest.approx(1 / math.log(2), rel=1e-9)
    assert fit_temperature(margins * 7).item() == pytest.approx(7 / math.log(2), rel=1e-9)
    assert fit_temperature(margins.abs()).item() == pytest.approx(0.01)  # never wrong
    assert fit_temperature(-margins).item() == pytest.approx(100)  # mostly wrong


def test_correlation_equals_pearsons() -> None:
    first, second = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert correlation(first, second).item() == pytest.approx(torch.corrcoef(torch.stack([first, second]))[0, 1].item())


def test_metrics_of_an_evaluation_join_batches_of_any_width() -> None:
    first = ScoredRankings(matrix([2.0, 1.0, 0.0]), torch.tensor([[0, 1, 2]]), torch.tensor([[9, 5, 5]]))
    second = ScoredRankings(matrix([0.5, 1.5]), torch.tensor([[0, 1]]), torch.tensor([[3, 4]]))
    wide = torch.tensor([[0, 1, -1]])
    third = ScoredRankings(matrix([1.0, 0.0, 50.0]), wide, torch.tensor([[7, 2, 99]]))
    metrics = evaluation_metrics([first, second, third])
    assert metrics["length/accuracy"].item() == pytest.approx((1 + 1 + 0.5 + 0 + 1) / 5)
    rewards, lengths = [2, 1, 0, 0.5, 1.5, 1, 0], [9, 5, 5, 3, 4, 7, 2]
    expected = torch.corrcoef(torch.tensor([rewards, lengths], dtype=torch.float64))[0, 1].item()
    assert metrics["length/correlation"].item() == pytest.approx(expected)
    assert metrics["calibration_error"].item() == pytest.approx(calibration_error(matrix([1, 2, 1, -1, 1])[0]).item())
