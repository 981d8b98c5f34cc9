"""PPO's advantages and losses, the critic's loss, and the moving weight of the KL, against values by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.run.critic import explained_variance
from online_losses import (
    Scored,
    gae,
    next_beta,
    ppo_advantages,
    ppo_loss,
    reinforce_pp_advantages,
    value_loss,
    whitened,
)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_gae_by_hand():
    # Two responses of two tokens and of one. delta: 1 + 0.5 * 3 - 2 = 0.5, and 4 - 3 = 1; 5 - 6 = -1.
    found = gae(values(1, 4, 5), values(2, 3, 6), torch.tensor([2, 1]), gamma=0.5, gae_lambda=0.4)
    assert found.tolist() == pytest.approx([0.5 + 0.5 * 0.4 * 1, 1, -1], abs=1e-15)


def test_gae_of_lambda_1_is_the_return_minus_the_value():
    """The value after the last token is 0, and no response sees the next one."""
    rewards, of_critic, lengths = values(1, 2, 3, 10, 20), values(5, 6, 7, 8, 9), torch.tensor([3, 2])
    found = gae(rewards, of_critic, lengths, gamma=1.0, gae_lambda=1.0)
    assert (found + of_critic).tolist() == [6, 5, 3, 30, 20]
    found = gae(rewards, of_critic, lengths, gamma=1.0, gae_lambda=0.0)
    assert found.tolist() == [1 + 6 - 5, 2 + 7 - 6, 3 - 7, 10 + 9 - 8, 20 - 9]


def test_ppo_advantages_by_hand():
    scored = Scored(
        rewards=values(1, -1),
        group_sizes=torch.tensor([1, 1]),
        lengths=torch.tensor([2, 1]),
        k1=values(0.5, -0.25, 1),
        values=values(0.1, 0.2, 0.3),
    )
    # Rewards -0.2 k1, with R at the last token: -0.1, 1.05; -1.2. delta: -0.1 + 0.2 - 0.1 = 0, 0.85; -1.5.
    expected = [0.95 * 0.85, 0.85, -1.5]
    advantages, returns = ppo_advantages(scored, beta=0.2, gamma=1.0, gae_lambda=0.95)
    assert returns.tolist() == pytest.approx([expected[0] + 0.1, 0.85 + 0.2, -1.5 + 0.3], abs=1e-15)
    assert advantages.tolist() == pytest.approx(whitened(values(*expected)).tolist(), abs=1e-15)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-15)
    assert advantages.square().mean().item() == pytest.approx(1)
    assert scored.k1.tolist() == [0.5, -0.25, 1]


def test_masked_responses_stay_out_of_whitening():
    scored = Scored(
        rewards=values(1, -1, 50),
        group_sizes=torch.tensor([1, 1, 1]),
        lengths=torch.tensor([2, 1, 1]),
        k1=values(0.5, -0.25, 1, 7),
        values=values(0.1, 0.2, 0.3, 0.4),
    )
    learned = scored._replace(is_learned=torch.tensor([True, True, False]))
    keywords: dict[str, float] = {"beta": 0.2, "gamma": 1.0, "gae_lambda": 0.95}
    without = scored._replace(
        **{name: getattr(scored, name)[:-1] for name in ("rewards", "group_sizes", "lengths", "k1", "values")}
    )
    found, expected = (
        [ppo_advantages(each, **keywords)[0], reinforce_pp_advantages(each, beta=0.2)] for each in (learned, without)
    )
    for advantages, alone in zip(found, expected, strict=True):
        assert torch.equal(advantages[:3], alone)
    nothing = scored._replace(is_learned=torch.zeros(3, dtype=torch.bool))
    assert ppo_advantages(nothing, **keywords)[0].isfinite().all()


def test_the_loss_by_hand():
    ratios, advantages = values(1.5, 0.5, 1.5, 0.5), values(2, 2, -2, -2)
    arguments = (ratios.log(), values(0, 0, 0, 0), values(0, 0, 0, 0), advantages, torch.tensor([4]))
    expected = [-1.2 * 2, -0.5 * 2, 1.5 * 2, 0.8 * 2]
    assert ppo_loss(*arguments, clip_low=0.2, clip_high=0.2).tolist() == pytest.approx(expected)
    with_entropy = ppo_loss(*arguments, values(1, 2, 3, 4), clip_low=0.2, clip_high=0.2, entropy_bonus=0.1)
    assert with_entropy.tolist() == pytest.approx([each - 0.1 * (i + 1) for i, each in enumerate(expected)])


def test_the_loss_of_the_critic_by_hand():
    old, returns = values(1, 1, 1, 1), values(2, 2, 0, 1.1)
    found = values(1.1, 1.5, 1.5, 1.5)
    # Within the clip; clipped to 1.2, further from 2; 1.5 is further from 0 than 1.2; and from 1.1 likewise.
    expected = [0.9**2 / 2, 0.8**2 / 2, 1.5**2 / 2, 0.4**2 / 2]
    assert value_loss(found, old, returns, value_clip=0.2).tolist() == pytest.approx(expected)


def test_a_clipped_value_learns_nothing_more():
    found = values(1.5, 1.1).requires_grad_()
    value_loss(found, values(1, 1), values(2, 2), value_clip=0.2).sum().backward()
    assert found.grad is not None and found.grad.tolist() == pytest.approx([0, 1.1 - 2])


def test_the_weight_of_the_kl_moves_to_its_target():
    keywords: dict[str, Any] = {"target_kl": 4.0, "kl_horizon": 1000}
    assert next_beta(0.1, 4.0, 100, **keywords) == pytest.approx(0.1)
    assert next_beta(0.1, 4.4, 100, **keywords) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert next_beta(0.1, 40.0, 100, **keywords) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # clipped
    assert next_beta(0.1, -3.0, 100, **keywords) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert next_beta(0.1, 40.0, 100) == 0.1  # fixed
    assert next_beta(0.05, 0.0, 128, target_kl=4.0, kl_horizon=20) == pytest.approx(0.04)  # never negative


def test_explained_variance_by_hand():
    returns = values(1, 2, 3)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(values(5, 5, 5), returns) == 0
    assert explained_variance(values(3, 2, 1), returns) == pytest.approx(1 - 4)
    assert explained_variance(returns, values(2, 2, 2)) is None
