"""Losses: pure functions of log-probs or scores, and LOSSES, the table for `loss.name`.

A loss sees log-probs and other numbers of each response. It knows no model, config or tokens, and returns one value per
example, unreduced. To add one: a function here, a line in LOSSES, a YAML under config/loss, and a test with values
computed by hand. The function's keyword arguments are the other keys of the YAML. Their annotations give the types and
ranges.
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

import online_losses as online
from online_losses import Mean
from reward_losses import reward_loss

BatchKind = Literal["sft", "pairs", "unpaired", "ranked", "rollout", "tokens"]
Head = Literal["lm", "score", "value"]
Need = Literal["reference", "kl", "whole batch", "token kl", "confidence", "shared length", "entropy"]
# Losses, and the implicit rewards of the chosen and of the rejected responses: [pairs] each.
PairLosses = tuple[Tensor, Tensor, Tensor]
PairLossesWithMetrics = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
# Losses, the implicit rewards of the responses, and further metrics: [examples] each.
UnpairedLosses = tuple[Tensor, Tensor, dict[str, Tensor]]


def _logratios(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor]:
    """log(policy / reference) of the chosen and of the rejected responses, [pairs] each."""
    return policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0,
    reference_free: bool = False,
) -> PairLosses:
    """Direct Preference Optimization.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With label_smoothing, equation 3 of Mitchell 2023, "A note on
    DPO with noisy preferences & relationship to IPO".

    Args:
        policy_chosen_logps: log-probs of the chosen responses under the policy, [pairs]; the others likewise.
        beta: strength of the implicit KL constraint.
        label_smoothing: assumed share of flipped preferences.
        reference_free: use a uniform reference, and ignore the reference log-probs.

    Returns:
        losses [pairs], and the implicit rewards beta * log(policy / reference) of the chosen and of the rejected
        responses, [pairs] each, detached.
    """
    chosen_logratios, rejected_logratios = policy_chosen_logps, policy_rejected_logps
    if not reference_free:
        chosen_logratios = policy_chosen_logps - reference_chosen_logps
        rejected_logratios = policy_rejected_logps - reference_rejected_logps
    logits = beta * (chosen_logratios - rejected_logratios)
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def cdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    label_smoothing: Annotated[float, Gt(0), Lt(0.5)],
    reference_free: bool = False,
) -> PairLosses:
    """Conservative DPO: dpo_loss with a label_smoothing above 0. Takes and returns the same."""
    return dpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        label_smoothing=label_smoothing,
        reference_free=reference_free,
    )


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLosses:
    """Identity Preference Optimization.

    Azar et al. 2023 (arXiv 2310.12036), equation 17; beta is tau there. Takes and returns the same as dpo_loss, [pairs]
    throughout.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def f_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    divergence: Literal["forward_kl", "js", "alpha"],
    alpha: Annotated[float, Gt(0), Lt(1)],
) -> PairLosses:
    """DPO under another divergence from the reference than reverse KL.

    Wang et al. 2023 (arXiv 2309.16240). The reward of a response is beta * f'(policy / reference). Takes and returns
    the same as dpo_loss.

    Args:
        divergence: f'(u) is -1 / u for forward_kl, log(2u / (1 + u)) for js (Jensen-Shannon), and (1 - u ** -alpha) /
            alpha for alpha, each here with a constant: 0 at u = 1.
        alpha: of divergence alpha. Near 0 it is DPO, near 1 forward_kl.
    """

    def rewards(logratios: Tensor) -> Tensor:
        if divergence == "js":
            return beta * (math.log(2) + F.logsigmoid(logratios))
        power = alpha if divergence == "alpha" else 1.0
        exponents = -power * logratios
        # Above 30, exp goes on as its tangent. There exp would overflow, and a constant would have no gradient.
        capped = torch.expm1(exponents.clamp(max=30)) + math.exp(30) * F.relu(exponents - 30)
        return -beta * capped / power

    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    chosen_rewards, rejected_rewards = rewards(chosen_logratios), rewards(rejected_logratios)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLosses:
    """Hinge loss of the reward margin.

    Liu et al. 2023, RSO (arXiv 2309.06657), "hinge-norm". Takes and returns the same as dpo_loss.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    losses = F.relu(1 - beta * (chosen_logratios - rejected_logratios))
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def slic_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    delta: Annotated[float, Ge(0)],
    nll_weight: Annotated[float, Ge(0)],
) -> PairLosses:
    """Sequence Likelihood Calibration (SLiC-HF).

    Zhao et al. 2023 (arXiv 2305.10425): a hinge loss of log-probs, and a negative log-likelihood. Its target is the
    chosen response here. Takes the log-probs of the policy alone, which are its rewards.

    Args:
        delta: pairs with a larger difference of log-probs have no hinge loss.
        nll_weight: of the negative log-likelihood, summed over tokens.
    """
    losses = F.relu(delta - policy_chosen_logps + policy_rejected_logps) - nll_weight * policy_chosen_logps
    return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


def robust_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)],
) -> PairLosses:
    """Robust DPO: an unbiased estimate of the loss with true labels.

    Chowdhury et al. 2024 (arXiv 2403.00409), section 3.1. Takes and returns the same as dpo_loss.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen_logratios - rejected_logratios)
    losses = label_smoothing * F.logsigmoid(-logits) - (1 - label_smoothing) * F.logsigmoid(logits)
    return losses / (1 - 2 * label_smoothing), beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def exo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    label_smoothing: Annotated[float, Gt(0), Lt(0.5)],
) -> PairLosses:
    """Efficient Exact Optimization: reverse KL to the smoothed preference.

    Ji et al. 2024 (arXiv 2402.00856), equation 16, of pairs. Takes and returns the same as dpo_loss.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen_logratios - rejected_logratios)
    # sigmoid(logits) is the policy's preference q: q log(q / (1 - e)) + (1 - q) log((1 - q) / e)
    losses = logits.sigmoid() * (F.logsigmoid(logits) - math.log(1 - label_smoothing))
    losses = losses + (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def nca_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLosses:
    """Noise Contrastive Alignment: pulls each reward, not only their margin.

    Chen et al. 2024 (arXiv 2402.05369), section 4.1, of pairs; beta is alpha there. Takes and returns the same as
    dpo_loss.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    chosen_logits, rejected_logits = beta * chosen_logratios, beta * rejected_logratios
    losses = -F.logsigmoid(chosen_logits) - (F.logsigmoid(-chosen_logits) + F.logsigmoid(-rejected_logits)) / 2
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def sppo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLosses:
    """Self-Play Preference Optimization: a squared loss of each response.

    Wu et al. 2024 (arXiv 2405.00675), with win probabilities 1 and 0; 1 / beta is eta there. The authors' code halves
    the sum. Takes and returns the same as dpo_loss.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    target = 1 / (2 * beta)
    losses = (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def apo_zero_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLosses:
    """Anchored Preference Optimization: raises chosen, lowers rejected responses.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7. Takes and returns the same as dpo_loss.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    losses = 1 - (beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def apo_down_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLosses:
    """Anchored Preference Optimization: lowers both, the rejected response more.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8. Takes and returns the same as dpo_loss.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen_logratios - rejected_logratios)
    losses = (beta * chosen_logratios).sigmoid() + 1 - logits.sigmoid()
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def dpop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    penalty_weight: Annotated[float, Ge(0)],
) -> PairLosses:
    """DPO-Positive: a penalty where the chosen response becomes less probable.

    Pal et al. 2024, Smaug (arXiv 2402.13228), equation 3. Takes and returns the same as dpo_loss.

    Args:
        penalty_weight: of the log-prob lost to the reference; lambda there.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    margins = chosen_logratios - rejected_logratios - penalty_weight * F.relu(-chosen_logratios)
    return -F.logsigmoid(beta * margins), beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def cal_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    calibration_weight: Annotated[float, Ge(0)],
) -> PairLosses:
    """Calibrated DPO: a margin, and a target of each log-ratio.

    Xiao et al. 2024 (arXiv 2412.14516), equation 10: no beta in the sigmoid. Takes and returns the same as dpo_loss.

    Args:
        calibration_weight: of the squares. 1 in equation 10, 0.5 in the authors' code.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    target = 1 / (2 * beta)
    squares = (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2
    losses = calibration_weight * squares - F.logsigmoid(chosen_logratios - rejected_logratios)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def discopop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    tau: Annotated[float, Gt(0), Le(1)],
) -> PairLosses:
    """DiscoPOP: a logistic loss blended into an exponential one.

    Lu et al. 2024 (arXiv 2406.08414), equation 5. Not convex: it lowers margins near 0. Takes and returns the same
    as dpo_loss.

    Args:
        tau: temperature of the blend. Above 1, the loss of a negative margin would be exponential.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen_logratios - rejected_logratios)
    # sigmoid(logits / tau) * exp(-logits), as one exponential: extremes stay finite
    exponential = (F.logsigmoid(logits / tau) - logits).exp()
    losses = exponential - (-logits / tau).sigmoid() * F.logsigmoid(logits)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    nll_weight: Annotated[float, Ge(0)],
) -> PairLosses:
    """Contrastive Preference Optimization: DPO without a reference, and a log-likelihood.

    Xu et al. 2024 (arXiv 2401.08417). The authors' code takes the log-likelihood per token. Takes the log-probs of the
    policy alone. Returns the same as dpo_loss; rewards are beta * log-prob.

    Args:
        nll_weight: of the chosen response's negative log-likelihood, summed over tokens. 1 in the paper.
    """
    losses = -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps)) - nll_weight * policy_chosen_logps
    return losses, beta * policy_chosen_logps.detach(), beta * policy_rejected_logps.detach()


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    gamma: Annotated[float, Ge(0)],
) -> PairLosses:
    """Simple Preference Optimization: log-probs per token, and a target margin.

    Meng et al. 2024 (arXiv 2405.14734), equation 6. Takes log-probs per token, of the policy alone. Returns the same as
    dpo_loss; rewards are beta * log-prob per token.
    """
    losses = -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps) - gamma)
    return losses, beta * policy_chosen_logps.detach(), beta * policy_rejected_logps.detach()


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    odds_ratio_weight: Annotated[float, Ge(0)],
) -> PairLosses:
    """Odds Ratio Preference Optimization: SFT and a preference in one stage.

    Hong et al. 2024 (arXiv 2403.07691), equations 4, 6 and 7. Takes log-probs per token, of the policy alone; they are
    its rewards.

    Args:
        odds_ratio_weight: of the preference, beside the negative log-likelihood per token; lambda there.
    """

    def log_odds(logps: Tensor) -> Tensor:
        logps = logps.clamp(max=-1e-6)  # a probability of 1 has infinite odds
        return logps - torch.log(-torch.expm1(logps))

    preferences = -F.logsigmoid(log_odds(policy_chosen_logps) - log_odds(policy_rejected_logps))
    losses = odds_ratio_weight * preferences - policy_chosen_logps
    return losses, policy_chosen_logps.detach(), policy_rejected_logps.detach()


def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLosses:
    """Alignment via Optimal Transport, on paired data.

    Melnyk et al. 2024 (arXiv 2406.05882), the paired variant with the logistic loss. The margins of log-probs of policy
    and reference are sorted over the whole batch: the k-th loss compares the k-th smallest of each. Takes and returns
    the same as dpo_loss; a pair's loss is that of its policy margin.
    """
    margins = policy_chosen_logps - policy_rejected_logps
    sorted_references, by_reference = (reference_chosen_logps - reference_rejected_logps).sort(stable=True)
    order = by_reference[margins.detach()[by_reference].argsort(stable=True)]  # equal margins as their references
    losses = -F.logsigmoid(beta * (margins - sorted_references[order.argsort()]))
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def beta_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    mean_margin: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    alpha: Annotated[float, Ge(0)],
) -> PairLossesWithMetrics:
    """DPO with a beta for each batch, from its margins.

    Wu et al. 2024 (arXiv 2407.08639), the batch-level beta with the moving M_0. The paper's random filter of pairs is
    left out. Takes and returns the same as dpo_loss, and the metric beta.

    Args:
        mean_margin: M_0, the moving mean of the margins of log-ratios, a scalar.
        alpha: how much beta follows the margins of the batch.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    margins = chosen_logratios - rejected_logratios
    batch_beta = (beta * (1 + alpha * (margins.detach().mean() - mean_margin))).clamp(min=1e-3)
    rewards = batch_beta * chosen_logratios.detach(), batch_beta * rejected_logratios.detach()
    return -F.logsigmoid(batch_beta * margins), *rewards, {"beta": batch_beta.expand_as(margins)}


def beta_dpo_state(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    mean_margin: Tensor,
) -> dict[str, Tensor]:
    """Move mean_margin of beta_dpo_loss by a tenth to the mean margin of a batch."""
    margins = policy_chosen_logps - reference_chosen_logps - (policy_rejected_logps - reference_rejected_logps)
    return {"mean_margin": 0.9 * mean_margin + 0.1 * margins.mean()}


def tdpo1_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLossesWithMetrics:
    """Token-level DPO, the first variant: DPO with the difference of token KLs in its margin.

    Zeng et al. 2024 (arXiv 2404.11999): -log sigmoid(beta (D - (K_l - K_w))), with D the margin of log-ratios and K the
    sequential KL divergence. Takes and returns the same as dpo_loss, and metrics. The rewards are without K.

    Args:
        chosen_kl: KL(reference || policy), summed over the positions of the chosen responses, [pairs].
        rejected_kl: the same of the rejected ones.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - (rejected_kl - chosen_kl)))
    metrics = {"token_kl/chosen": chosen_kl, "token_kl/rejected": rejected_kl}
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach(), metrics


def tdpo2_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    alpha: Annotated[float, Ge(0)],
) -> PairLossesWithMetrics:
    """Token-level DPO, the second variant: K_w of tdpo1_loss has no gradient, and alpha weights the difference.

    Zeng et al. 2024 (arXiv 2404.11999): -log sigmoid(beta (D - alpha (K_l - stop_gradient(K_w)))). Takes and returns
    the same as tdpo1_loss.

    Args:
        alpha: weight of the token KLs. 0 is DPO.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    difference = alpha * (rejected_kl - chosen_kl.detach())
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - difference))
    metrics = {"token_kl/chosen": chosen_kl, "token_kl/rejected": rejected_kl}
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach(), metrics


def wpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_confidence: Tensor,
    rejected_confidence: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> PairLossesWithMetrics:
    """Weighted Preference Optimization: DPO, weighted by how likely the policy would write the pair.

    Zhou et al. 2024 (arXiv 2406.11827), with the paper's sampled alignment: a response weighs
    w = exp(mean over tokens of log(p(token) / sum of p(v)^2 over the vocabulary)), and a pair w_chosen w_rejected. The
    weights have no gradient. The authors' code clamps a pair's weight to 1; the paper and this function do not. Takes
    and returns the same as dpo_loss, and the metric weights.

    Args:
        chosen_confidence: log w of the chosen responses, [pairs].
        rejected_confidence: log w of the rejected responses, [pairs].
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    weights = (chosen_confidence + rejected_confidence).detach().exp()
    losses = -weights * F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach(), {"weights": weights}


def ld_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    policy_chosen_shared: Tensor,
    policy_rejected_shared: Tensor,
    reference_chosen_shared: Tensor,
    reference_rejected_shared: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    alpha: Annotated[float, Ge(0), Le(1)],
) -> PairLosses:
    """Length-desensitised DPO: tokens beyond the length of the shorter response count less.

    Liu et al. 2024 (arXiv 2409.06411): dpo_loss of log p(first l tokens) + alpha log p(the other tokens), under policy
    and reference, with l = min(|chosen|, |rejected|). Takes and returns the same as dpo_loss.

    Args:
        policy_chosen_shared: log-probs of the first l tokens of the chosen responses, [pairs]; the others likewise.
        alpha: weight of the other tokens. 1 is DPO.
    """

    def desensitised(logps: Tensor, shared: Tensor) -> Tensor:
        return alpha * logps + (1 - alpha) * shared

    return dpo_loss(
        desensitised(policy_chosen_logps, policy_chosen_shared),
        desensitised(policy_rejected_logps, policy_rejected_shared),
        desensitised(reference_chosen_logps, reference_chosen_shared),
        desensitised(reference_rejected_logps, reference_rejected_shared),
        beta=beta,
    )


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    desirable_weight: Annotated[float, Gt(0)] = 1.0,
    undesirable_weight: Annotated[float, Gt(0)] = 1.0,
) -> UnpairedLosses:
    """Kahneman-Tversky Optimization: responses labelled desirable or undesirable.

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7. A reward counts by its distance from a reference
    point z0, as gains and losses do for people.

    Args:
        policy_logps: log-probs of the responses under the policy, [examples]; the reference's likewise.
        labels: bool [examples], true for desirable responses.
        kl: log(policy / reference) of mismatched responses, the mean over the batch, a scalar. z0 is kl, at least 0.
        desirable_weight, undesirable_weight: lambda_D and lambda_U there.

    Returns:
        losses [examples], the rewards beta * log(policy / reference) [examples], detached, and the metric kl: z0.
    """
    logratios = policy_logps - reference_logps
    reference_point = kl.detach().clamp(min=0).to(logratios.dtype)
    gains = beta * (logratios - reference_point)
    losses = torch.where(labels, desirable_weight * (-gains).sigmoid(), undesirable_weight * gains.sigmoid())
    return losses, beta * logratios.detach(), {"kl": reference_point.expand_as(losses)}


def bco_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    desirable_mean: Tensor,
    undesirable_mean: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
) -> UnpairedLosses:
    """Binary Classifier Optimization: rewards as the logits of a classifier of labels.

    Jung et al. 2024 (arXiv 2404.04656), with the reward shift, without weights for unlike prompts (underlying
    distribution matching). Takes log-probs and labels as kto_loss does.

    Args:
        desirable_mean, undesirable_mean: moving means of log(policy / reference) of the responses of each label,
            scalars. The current batch counts. The reward shift delta is beta times the middle of both.

    Returns:
        losses and rewards as of kto_loss, and the metric reward_shift: delta.
    """
    logratios = policy_logps - reference_logps
    shift = (beta * (desirable_mean + undesirable_mean) / 2).to(logratios.dtype)
    logits = beta * logratios - shift
    losses = -F.logsigmoid(torch.where(labels, logits, -logits))
    return losses, beta * logratios.detach(), {"reward_shift": shift.expand_as(losses)}


def bco_state(
    policy_logps: Tensor, reference_logps: Tensor, labels: Tensor, desirable_mean: Tensor, undesirable_mean: Tensor
) -> dict[str, Tensor]:
    """Move the means of bco_loss by a tenth to those of a batch. A label absent from the batch keeps its mean."""
    logratios = policy_logps - reference_logps

    def moved(mean: Tensor, selected: Tensor) -> Tensor:
        num_selected = selected.sum()
        batch_mean = logratios.where(selected, 0).sum() / num_selected.clamp(min=1)
        return torch.where(num_selected > 0, 0.9 * mean + 0.1 * batch_mean, mean)

    return {"desirable_mean": moved(desirable_mean, labels), "undesirable_mean": moved(undesirable_mean, ~labels)}


def sft_loss(policy_chosen_logps: Tensor) -> Tensor:
    """Negative log-likelihood of each target response or window of text, [examples] -> [examples]."""
    return -policy_chosen_logps


@dataclass(frozen=True)
class MovingState:
    """Numbers that move with every update of the policy. Checkpoints keep them.

    Args:
        initial: name -> value before the first update.
        update: takes the arguments of the loss function but for the scalar kl, of the whole batch, and returns the next
            {name: value}.
    """

    initial: Mapping[str, float]
    update: Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Loss:
    """A loss function, and its needs.

    Args:
        function: takes the arguments below, returns the losses [examples]; of pairs and unpaired responses, a tuple of
            losses and rewards. A tuple may end in a dict of further metrics, {name: [examples]}. Losses of rollouts are
            in online_losses.py.
        batch: "sft" (one target response per example), "pairs" (chosen and rejected), "unpaired" (one response and its
            label), "ranked" (all responses to a prompt, and their pairs), "rollout" (sampled responses) or "tokens"
            (windows of text). Fixes the first arguments, log-probs under the policy: chosen; chosen and rejected; the
            response's, or the window's. Of ranked responses: scores, pairs, margins and weights, as for reward_loss.
        needs: further arguments, in this order.
            - "reference": the same log-probs under a frozen reference model.
            - "token kl": KL(reference || policy) of the next token, summed over the response: chosen and rejected. With
              gradient. It needs a live reference.
            - "entropy": of the policy's distribution of each sampled token, with gradient. For rollouts.
            - "confidence": log(p(token) / sum of squared probabilities) under the policy, the mean over the response:
              chosen and rejected. Without gradient.
            - "shared length": log-probs of the first tokens, as many as the shorter response of the pair has: under the
              policy of chosen and rejected, and the same under the reference.
            - "kl": log(policy / reference) of mismatched responses, the mean over the batch, a scalar.
            - "whole batch": all arguments are of the whole batch, on all ranks. It costs a second forward pass.
        log_probs: "sums" over tokens, "means", or "either", by the key average_log_prob.
        takes_sft_weight: whether the key sft_weight adds a log-likelihood. False for losses with one of their own, and
            for unpaired responses: undesirable ones are no targets.
        state: further arguments, scalars. It needs the whole batch.
        head: "lm" for log-probs, "score" for a scalar at the last token of each response. Ranked responses need it, and
            it needs them. "value" is of critics.
        advantages: of rollouts; takes online_losses.Scored, and keyword arguments of the YAML. With value_loss it gives
            the returns too.
        value_loss: of a critic: its values, those at sampling, and the returns, [tokens] each; and keyword arguments.
        next_beta: moves the weight of the KL in the rewards; None for a fixed weight.
        mean: of the losses of tokens, for rollouts.
        ratios: of policies, that the loss clips: of each token, or of each response.
        skips_zero_advantages: responses with advantages of 0 are left out.
        has_greedy_baseline: the advantages need the reward of the most likely response.
        compares_group: a response is compared with the others of its prompt, so groups of equal rewards teach nothing.
            "either": by the key baseline=group.
        learns_pairs: the function takes pair_loss, which the keys pair_loss and pair_options choose, and pairs.
        samples_reference: the last response to each prompt is one of the reference.

    Labels of unpaired responses follow the columns above: bool [examples], true for desirable ones.

    Raises:
        ValueError: for values that do not fit each other.
    """

    function: Callable[..., Any]
    batch: BatchKind
    needs: Set[Need] = frozenset()
    log_probs: Literal["sums", "means", "either"] = "either"
    takes_sft_weight: bool = True
    state: MovingState | None = None
    head: Head = "lm"
    advantages: Callable[..., Any] | None = None
    mean: Mean | None = None
    ratios: Literal["tokens", "responses"] = "tokens"
    value_loss: Callable[..., Tensor] | None = None
    next_beta: Callable[..., float] | None = None
    skips_zero_advantages: bool = False
    has_greedy_baseline: bool = False
    compares_group: bool | Literal["either"] = True
    learns_pairs: bool = False
    samples_reference: bool = False

    @property
    def is_of_pairs(self) -> bool:
        """Whether it reads log-probs of pairs alone, so that sampled pairs may have it."""
        return self.batch == "pairs" and not self.needs - {"reference"} and self.state is None

    def __post_init__(self) -> None:
        is_rollout = self.batch == "rollout"
        if is_rollout != (self.advantages is not None) or is_rollout != (self.mean is not None):
            raise ValueError('a loss with batch="rollout" needs advantages and mean; others have none')
        has_sums = self.log_probs == "sums" and not self.takes_sft_weight
        if is_rollout and (self.needs - {"reference", "entropy"} or self.state or not has_sums):
            problem = 'takes log-probs of tokens alone: log_probs="sums", takes_sft_weight=False, no state'
            raise ValueError(f'a loss with batch="rollout" needs a reference and the entropy at most, and {problem}')
        if not is_rollout and (self.value_loss or self.next_beta):
            raise ValueError('a loss with value_loss or next_beta needs batch="rollout"')
        if self.head == "score" and self.batch != "ranked":
            raise ValueError(f'a loss with head="score" needs batch="ranked", not "{self.batch}"')
        if self.batch != "ranked":
            return
        if self.head != "score":
            raise ValueError(f'a loss with batch="ranked" needs head="score", not "{self.head}"')
        if self.needs or self.state:
            further = [*sorted(self.needs), *(["state"] if self.state else [])]
            raise ValueError(f'a loss with batch="ranked" sees scores alone, not {", ".join(further)}')
        if self.log_probs != "sums" or self.takes_sft_weight:
            raise ValueError('a loss with batch="ranked" has no log-probs: log_probs="sums", takes_sft_weight=False')


def _rollout_loss(function: Callable[..., Tensor], advantages: Callable[..., Any], mean: Mean, **fields: Any) -> Loss:
    """A loss of sampled responses, with further fields of Loss."""
    fields = {"needs": {"reference"}, "log_probs": "sums", "takes_sft_weight": False, **fields}
    return Loss(function, batch="rollout", advantages=advantages, mean=mean, **fields)


ADAPTIVE: dict[str, Any] = {"next_beta": online.next_beta}  # the KL is in the rewards, its weight may move
BY_RESPONSE: dict[str, Any] = {"ratios": "responses", **ADAPTIVE}
PAIRS: dict[str, Any] = {"learns_pairs": True, "skips_zero_advantages": True}  # ties make no pair
LOSSES = {
    "sft": Loss(sft_loss, batch="sft", takes_sft_weight=False),
    "dpo": Loss(dpo_loss, batch="pairs", needs={"reference"}),
    "cdpo": Loss(cdpo_loss, batch="pairs", needs={"reference"}),
    "ipo": Loss(ipo_loss, batch="pairs", needs={"reference"}),
    "f_dpo": Loss(f_dpo_loss, batch="pairs", needs={"reference"}),
    "hinge": Loss(hinge_loss, batch="pairs", needs={"reference"}),
    "slic": Loss(slic_loss, batch="pairs", log_probs="sums", takes_sft_weight=False),
    "robust": Loss(robust_loss, batch="pairs", needs={"reference"}),
    "exo": Loss(exo_loss, batch="pairs", needs={"reference"}),
    "nca": Loss(nca_loss, batch="pairs", needs={"reference"}),
    "sppo": Loss(sppo_loss, batch="pairs", needs={"reference"}),
    "apo_zero": Loss(apo_zero_loss, batch="pairs", needs={"reference"}),
    "apo_down": Loss(apo_down_loss, batch="pairs", needs={"reference"}),
    "dpop": Loss(dpop_loss, batch="pairs", needs={"reference"}),
    "cal_dpo": Loss(cal_dpo_loss, batch="pairs", needs={"reference"}),
    "discopop": Loss(discopop_loss, batch="pairs", needs={"reference"}),
    "cpo": Loss(cpo_loss, batch="pairs", log_probs="sums", takes_sft_weight=False),
    "simpo": Loss(simpo_loss, batch="pairs", log_probs="means"),
    "orpo": Loss(orpo_loss, batch="pairs", log_probs="means", takes_sft_weight=False),
    "ln_dpo": Loss(dpo_loss, batch="pairs", needs={"reference"}, log_probs="means"),
    "aot": Loss(aot_loss, batch="pairs", needs={"reference", "whole batch"}),
    "tdpo1": Loss(tdpo1_loss, batch="pairs", needs={"reference", "token kl"}, log_probs="sums"),
    "tdpo2": Loss(tdpo2_loss, batch="pairs", needs={"reference", "token kl"}, log_probs="sums"),
    "wpo": Loss(wpo_loss, batch="pairs", needs={"reference", "confidence"}),
    "ld_dpo": Loss(ld_dpo_loss, batch="pairs", needs={"reference", "shared length"}, log_probs="sums"),
    "beta_dpo": Loss(
        beta_dpo_loss,
        batch="pairs",
        needs={"reference", "whole batch"},
        state=MovingState({"mean_margin": 0.0}, beta_dpo_state),
    ),
    "kto": Loss(kto_loss, batch="unpaired", needs={"reference", "kl"}, log_probs="sums", takes_sft_weight=False),
    "bco": Loss(
        bco_loss,
        batch="unpaired",
        needs={"reference", "whole batch"},
        takes_sft_weight=False,
        state=MovingState({"desirable_mean": 0.0, "undesirable_mean": 0.0}, bco_state),
    ),
    "reward": Loss(reward_loss, batch="ranked", log_probs="sums", takes_sft_weight=False, head="score"),
    "ppo": _rollout_loss(
        online.ppo_loss,
        online.ppo_advantages,
        "tokens",
        needs={"reference", "entropy"},
        compares_group=False,
        value_loss=online.value_loss,
        **ADAPTIVE,
    ),
    "grpo": _rollout_loss(online.grpo_loss, online.grpo_advantages, "responses"),
    "dr_grpo": _rollout_loss(online.grpo_loss, online.dr_grpo_advantages, "max_new_tokens"),
    "dapo": _rollout_loss(online.grpo_loss, online.grpo_advantages, "tokens"),
    "rloo": _rollout_loss(online.rloo_loss, online.rloo_advantages, "sums", **BY_RESPONSE),
    "reinforce_pp": _rollout_loss(
        online.reinforce_pp_loss, online.reinforce_pp_advantages, "tokens", compares_group="either", **ADAPTIVE
    ),
    "remax": _rollout_loss(
        online.rloo_loss, online.remax_advantages, "sums", has_greedy_baseline=True, compares_group=False, **BY_RESPONSE
    ),
    "online_dpo": _rollout_loss(online.online_dpo_loss, online.best_and_worst, "sums", **PAIRS),
    "xpo": _rollout_loss(online.xpo_loss, online.best_and_worst, "sums", **PAIRS, samples_reference=True),
    "best_of_n": _rollout_loss(
        online.best_of_n_loss, online.best_of_n_advantages, "sums", needs=frozenset(), skips_zero_advantages=True
    ),
    "pretrain": Loss(sft_loss, batch="tokens", log_probs="sums", takes_sft_weight=False),
}
