"""Losses of sampled responses and their advantages, against values by hand."""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from engine.run.reward_functions import Score
from engine.run.rollout_metrics import learned_metrics, sampling_metrics
from engine.run.sampler import Response
from engine.settings.schema import LossSettings
from engine.step.metrics import MetricAccumulator
from engine.step.objectives import RolloutInputs, make_objective
from engine.step.sampled_pairs import pair_loss_of
from losses import LOSSES, MovingState
from online_losses import (
    PairLoss,
    Scored,
    best_and_worst,
    best_of_n_advantages,
    best_of_n_loss,
    clipped_loss,
    dr_grpo_advantages,
    grpo_advantages,
    grpo_loss,
    k3,
    online_dpo_loss,
    reinforce_pp_advantages,
    reinforce_pp_loss,
    remax_advantages,
    rloo_advantages,
    rloo_loss,
    token_weights,
    whitened,
    xpo_loss,
)
from tests.configs import composed, make_settings
from utils import UserError


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# Two prompts, with three responses and two; lengths 1, 2, 1 and 1, 3.
SCORED = Scored(
    rewards=values(1, 4, 1, 0, 2),
    group_sizes=torch.tensor([3, 2]),
    lengths=torch.tensor([1, 2, 1, 1, 3]),
    k1=values(0.1, 0.2, -0.1, 0, 0.5, 0.3, 0.2, 0.1),
    greedy_rewards=values(1, 3),
)


def of_tokens(*numbers: float) -> list[float]:
    """Numbers of the responses, for each token."""
    return values(*numbers).repeat_interleave(SCORED.lengths).tolist()


def test_grpo_advantages_by_hand():
    # Means 2 and 1; deviations (-1, 2, -1) and (-1, 1); standard deviations sqrt(6 / 2) and sqrt(2 / 1).
    first, second = math.sqrt(3) + 1e-6, math.sqrt(2) + 1e-6
    expected = of_tokens(-1 / first, 2 / first, -1 / first, -1 / second, 1 / second)
    assert grpo_advantages(SCORED).tolist() == pytest.approx(expected, abs=1e-15)


def test_dr_grpo_advantages_by_hand():
    assert dr_grpo_advantages(SCORED).tolist() == of_tokens(-1, 2, -1, -1, 1)


def test_rloo_advantages_by_hand():
    expected = of_tokens(1 - 2.5, 4 - 1, 1 - 2.5, -2, 2)
    assert rloo_advantages(SCORED, beta=0).tolist() == pytest.approx(expected, abs=1e-15)
    # KL of the responses: 0.1, 0.1, 0, 0.5, 0.6. With beta 1 rewards are 0.9, 3.9, 1, -0.5, 1.4.
    expected = of_tokens(0.9 - 2.45, 3.9 - 0.95, 1 - 2.4, -1.9, 1.9)
    assert rloo_advantages(SCORED, beta=1).tolist() == pytest.approx(expected, abs=1e-15)


def test_rloo_is_dr_grpo_scaled():
    """RLOO's advantages are G / (G - 1) times Dr. GRPO's."""
    torch.manual_seed(0)
    sizes = torch.tensor([4, 4, 4])
    scored = Scored(torch.randn(12, dtype=torch.float64), sizes, torch.ones(12, dtype=torch.int64), values(*[0] * 12))
    torch.testing.assert_close(rloo_advantages(scored, beta=0), 4 / 3 * dr_grpo_advantages(scored), rtol=0, atol=1e-14)


def test_a_group_of_one_has_no_others():
    alone = Scored(values(3), torch.tensor([1]), torch.tensor([2]), values(0, 0))
    for advantages in (rloo_advantages(alone, beta=0), grpo_advantages(alone), dr_grpo_advantages(alone)):
        assert advantages.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_equal_rewards_have_no_advantage(name):
    scored = SCORED._replace(rewards=values(0.3, 0.3, 0.3, -1, -1))
    advantages = LOSSES[name].advantages
    assert advantages is not None
    found = advantages(scored, **({"beta": 0} if name == "rloo" else {}))
    assert found.tolist() == [0] * 8


def test_reinforce_pp_advantages_by_hand():
    # With beta 1: R minus the k1 of this token and the later ones of its response.
    plain = [1 - 0.1, 4 - 0.1, 4 + 0.1, 1 - 0, 0 - 0.5, 2 - 0.6, 2 - 0.3, 2 - 0.1]
    mean = sum(plain) / 8
    std = math.sqrt(sum((value - mean) ** 2 for value in plain) / 8)
    expected = [(value - mean) / std for value in plain]
    assert reinforce_pp_advantages(SCORED, beta=1).tolist() == pytest.approx(expected, abs=1e-14)
    group = whitened(values(-1, 2, 2, -1, -1, 1, 1, 1))
    assert reinforce_pp_advantages(SCORED, beta=1, baseline="group").tolist() == group.tolist()


def test_whitened():
    assert whitened(values(1, 3)).tolist() == [-1, 1]
    assert whitened(values(2, 2)).tolist() == [0, 0]


def test_remax_advantages_by_hand():
    assert remax_advantages(SCORED, beta=0).tolist() == of_tokens(0, 3, 0, -3, -1)
    expected = of_tokens(-0.1, 2.9, 0, -3.5, -1.6)
    assert remax_advantages(SCORED, beta=1).tolist() == pytest.approx(expected, abs=1e-15)


def test_best_of_n_advantages():
    assert best_of_n_advantages(SCORED).tolist() == of_tokens(0, 1, 0, 0, 1)
    ties = SCORED._replace(rewards=values(1, 1, 0, 2, 2))
    assert best_of_n_advantages(ties).tolist() == of_tokens(1, 0, 0, 1, 0)


def test_best_and_worst():
    assert best_and_worst(SCORED).tolist() == of_tokens(-1, 1, 0, -1, 1)
    ties = SCORED._replace(rewards=values(1, 1, 1, 2, 3))
    assert best_and_worst(ties).tolist() == of_tokens(0, 0, 0, -1, 1)


def chosen_pair_loss(name: str, **options: Any) -> PairLoss:
    keywords = {"beta": 0.5, "pair_loss": name, "pair_options": options or None}
    return pair_loss_of(LossSettings(name="online_dpo", keywords=keywords))


# Of the first prompt the second response is better, of the second the first. Log-ratios: 0, 2, 1, -3.
PAIRS = {
    "logps": values(-2, -3, -4, -1, -2, -5),
    "reference_logps": values(-2, -4, -5, -2, -2, -2),
    "lengths": torch.tensor([1, 2, 1, 2]),
    "advantages": values(-1, 1, 1, 1, -1, -1),
}


def test_online_dpo_is_dpo_of_the_better_and_the_worse():
    found = online_dpo_loss(**PAIRS, old_logps=PAIRS["logps"], beta=0.5, pair_loss=chosen_pair_loss("dpo"))
    expected = [math.log1p(math.exp(-0.5 * margin)) for margin in (2, 4)]
    weights = token_weights("sums", PAIRS["lengths"], 8)
    assert (found * weights).sum().item() == pytest.approx(sum(expected) / 2, abs=1e-15)
    assert (found * weights)[:3].sum().item() == pytest.approx(expected[0] / 2, abs=1e-15)
    found = online_dpo_loss(**PAIRS, old_logps=PAIRS["logps"], beta=0.5, pair_loss=chosen_pair_loss("ipo"))
    assert (found * weights).sum().item() == pytest.approx(((2 - 1) ** 2 + (4 - 1) ** 2) / 2, abs=1e-15)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Margins 2 and 4, with beta 0.5.
        ("cdpo", {"label_smoothing": 0.1}, [0.9 * softplus(-x) + 0.1 * softplus(x) for x in (1, 2)]),
        ("dpo", {"reference_free": True}, [softplus(-0.5 * x) for x in (-7 + 2, -1 + 7)]),
        # Log-ratios by token: 1 and 0, 1 and -1.5.
        ("dpo", {"average_log_prob": True}, [softplus(-0.5 * x) for x in (1, 2.5)]),
        ("ln_dpo", {}, [softplus(-0.5 * x) for x in (1, 2.5)]),
        # Log-probs of the better responses by token: -3.5 and -1.
        ("hinge", {"sft_weight": 2.0}, [0 + 2 * 3.5, 0 + 2 * 1]),
        ("simpo", {"gamma": 0.5}, [softplus(0.5 - 0.5 * x) for x in (-3.5 + 2, -1 + 3.5)]),
        ("slic", {"delta": 1.0, "nll_weight": 0.5}, [1 + 7 - 2 + 3.5, 0 + 0.5]),
    ],
)
def test_sampled_pairs_have_any_loss_of_pairs(name, options, expected):
    pair_loss = chosen_pair_loss(name, **options)
    found = online_dpo_loss(**PAIRS, old_logps=PAIRS["logps"], beta=0.5, pair_loss=pair_loss)
    first, second = found[:3].sum().item() / 2, found[3:].sum().item() / 2
    assert [first, second] == pytest.approx(expected, abs=1e-14)


def test_xpo_by_hand():
    # The second response to each prompt is of the reference: log-probs -7 and -7.
    found = xpo_loss(**PAIRS, old_logps=PAIRS["logps"], beta=0.5, alpha=0.1, pair_loss=chosen_pair_loss("dpo"))
    expected = [softplus(-0.5 * margin) + 0.1 * -7 for margin in (2, 4)]
    weights = token_weights("sums", PAIRS["lengths"], 8)
    assert (found * weights).sum().item() == pytest.approx(sum(expected) / 2, abs=1e-15)
    assert (found * weights)[:3].sum().item() == pytest.approx(expected[0] / 2, abs=1e-15)


def test_metrics_of_an_iteration_leave_responses_of_the_reference_out():
    def response(reward, is_of_reference):
        return Response(np.array([1, 2]), "ab", True, reward, Score(reward, {}), is_of_reference)

    groups = [[response(1.0, False), response(5.0, True)], [response(2.0, False), response(7.0, True)]]
    assert sampling_metrics(groups)["objective/scores"] == 1.5
    logps = [([np.array([-1.0, -2.0]), np.array([-9.0, -9.0])], None), ([np.array([-4.0]), np.array([-9.0])], None)]
    lengths = torch.tensor([2, 2, 1, 1])
    k1 = torch.tensor([0.5, 0.25, 9, 9, 0.75, 9], dtype=torch.float64)
    scored = Scored(torch.tensor([1.0, 5, 2, 7]), torch.tensor([2, 2]), lengths, k1)
    found = learned_metrics(make_settings("loss=xpo"), 0.1, groups, scored, logps, 1.5)
    assert found["objective/entropy"] == (3 + 4) / 2
    assert found["objective/kl"] == 0.75
    assert found["objective/rlhf_reward"] == pytest.approx(1.5 - 0.1 * 0.75)


def test_losses_that_need_more_are_no_pair_losses():
    of_pairs = {name for name, loss in LOSSES.items() if loss.batch == "pairs"}
    others = {name for name in of_pairs if not LOSSES[name].is_of_pairs}
    assert others == {"aot", "tdpo1", "tdpo2", "wpo", "ld_dpo", "beta_dpo"}


def test_the_clipped_loss_by_hand():
    logratios = values(math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5), 0)
    found = clipped_loss(logratios, values(2, -2, 2, -2, 3), 0.2, 0.28)
    # -min(ratio A, clip A): 1.5 is clipped to 1.28 for A > 0, 0.5 to 0.8 for A < 0.
    assert found.tolist() == pytest.approx([-1.28 * 2, 1.5 * 2, -0.5 * 2, 0.8 * 2, -3], abs=1e-15)


def test_k3_by_hand():
    assert k3(values(-1, -2), values(-1, -3)).tolist() == pytest.approx([0, math.exp(-1) - 1 + 1], abs=1e-15)
    assert k3(values(-1.1), values(-1.1)).tolist() == [0]


CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}


def test_grpo_loss_by_hand():
    logps, old, reference = values(-1, -2), values(-1, -2 + math.log(2)), values(-1, -3)
    found = grpo_loss(logps, old, reference, values(2, 1), torch.tensor([2]), beta=0.5, **CLIPS)
    assert found.tolist() == pytest.approx([-2, -0.5 + 0.5 * math.exp(-1)], abs=1e-15)


def test_rloo_loss_by_hand():
    # Two responses, of 2 tokens and 1. Ratios 1.1 * 1.1 = 1.21, clipped to 1.2 at A > 0, and 0.9.
    logps = values(math.log(1.1), math.log(1.1), math.log(0.9))
    found = rloo_loss(logps, values(0, 0, 0), values(0, 0, 0), values(3, 3, -2), torch.tensor([2, 1]), **CLIPS)
    assert found.tolist() == pytest.approx([-1.2 * 3 / 2, -1.2 * 3 / 2, 0.9 * 2], abs=1e-15)


def test_reinforce_pp_has_the_kl_in_one_place():
    arguments = (values(-1), values(-1), values(-2), values(2), torch.tensor([1]))
    assert reinforce_pp_loss(*arguments, beta=0.5, **CLIPS).tolist() == [-2]
    group = reinforce_pp_loss(*arguments, beta=0.5, **CLIPS, baseline="group")
    assert group.tolist() == pytest.approx([-2 + 0.5 * math.exp(-1)], abs=1e-15)


def test_best_of_n_is_sft_on_the_best():
    zeros = values(0, 0)
    assert best_of_n_loss(values(-1, -2), zeros, zeros, values(1, 0), torch.tensor([1, 1])).tolist() == [1, 0]


def test_grpo_is_reinforce_with_a_group_baseline_at_ratio_1():
    logps = values(-1, -2, -0.5).requires_grad_()
    advantages = values(0.5, 0.5, -1)
    old = logps.detach()
    loss = grpo_loss(logps, old, old, advantages, torch.tensor([2, 1]), beta=0, **CLIPS).sum()
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient.tolist() == (-advantages).tolist()


def test_token_weights_by_hand():
    lengths = torch.tensor([1, 3])
    assert token_weights("responses", lengths, 8).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert token_weights("tokens", lengths, 8).tolist() == [1 / 4] * 4
    assert token_weights("max_new_tokens", lengths, 8).tolist() == [1 / 16] * 4
    assert token_weights("sums", lengths, 8).tolist() == [1 / 2] * 4


@pytest.mark.parametrize(
    ("loss", "largest", "clipped"),
    [("grpo", 1.1, 0.0), ("reinforce_pp", 1.1, 0.0), ("rloo", 1.1**4, 0.5), ("remax", 1.1**4, 0.5)],
)
def test_metrics_of_the_clip_are_of_what_the_loss_clips(loss: str, largest: float, clipped: float) -> None:
    """Each token's ratio is 1.1. So a response of four tokens has 1.46, and one of a token 1.1; the clip is at 1.2."""
    objective, metrics = make_objective(make_settings(f"loss={loss}").loss), MetricAccumulator()
    old_logps = values(-1, -1, -1, -1, -2)
    logps = (old_logps + math.log(1.1)).requires_grad_()
    advantages = torch.ones(5, dtype=torch.float64)
    lengths = torch.tensor([4, 1])
    inputs = RolloutInputs(
        [logps, old_logps, old_logps, advantages], logps, advantages / 5, lengths=lengths, num_tokens=lengths
    )
    losses = objective.losses(inputs, [], metrics)
    losses.sum().backward()
    found = {name: value.item() for name, value in metrics.reduce(lambda totals: None).means.items()}
    assert found["policy/ratio_max"] == pytest.approx(largest)
    assert found["policy/clipfrac"] == clipped
    assert found["policy/approxkl"] == pytest.approx(math.log(1.1) ** 2 / 2)
    assert found["loss/policy"] == found["loss"] == pytest.approx(losses.mean().item())
    assert logps.grad is not None
    assert logps.grad.count_nonzero() == (1 if clipped else 5)  # a clipped response gives no gradient


def test_the_means_of_the_losses():
    means = {name: LOSSES[name].mean for name in ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp")}
    expected = {"grpo": "responses", "dr_grpo": "max_new_tokens", "dapo": "tokens", "rloo": "sums"}
    assert means == expected | {"reinforce_pp": "tokens"}
    clips = OmegaConf.select(composed("loss=dapo"), "loss")
    assert (clips.clip_low, clips.clip_high) == (0.2, 0.28)


ONLINE_DPO = ("loss=online_dpo", "datasets=[films]")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["loss.pair_loss=aot"], "loss.pair_loss: must be dpo, cdpo, ipo, "),
        (["loss.pair_options={gamma:1}"], "give loss.pair_loss=dpo gamma, and it takes average_log_prob, sft_weight,"),
        (["loss.pair_options={beta:1}"], "give loss.pair_loss=dpo beta, and it takes"),
        (["loss.pair_options={label_smoothing:0.7}"], "label_smoothing of loss.pair_loss=dpo must be a number of at"),
        (["loss.pair_loss=f_dpo"], "lack divergence, alpha, as loss.pair_loss=f_dpo needs a value"),
    ],
)
def test_wrong_pair_options(overrides: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        make_settings(*ONLINE_DPO, *overrides)


def test_a_pair_loss_without_a_reference_builds_none() -> None:
    assert "reference" in make_settings(*ONLINE_DPO).loss.needs
    for name, options in (("simpo", "{gamma:1.0}"), ("dpo", "{reference_free:true}")):
        settings = make_settings(*ONLINE_DPO, f"loss.pair_loss={name}", f"loss.pair_options={options}")
        assert settings.loss.needs == set()


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"batch": "pairs"}, 'a loss with batch="rollout" needs advantages and mean; others have none'),
        ({"advantages": None}, "needs advantages and mean"),
        ({"mean": None}, "needs advantages and mean"),
        ({"needs": {"kl"}}, "needs a reference and the entropy at most"),
        ({"state": MovingState({"x": 0.0}, lambda *arguments: {})}, "no state"),
        ({"log_probs": "means"}, 'log_probs="sums"'),
        ({"takes_sft_weight": True}, "takes_sft_weight=False"),
    ],
)
def test_a_loss_that_cannot_work_is_refused(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(LOSSES["grpo"], **changed)
