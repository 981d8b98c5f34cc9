"""The losses: pure functions of log-probs, and LOSSES, the table that `loss.name` picks from.

A loss sees one log-prob per response and no model, config or tokens, and returns one value per example, unreduced.
To add one: a function here, a line in LOSSES, a YAML under config/loss whose other keys are its keyword arguments,
and a test with values computed by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct Preference Optimization, and its conservative form.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with label_smoothing, equation 3 of Mitchell 2023, "A note
    on DPO with noisy preferences & relationship to IPO" (cDPO).

    Args:
        policy_chosen_logps: log-probs of the chosen responses under the policy, [pairs]; the others likewise.
        beta: strength of the implicit KL constraint, above 0.
        label_smoothing: share of the preferences assumed to be flipped, in [0, 0.5).
        reference_free: a uniform reference: the reference log-probs are not used.

    Returns:
        losses [pairs], and the implicit rewards beta * log(policy / reference) of the chosen and of the rejected
        responses [pairs], detached.
    """
    chosen_logratios, rejected_logratios = policy_chosen_logps, policy_rejected_logps
    if not reference_free:
        chosen_logratios = policy_chosen_logps - reference_chosen_logps
        rejected_logratios = policy_rejected_logps - reference_rejected_logps
    logits = beta * (chosen_logratios - rejected_logratios)
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Identity Preference Optimization: Azar et al. 2023 (arXiv 2310.12036), equation 17, where beta is called tau.

    Takes and returns what dpo_loss does; [pairs] throughout.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def sft_loss(policy_chosen_logps: Tensor) -> Tensor:
    """Negative log-likelihood of each target response, [examples] -> [examples]."""
    return -policy_chosen_logps


@dataclass(frozen=True)
class Loss:
    """What the trainer must know of a loss.

    Args:
        function: takes log-probs in order (chosen; rejected for pairs; then both under the reference where
            needs_reference), and as keywords the keys of its YAML.
        batch: "sft" (one target response per prompt) or "pairs" (chosen and rejected).
        needs_reference: whether a frozen reference model is built for it.
    """

    function: Callable
    batch: Literal["sft", "pairs"]
    needs_reference: bool = False


LOSSES = {
    "sft": Loss(sft_loss, batch="sft"),
    "dpo": Loss(dpo_loss, batch="pairs", needs_reference=True),
    "cdpo": Loss(dpo_loss, batch="pairs", needs_reference=True),
    "ipo": Loss(ipo_loss, batch="pairs", needs_reference=True),
}
