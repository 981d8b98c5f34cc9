"""Every loss against values by hand and against the papers' formulas in plain Python."""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from losses import LOSSES, cdpo_loss, dpo_loss, ipo_loss, sft_loss
from tests.configs import composed


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


# ---- All losses of pairs ----

PAIR_LOSSES = [name for name, loss in LOSSES.items() if loss.batch == "pairs"]
FURTHER_COLUMNS = {"token kl": 2, "confidence": 2, "shared length": 4}  # need -> arguments, here of zeros
# Their papers' gradients have other signs at the points of this test. tests/test_pair_losses.py has these.
OTHER_SIGNS = {
    "apo_down",  # lowers chosen responses too
    "discopop",  # lowers margins near 0
}


def shipped_keywords(name: str) -> dict[str, Any]:
    """Keyword arguments with the values of config/loss, and 0.1 for required ones."""
    group = composed(f"loss={name}").loss
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    keys = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return {key: 0.1 if OmegaConf.is_missing(group, key) else group[key] for key in keys}


def with_gradients(name: str, arguments: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Losses [pairs], rewards, and gradients [2, pairs] by the policy's log-probs, at arguments [4, pairs]."""
    loss = LOSSES[name]
    policy = arguments[:2].clone().requires_grad_()
    references = [*arguments[2:]] if "reference" in loss.needs else []
    for need, number in FURTHER_COLUMNS.items():
        references += [torch.zeros_like(arguments[0])] * (number if need in loss.needs else 0)
    state = map(torch.tensor, loss.state.initial.values()) if loss.state else []
    losses, *rewards = loss.function(*policy, *references, *state, **shipped_keywords(name))[:3]
    losses.sum().backward()
    assert policy.grad is not None and losses.shape == arguments[0].shape
    return losses, rewards, policy.grad


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradient_raises_chosen_and_lowers_rejected(name: str) -> None:
    _, rewards, (chosen, rejected) = with_gradients(name, torch.stack(LOGPS))
    assert name in OTHER_SIGNS or ((chosen <= 0).all() and (rejected >= 0).all())
    assert not any(reward.requires_grad for reward in rewards)
    # Where the policy prefers the rejected responses, no loss is 0.
    wrong = torch.stack([POLICY_REJECTED, POLICY_CHOSEN, REFERENCE_CHOSEN, REFERENCE_REJECTED])
    _, _, (chosen, rejected) = with_gradients(name, wrong)
    assert name in OTHER_SIGNS or ((chosen < 0).all() and (rejected > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extreme_log_probs_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """All pairs of these, equal responses among them."""
    points = itertools.product((0.0, -1e-8, -1.0, -50.0, -1e4), repeat=4)
    losses, rewards, gradients = with_gradients(name, torch.tensor(list(points), dtype=dtype).T)
    assert losses.isfinite().all() and gradients.isfinite().all()
    assert all(reward.isfinite().all() for reward in rewards)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if "whole batch" not in LOSSES[name].needs])
def test_losses_are_of_each_pair(name: str) -> None:
    both, rewards, gradients = with_gradients(name, torch.stack(LOGPS))
    for pair in range(2):
        alone = with_gradients(name, torch.stack(LOGPS)[:, pair : pair + 1])
        assert torch.equal(alone[0], both[pair : pair + 1]) and torch.equal(alone[2], gradients[:, pair : pair + 1])
        assert all(torch.equal(one, many[pair : pair + 1]) for one, many in zip(alone[1], rewards, strict=True))


# ---- DPO ----


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
