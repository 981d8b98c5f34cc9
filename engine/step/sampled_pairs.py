"""Losses of pairs of sampled responses: any of LOSSES that reads log-probs of responses alone."""

from typing import Any

from torch import Tensor

from engine.settings.keys import keyword_names
from engine.settings.schema import LossSettings
from losses import LOSSES
from online_losses import PairLoss, SampledPairs


def pair_loss_of(settings: LossSettings) -> PairLoss:
    """The loss chosen by the keys pair_loss and pair_options."""
    loss = LOSSES[settings.keywords["pair_loss"]]
    options: dict[str, Any] = dict(settings.keywords["pair_options"] or {})
    averages = options.pop("average_log_prob", False) or loss.log_probs == "means"
    sft_weight = options.pop("sft_weight", 0.0)
    takes_beta = "beta" in keyword_names(loss.function)

    def losses_of(pairs: SampledPairs, beta: float) -> Tensor:
        logps = [pairs.policy_better, pairs.policy_worse]
        if "reference" in loss.needs:
            logps += [pairs.reference_better, pairs.reference_worse]
        if averages:
            lengths = (pairs.better_lengths, pairs.worse_lengths) * 2
            logps = [sums / each for sums, each in zip(logps, lengths, strict=False)]
        losses, *_ = loss.function(*logps, **options, **({"beta": beta} if takes_beta else {}))
        if sft_weight:
            losses = losses - sft_weight * pairs.policy_better / pairs.better_lengths
        return losses

    return losses_of
