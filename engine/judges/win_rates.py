"""Win rates of one model over another, and how sure they are. Pure statistics of judged pairs.

An outcome is 1 for a win, 0 for a loss and 0.5 for a tie.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, expit, logit, ndtri  # scipy.stats takes half a second to import

CONFIDENCE = 0.95
NORMAL_QUANTILE = float(ndtri((1 + CONFIDENCE) / 2))
MIN_DECIDED = 10  # pairs for a regression
MAX_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Estimate:
    """A win rate, and its confidence interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """The result of judged pairs.

    Args:
        wins, ties, losses: numbers of pairs.
        rate: wins and half of the ties, over all pairs.
        p_value: of the sign test on decided pairs: chance alone gives so uneven a result with this probability.
        length_controlled: the rate at equal lengths; None if the pairs cannot tell it.
        length_difference: the mean, of characters.
    """

    wins: int
    ties: int
    losses: int
    rate: Estimate
    p_value: float
    length_controlled: Estimate | None
    length_difference: float

    @property
    def num_pairs(self) -> int:
        return self.wins + self.ties + self.losses


def win_rate(outcomes: Sequence[float], length_differences: Sequence[float]) -> WinRate:
    """Summarise judged pairs, at least one.

    Args:
        outcomes: of each pair.
        length_differences: the length of the first response minus that of the second.
    """
    wins, losses = (sum(outcome == value for outcome in outcomes) for value in (1, 0))
    ties = len(outcomes) - wins - losses
    return WinRate(
        wins=wins,
        ties=ties,
        losses=losses,
        rate=wilson_interval(wins, ties, losses),
        p_value=sign_test(wins, losses),
        length_controlled=length_controlled(np.asarray(outcomes, float), np.asarray(length_differences, float)),
        length_difference=float(np.mean(length_differences)),
    )


def wilson_interval(wins: int, ties: int, losses: int) -> Estimate:
    """The win rate with Wilson's score interval. Ties count as half a win.

    The interval holds every rate p with |rate - p| <= z sqrt((p (1 - p) - ties / (4 n)) / n): ties lower the variance
    of an outcome. Its share of ties is drawn towards none, as ties / (n + z^2), so that a few ties alone prove nothing.
    Without ties it is the interval of Wilson (1927), as scipy has it.
    """
    number, z = wins + ties + losses, NORMAL_QUANTILE
    rate, widening = (wins + ties / 2) / number, z * z / number
    tie_share = ties / (number + z * z)
    centre = (rate + widening / 2) / (1 + widening)
    product = (rate * rate + widening * tie_share / 4) / (1 + widening)  # of the two bounds
    half_width = math.sqrt(max(centre * centre - product, 0.0))
    return Estimate(rate, max(centre - half_width, 0.0), min(centre + half_width, 1.0))


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of the decided pairs, if both models win equally often. 1 without such pairs."""
    return min(2 * float(bdtr(min(wins, losses), wins + losses, 0.5)), 1.0)


def length_controlled(outcomes: np.ndarray, length_differences: np.ndarray) -> Estimate | None:
    """The win rate at equal lengths.

    A logistic regression: logit P(win) = a + b tanh(difference / standard deviation of the differences). The rate is
    that at a difference of 0. This is the form of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) without its term
    for the difficulty of a prompt. The interval is by the sandwich estimate of the variance of a: ties vary less than
    wins.

    Args:
        outcomes, length_differences: [pairs].

    Returns:
        None with few decided pairs, or if lengths separate wins from losses, as when one model wins every pair.
    """
    if (outcomes != 0.5).sum() < MIN_DECIDED:
        return None
    deviation = length_differences.std()
    columns = [np.ones(len(outcomes))]
    if deviation > 0:
        columns.append(np.tanh(length_differences / deviation))
    if is_separated(outcomes, columns[-1]):
        return None
    try:
        coefficients, covariance = fit_logistic(np.stack(columns, axis=1), outcomes)
    except np.linalg.LinAlgError:  # nearly separated
        return None
    centre, width = coefficients[0], NORMAL_QUANTILE * math.sqrt(covariance[0, 0])
    return Estimate(*(float(expit(each)) for each in (centre, centre - width, centre + width)))


def is_separated(outcomes: np.ndarray, values: np.ndarray) -> bool:
    """Whether a value [pairs] separates wins from losses, so that a logistic regression has no finite fit.

    A tie is half of each.
    """
    won, lost = values[outcomes > 0], values[outcomes < 1]
    if not len(won) or not len(lost):
        return True
    if np.ptp(values) == 0:
        return False
    return bool(won.max() <= lost.min() or lost.max() <= won.min())


def fit_logistic(features: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A logistic regression by Newton's method.

    Args:
        features: [pairs, coefficients].
        outcomes: from 0 to 1, [pairs].

    Returns:
        coefficients of the largest likelihood, and the sandwich estimate of their covariance.
    """
    mean = outcomes.mean()
    coefficients = np.zeros(features.shape[1])
    coefficients[0] = logit(mean)

    def log_likelihood(coefficients: np.ndarray) -> float:
        scores = features @ coefficients
        return float((outcomes * scores - np.logaddexp(0, scores)).sum())

    for _ in range(MAX_NEWTON_STEPS):
        rates = expit(features @ coefficients)
        gradient = features.T @ (outcomes - rates)
        information = (features.T * (rates * (1 - rates))) @ features
        change = np.linalg.solve(information, gradient)
        before = log_likelihood(coefficients)
        while log_likelihood(coefficients + change) < before - 1e-12 and np.abs(change).max() > 1e-12:
            change = change / 2
        coefficients = coefficients + change
        if np.abs(change).max() < 1e-10:
            break
    rates = expit(features @ coefficients)
    bread = np.linalg.inv((features.T * (rates * (1 - rates))) @ features)
    residuals = features * (outcomes - rates)[:, None]
    return coefficients, bread @ residuals.T @ residuals @ bread


def describe(result: WinRate) -> str:
    """A result in one line."""
    controlled = result.length_controlled
    at_equal_lengths = "unknown" if controlled is None else describe_estimate(controlled)
    return (
        f"{describe_estimate(result.rate)}, {result.wins:,} won, {result.ties:,} tied, {result.losses:,} lost"
        f" (sign test p={result.p_value:.2g}); at equal lengths {at_equal_lengths};"
        f" length {result.length_difference:+.0f} characters"
    )


def describe_estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
