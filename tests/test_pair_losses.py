"""Losses of pairs by hand: values and gradients of three pairs, in plain Python."""

import math
from typing import Any

import pytest
import torch

from losses import LOSSES
from tests.quick import slow_except
from tests.runs import Program
from tests.test_losses import PAIR_LOSSES, logps, shipped_keywords, sigmoid, with_gradients

# Log-ratios 1, 0, -1 of the chosen responses and -2, 0, 2 of the rejected ones: margins 3, 0, -3.
LOGPS = (logps(-8, -5, -6), logps(-12, -7, -10), logps(-9, -5, -5), logps(-10, -7, -12))


def log1pexp(x: float) -> float:
    """log(1 + e^x); l(x) = -log(sigmoid(x)) is log1pexp(-x)."""
    return math.log(1 + math.exp(x))


def check(
    name: str,
    losses: list[float],
    chosen: list[float],
    rejected: list[float],
    rewards: tuple[list[float], list[float]],
    keywords: dict[str, Any],
    arguments: tuple[torch.Tensor, ...] = LOGPS,
) -> None:
    """Compare a loss with losses, gradients by the policy's log-probs, and rewards."""
    policy = [values.clone().requires_grad_() for values in arguments[:2]]
    references = arguments[2:] if "reference" in LOSSES[name].needs else ()
    found, *found_rewards = LOSSES[name].function(*policy, *references, **keywords)
    found.sum().backward()
    assert found.tolist() == pytest.approx(losses, abs=1e-13)
    for values, expected in zip(policy, (chosen, rejected), strict=True):
        assert values.grad is not None and values.grad.tolist() == pytest.approx(expected, abs=1e-13)
    for values, expected in zip(found_rewards, rewards, strict=True):
        assert values.tolist() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("name", slow_except(PAIR_LOSSES, *PAIR_LOSSES[::2]))
def test_every_loss_trains(name: str, program: Program) -> None:
    """From the command line, one pair a step. The first loss is that of the logged log-probs."""
    required = [f"loss.{key}={value}" for key, value in shipped_keywords(name).items() if key == "beta"]
    run = program.ok(f"loss={name}", *required, "batch_size=1", "n_examples=4")
    first = run.steps[0]
    policy = torch.tensor([[first["logps_train/chosen"]], [first["logps_train/rejected"]]], dtype=torch.float64)
    losses, rewards, _ = with_gradients(name, torch.cat([policy, policy]))  # the reference is the initial policy
    weight = first.get("weights/train", 1.0)  # of wpo
    assert first["loss/train"] == pytest.approx(weight * losses.item(), rel=1e-5)
    for role, reward in zip(("chosen", "rejected"), rewards, strict=True):
        assert first[f"rewards_train/{role}"] == pytest.approx(reward.item(), rel=1e-5)
    assert all(row["grad_norm"] > 0 for row in run.steps)
    assert run.evals[-1]["loss/eval"] != run.evals[0]["loss/eval"]


def test_f_dpo_forward_kl_by_hand() -> None:
    # f'(u) = -1 / u: margins -e^-h_w + e^-h_l
    margins = [0.5 * (math.exp(2) - math.exp(-1)), 0, 0.5 * (math.exp(-2) - math.exp(1))]
    check(
        "f_dpo",
        losses=[log1pexp(-x) for x in margins],
        chosen=[-0.5 * sigmoid(-x) * math.exp(-h) for x, h in zip(margins, (1, 0, -1), strict=True)],
        rejected=[0.5 * sigmoid(-x) * math.exp(-h) for x, h in zip(margins, (-2, 0, 2), strict=True)],
        rewards=([0.5 * (1 - math.exp(-h)) for h in (1, 0, -1)], [0.5 * (1 - math.exp(-h)) for h in (-2, 0, 2)]),
        keywords={"beta": 0.5, "divergence": "forward_kl", "alpha": 0.5},
    )


def test_f_dpo_js_by_hand() -> None:
    # f'(u) = log(2u / (1 + u)), u = e^h; its derivative by h is 1 / (1 + u)
    def reward(h: float) -> float:
        return 0.5 * math.log(2 * math.exp(h) / (1 + math.exp(h)))

    margins = [reward(1) - reward(-2), 0, reward(-1) - reward(2)]
    check(
        "f_dpo",
        losses=[log1pexp(-x) for x in margins],
        chosen=[-0.5 * sigmoid(-x) / (1 + math.exp(h)) for x, h in zip(margins, (1, 0, -1), strict=True)],
        rejected=[0.5 * sigmoid(-x) / (1 + math.exp(h)) for x, h in zip(margins, (-2, 0, 2), strict=True)],
        rewards=([reward(h) for h in (1, 0, -1)], [reward(h) for h in (-2, 0, 2)]),
        keywords={"beta": 0.5, "divergence": "js", "alpha": 0.5},
    )


def test_f_dpo_alpha_by_hand() -> None:
    # f'(u) = (1 - u^-0.25) / 0.25
    def reward(h: float) -> float:
        return 0.5 * (1 - math.exp(-0.25 * h)) / 0.25

    margins = [reward(1) - reward(-2), 0, reward(-1) - reward(2)]
    check(
        "f_dpo",
        losses=[log1pexp(-x) for x in margins],
        chosen=[-0.5 * sigmoid(-x) * math.exp(-0.25 * h) for x, h in zip(margins, (1, 0, -1), strict=True)],
        rejected=[0.5 * sigmoid(-x) * math.exp(-0.25 * h) for x, h in zip(margins, (-2, 0, 2), strict=True)],
        rewards=([reward(h) for h in (1, 0, -1)], [reward(h) for h in (-2, 0, 2)]),
        keywords={"beta": 0.5, "divergence": "alpha", "alpha": 0.25},
    )


def test_f_dpo_with_a_small_alpha_is_dpo() -> None:
    losses, *_ = LOSSES["f_dpo"].function(*LOGPS, beta=0.5, divergence="alpha", alpha=1e-9)
    dpo, *_ = LOSSES["dpo"].function(*LOGPS, beta=0.5)
    assert losses.tolist() == pytest.approx(dpo.tolist(), rel=1e-7)


def test_f_dpo_goes_on_as_a_tangent() -> None:
    # 1 - e^-h to h = -30; below, e^30 (1 + the distance)
    zeros = logps(0, 0)
    keywords = {"beta": 1.0, "divergence": "forward_kl", "alpha": 0.5}
    _, rewards, _ = LOSSES["f_dpo"].function(logps(-29, -31), zeros, zeros, zeros, **keywords)
    assert rewards.tolist() == pytest.approx([1 - math.exp(29), 1 - 2 * math.exp(30)], rel=1e-14)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f_dpo_raises_an_improbable_chosen_response(divergence: str, dtype: torch.dtype) -> None:
    """Far below the reference, where exp would overflow, the gradient keeps its sign."""
    chosen = torch.tensor([-50.0, -200.0, -1e4], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(3, dtype=dtype)
    losses, *_ = LOSSES["f_dpo"].function(chosen, zeros, zeros, zeros, beta=0.1, divergence=divergence, alpha=0.5)
    losses.sum().backward()
    assert losses.isfinite().all() and chosen.grad is not None
    assert (chosen.grad < 0).all() and chosen.grad.isfinite().all()


def test_hinge_by_hand() -> None:
    # 1 - 0.5 * (3, 0, -3); the first pair is beyond the margin
    check(
        "hinge",
        losses=[0, 1, 2.5],
        chosen=[0, -0.5, -0.5],
        rejected=[0, 0.5, 0.5],
        rewards=([0.5, 0, -0.5], [-1, 0, 1]),
        keywords={"beta": 0.5},
    )


def test_slic_by_hand() -> None:
    # differences -8 + 12 = 4, -5 + 7 = 2, -6 + 10 = 4: max(0, 3 - 4) + 0.1 * 8, (3 - 2) + 0.1 * 5, 0 + 0.1 * 6
    check(
        "slic",
        losses=[0.8, 1.5, 0.6],
        chosen=[-0.1, -1.1, -0.1],
        rejected=[0, 1, 0],
        rewards=([-8, -5, -6], [-12, -7, -10]),
        keywords={"delta": 3.0, "nll_weight": 0.1},
    )


def test_robust_by_hand() -> None:
    # logits 0.5 * (3, 0, -3); l(1.5) = 0.2014132779827524, l(-1.5) = 1.7014132779827524; 1 - 2 * 0.1 = 0.8
    small, large = 0.2014132779827524, 1.7014132779827524
    slopes = [(0.9 * sigmoid(-x) + 0.1 * sigmoid(x)) / 0.8 for x in (1.5, 0, -1.5)]
    check(
        "robust",
        losses=[(0.9 * small - 0.1 * large) / 0.8, math.log(2), (0.9 * large - 0.1 * small) / 0.8],
        chosen=[-0.5 * slope for slope in slopes],
        rejected=[0.5 * slope for slope in slopes],
        rewards=([0.5, 0, -0.5], [-1, 0, 1]),
        keywords={"beta": 0.5, "label_smoothing": 0.1},
    )


def test_robust_is_unbiased() -> None:
    """With a share e of flipped labels, its mean is the loss of DPO on true ones."""
    chosen, rejected, *references = LOGPS
    keywords = {"beta": 0.5, "label_smoothing": 0.2}
    true, *_ = LOSSES["robust"].function(chosen, rejected, *references, **keywords)
    flipped, *_ = LOSSES["robust"].function(rejected, chosen, *references[::-1], **keywords)
    dpo, *_ = LOSSES["dpo"].function(*LOGPS, beta=0.5)
    assert (0.8 * true + 0.2 * flipped).tolist() == pytest.approx(dpo.tolist(), abs=1e-14)


def test_exo_by_hand() -> None:
    # beta * 3 = log 9 gives q = 0.9, 0.5 and 0.1. The slope is q (1 - q) (logit - log 9): 0 where q is the label.
    nine = math.log(9)
    beta = nine / 3
    check(
        "exo",
        losses=[0, 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), 0.1 * math.log(1 / 9) + 0.9 * nine],
        chosen=[0, -beta * 0.25 * nine, -beta * 0.09 * 2 * nine],
        rejected=[0, beta * 0.25 * nine, beta * 0.09 * 2 * nine],
        rewards=([beta, 0, -beta], [-2 * beta, 0, 2 * beta]),
        keywords={"beta": beta, "label_smoothing": 0.1},
    )


def test_nca_by_hand() -> None:
    # rewards 0.5, 0, -0.5 and -1, 0, 1: l(r_w) + l(-r_w) / 2 + l(-r_l) / 2
    check(
        "nca",
        losses=[
            log1pexp(-0.5) + log1pexp(0.5) / 2 + log1pexp(-1) / 2,
            2 * math.log(2),
            log1pexp(0.5) + log1pexp(-0.5) / 2 + log1pexp(1) / 2,
        ],
        chosen=[0.5 * (sigmoid(r) / 2 - sigmoid(-r)) for r in (0.5, 0, -0.5)],
        rejected=[0.25 * sigmoid(r) for r in (-1, 0, 1)],
        rewards=([0.5, 0, -0.5], [-1, 0, 1]),
        keywords={"beta": 0.5},
    )


def test_nca_keeps_the_chosen_reward_at_its_target() -> None:
    """The chosen reward rises to log 2, and no further: there sigmoid(r) is 2/3."""
    chosen = logps(math.log(2) - 0.1, math.log(2), math.log(2) + 0.1).requires_grad_()
    losses, *_ = LOSSES["nca"].function(chosen, *[torch.zeros(3, dtype=torch.float64)] * 3, beta=1.0)
    losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad[0] < 0 < chosen.grad[2] and chosen.grad[1].abs() < 1e-15


def test_sppo_by_hand() -> None:
    # target 1 / (2 * 0.25) = 2
    check(
        "sppo",
        losses=[(1 - 2) ** 2 + (-2 + 2) ** 2, 2**2 + 2**2, (-1 - 2) ** 2 + (2 + 2) ** 2],
        chosen=[-2, -4, -6],
        rejected=[0, 4, 8],
        rewards=([0.25, 0, -0.25], [-0.5, 0, 0.5]),
        keywords={"beta": 0.25},
    )


def slope_of_sigmoid(x: float) -> float:
    return sigmoid(x) * sigmoid(-x)


def test_apo_zero_by_hand() -> None:
    # rewards 0.5, 0, -0.5 and -1, 0, 1: 1 - sigmoid(r_w) + sigmoid(r_l)
    check(
        "apo_zero",
        losses=[1 - sigmoid(0.5) + sigmoid(-1), 1, 1 - sigmoid(-0.5) + sigmoid(1)],
        chosen=[-0.5 * slope_of_sigmoid(r) for r in (0.5, 0, -0.5)],
        rejected=[0.5 * slope_of_sigmoid(r) for r in (-1, 0, 1)],
        rewards=([0.5, 0, -0.5], [-1, 0, 1]),
        keywords={"beta": 0.5},
    )


def test_apo_down_by_hand() -> None:
    # rewards 0.5, 0, -0.5, margins 1.5, 0, -1.5: sigmoid(r_w) + 1 - sigmoid(margin)
    check(
        "apo_down",
        losses=[sigmoid(0.5) + 1 - sigmoid(1.5), 1, sigmoid(-0.5) + 1 - sigmoid(-1.5)],
        chosen=[0.5 * (slope_of_sigmoid(r) - slope_of_sigmoid(3 * r)) for r in (0.5, 0, -0.5)],
        rejected=[0.5 * slope_of_sigmoid(x) for x in (1.5, 0, -1.5)],
        rewards=([0.5, 0, -0.5], [-1, 0, 1]),
        keywords={"beta": 0.5},
    )


def test_apo_down_lowers_the_chosen_response_of_a_learned_pair() -> None:
    """And an unlearned pair's rejected response alone: at the reference, the chosen one has no gradient."""
    chosen, rejected = logps(0, 0).requires_grad_(), logps(0, -8).requires_grad_()
    zeros = logps(0, 0)
    losses, *_ = LOSSES["apo_down"].function(chosen, rejected, zeros, zeros, beta=0.5)
    losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad[0] == 0 < chosen.grad[1] and (rejected.grad > 0).all()


def test_dpop_by_hand() -> None:
    # D - 2 max(0, -h_w) = 3, 0, -3 - 2 = -5; at h_w = 0 the penalty has no slope
    check(
        "dpop",
        losses=[log1pexp(-1.5), math.log(2), log1pexp(2.5)],
        chosen=[-0.5 * sigmoid(-1.5), -0.25, -0.5 * sigmoid(2.5) * (1 + 2)],
        rejected=[0.5 * sigmoid(-1.5), 0.25, 0.5 * sigmoid(2.5)],
        rewards=([0.5, 0, -0.5], [-1, 0, 1]),
        keywords={"beta": 0.5, "penalty_weight": 2.0},
    )


def test_cal_dpo_by_hand() -> None:
    # target 1 / (2 * 0.25) = 2; half of the squares of sppo, the margins 3, 0, -3 have no beta
    check(
        "cal_dpo",
        losses=[log1pexp(-3) + 0.5, math.log(2) + 4, log1pexp(3) + 12.5],
        chosen=[-sigmoid(-3) - 1, -0.5 - 2, -sigmoid(3) - 3],
        rejected=[sigmoid(-3), 0.5 + 2, sigmoid(3) + 4],
        rewards=([0.25, 0, -0.25], [-0.5, 0, 0.5]),
        keywords={"beta": 0.25, "calibration_weight": 0.5},
    )


def test_discopop_by_hand() -> None:
    # logits x = 1.5, 0, -1.5 and m = sigmoid(x / 0.5): (1 - m) l(x) + m e^-x; m has the slope m (1 - m) / 0.5
    def loss(x: float) -> float:
        m = sigmoid(2 * x)
        return (1 - m) * log1pexp(-x) + m * math.exp(-x)

    def slope(x: float) -> float:
        m = sigmoid(2 * x)
        return 2 * m * (1 - m) * (math.exp(-x) - log1pexp(-x)) - (1 - m) * sigmoid(-x) - m * math.exp(-x)

    check(
        "discopop",
        losses=[loss(1.5), math.log(2) / 2 + 0.5, loss(-1.5)],
        chosen=[0.5 * slope(1.5), 0.5 * ((1 - math.log(2)) / 2 - 0.25 - 0.5), 0.5 * slope(-1.5)],
        rejected=[-0.5 * slope(1.5), -0.5 * ((1 - math.log(2)) / 2 - 0.25 - 0.5), -0.5 * slope(-1.5)],
        rewards=([0.5, 0, -0.5], [-1, 0, 1]),
        keywords={"beta": 0.5, "tau": 0.5},
    )


def test_discopop_lowers_margins_near_0() -> None:
    """With the paper's tau. The slope at a margin of 0 is (1 - log 2) / (4 tau) - 3/4; others rise."""
    chosen = logps(-10, 0, 10).requires_grad_()
    losses, *_ = LOSSES["discopop"].function(chosen, *[torch.zeros(3, dtype=torch.float64)] * 3, beta=0.05, tau=0.05)
    losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad[1].item() == pytest.approx(0.05 * ((1 - math.log(2)) / 0.2 - 0.75), rel=1e-12)
    assert chosen.grad[0] < 0 < chosen.grad[1] and chosen.grad[2] < 0


def test_cpo_by_hand() -> None:
    # 0.5 * (4, 2, 4) = 2, 1, 2; log-likelihoods 8, 5, 6
    check(
        "cpo",
        losses=[log1pexp(-2) + 0.5 * 8, log1pexp(-1) + 0.5 * 5, log1pexp(-2) + 0.5 * 6],
        chosen=[-0.5 * sigmoid(-x) - 0.5 for x in (2, 1, 2)],
        rejected=[0.5 * sigmoid(-x) for x in (2, 1, 2)],
        rewards=([-4, -2.5, -3], [-6, -3.5, -5]),
        keywords={"beta": 0.5, "nll_weight": 0.5},
    )


def test_simpo_by_hand() -> None:
    # log-probs per token: 2 * (1, 0, -1.75) - 1 = 1, -1, -4.5
    check(
        "simpo",
        losses=[log1pexp(-1), log1pexp(1), log1pexp(4.5)],
        chosen=[-2 * sigmoid(-x) for x in (1, -1, -4.5)],
        rejected=[2 * sigmoid(-x) for x in (1, -1, -4.5)],
        rewards=([-1, -2, -4], [-3, -2, -0.5]),
        keywords={"beta": 2.0, "gamma": 1.0},
        arguments=(logps(-0.5, -1, -2), logps(-1.5, -1, -0.25)),
    )


def test_orpo_by_hand() -> None:
    # probabilities 0.5, 0.8, 0.2 and 0.2, 0.8, 0.5: odds 1, 4, 1/4 and 1/4, 4, 1; log-odds have the slope 1 / (1 - p).
    # l(log(odds_w / odds_l)) = log(1 + odds_l / odds_w), and sigmoid(-log(odds_w / odds_l)) = 0.2, 0.5, 0.8.
    chosen, rejected = logps(*map(math.log, (0.5, 0.8, 0.2))), logps(*map(math.log, (0.2, 0.8, 0.5)))
    check(
        "orpo",
        losses=[
            math.log(2) + 0.5 * math.log(1 + 0.25),
            math.log(1.25) + 0.5 * math.log(2),
            math.log(5) + 0.5 * math.log(1 + 4),
        ],
        chosen=[-1 - 0.5 * 0.2 / 0.5, -1 - 0.5 * 0.5 / 0.2, -1 - 0.5 * 0.8 / 0.8],
        rejected=[0.5 * 0.2 / 0.8, 0.5 * 0.5 / 0.2, 0.5 * 0.8 / 0.5],
        rewards=(chosen.tolist(), rejected.tolist()),
        keywords={"odds_ratio_weight": 0.5},
        arguments=(chosen, rejected),
    )


def test_ln_dpo_is_dpo_per_token(program: Program) -> None:
    run = program.ok("loss=ln_dpo", "n_examples=8")
    same = program.ok("loss=dpo", "loss.beta=5", "loss.average_log_prob=true", "n_examples=8")
    assert len(run.steps) == 2 and run.steps[1]["loss/train"] != run.steps[0]["loss/train"]
    for key in ("loss/train", "rewards_train/margins", "grad_norm"):
        assert [row[key] for row in run.steps] == [row[key] for row in same.steps]
