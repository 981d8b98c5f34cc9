"""How far two models are apart on given responses."""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.step.heads import run_head
from engine.step.layout import GroupSpan, Microbatch
from engine.step.logprobs import sum_by_response
from engine.step.reference import LiveReference
from engine.step.token_needs import TokenNeeds


class Divergence(NamedTuple):
    """Of each response, [responses] each.

    Args:
        logratios: log(first / second) of the response. Over samples of the first model, its mean is the KL divergence.
        next_token_kls: KL(first || second) of the next token, summed over the response. Over samples of the first
            model it has the same mean, and a smaller variance. None without both distributions.
    """

    logratios: Tensor
    next_token_kls: Tensor | None


@torch.no_grad()
def compare(first: LiveReference, second: LiveReference, batch: Microbatch) -> Divergence:
    """Run two models over a microbatch. They may be one model, with its adapters on and off."""
    logratios: list[Tensor] = []
    kls: list[Tensor] = []

    def keep(token_logps: Tensor, span: GroupSpan, **columns: Tensor) -> Tensor:
        logratios.append(columns["reference"] - token_logps)
        kls.append(columns["kl"])
        return token_logps.new_zeros(())

    with first.distributions(batch) as distributions, second.in_mixed_precision(), second.as_reference():
        run_head(second.model, batch, keep, TokenNeeds(reference=distributions))
    sums = (sum_by_response(torch.cat(values), batch.response_lengths) for values in (logratios, kls))
    return Divergence(*sums)
