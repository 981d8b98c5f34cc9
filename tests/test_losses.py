"""Every loss against values by hand and against the papers' formulas in plain Python."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch

from losses import LOSSES, cdpo_loss, dpo_loss, ipo_loss, sft_loss


def logps(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Chosen log-ratio 2 - 1 = 1 and rejected -1 - 1 = -2 for the first pair; 0 and 0 for the second.
POLICY_CHOSEN, POLICY_REJECTED = logps(-8, -5), logps(-12, -7)
REFERENCE_CHOSEN, REFERENCE_REJECTED = logps(-9, -5), logps(-10, -7)
LOGPS = (POLICY_CHOSEN, POLICY_REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand() -> None:
    losses, chosen_rewards, rejected_rewards = dpo_loss(*LOGPS, beta=0.5)
    # margin 0.5 * (1 - -2) = 1.5; -log(sigmoid(1.5)) = log(1 + e^-1.5) = 0.2014132779827524
    assert losses.tolist() == pytest.approx([0.2014132779827524, math.log(2)], abs=1e-15)
    assert chosen_rewards.tolist() == [0.5, 0]
    assert rejected_rewards.tolist() == [-1, 0]


@pytest.mark.parametrize("loss", [dpo_loss, cdpo_loss])
def test_cdpo_by_hand(loss: Callable) -> None:
    losses, _, _ = loss(*LOGPS, beta=0.5, label_smoothing=0.1)
    # 0.9 * 0.2014132779827524 + 0.1 * (0.2014132779827524 + 1.5)
    assert losses.tolist() == pytest.approx([0.3514132779827524, math.log(2)], abs=1e-15)
    expected = [-0.9 * math.log(sigmoid(m)) - 0.1 * math.log(sigmoid(-m)) for m in (1.5, 0.0)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("loss, smoothing", [(dpo_loss, 0.0), (dpo_loss, 0.1), (cdpo_loss, 0.1)])
def test_reference_free_ignores_the_reference(loss: Callable, smoothing: float) -> None:
    losses, chosen_rewards, rejected_rewards = loss(*LOGPS, beta=0.5, label_smoothing=smoothing, reference_free=True)
    expected = [-(1 - smoothing) * math.log(sigmoid(m)) - smoothing * math.log(sigmoid(-m)) for m in (2, 1)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-15)
    assert chosen_rewards.tolist() == [-4, -2.5]
    assert rejected_rewards.tolist() == [-6, -3.5]


@pytest.mark.parametrize("loss", [dpo_loss, cdpo_loss])
def test_the_reference_counts_by_default(loss: Callable) -> None:
    _, chosen_rewards, _ = loss(*LOGPS, beta=0.5, label_smoothing=0.1)
    assert chosen_rewards.tolist() == [0.5, 0]


def test_ipo_by_hand() -> None:
    losses, chosen_rewards, rejected_rewards = ipo_loss(*LOGPS, beta=0.25)
    assert losses.tolist() == [(3 - 2) ** 2, (0 - 2) ** 2]
    assert chosen_rewards.tolist() == [0.25, 0]
    assert rejected_rewards.tolist() == [-0.5, 0]


def test_sft_by_hand() -> None:
    assert sft_loss(POLICY_CHOSEN).tolist() == [8, 5]


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.batch == "pairs"])
def test_gradient_raises_chosen_and_lowers_rejected(name: str) -> None:
    chosen, rejected = POLICY_CHOSEN.clone().requires_grad_(), POLICY_REJECTED.clone().requires_grad_()
    loss = LOSSES[name]
    references = [REFERENCE_CHOSEN, REFERENCE_REJECTED] if "reference" in loss.needs else []
    keywords = {
        keyword: 0.1
        for keyword, parameter in inspect.signature(loss.function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    }
    scalars = map(torch.tensor, loss.state.initial.values()) if loss.state else []
    losses, *rewards = loss.function(chosen, rejected, *references, *scalars, **keywords)[:3]
    losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all() and torch.equal(chosen.grad, -rejected.grad)
    assert not any(reward.requires_grad for reward in rewards)


def test_dpo_gradient_matches_the_paper() -> None:
    """Rafailov et al. 2023, section 4: the weight of a pair is beta * sigmoid(rejected reward - chosen reward)."""
    chosen = POLICY_CHOSEN.clone().requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, *LOGPS[1:], beta=0.5)
    losses.sum().backward()
    assert chosen.grad is not None
    expected = [-0.5 * sigmoid(r - c) for c, r in zip(chosen_rewards.tolist(), rejected_rewards.tolist(), strict=True)]
    assert chosen.grad.tolist() == pytest.approx(expected, abs=1e-15)


def test_large_margins_do_not_overflow() -> None:
    losses, _, _ = dpo_loss(logps(1e4), logps(-1e4), logps(0), logps(0), beta=1.0, label_smoothing=0.1)
    assert losses.item() == pytest.approx(0.1 * 2e4)
