"""Numbers of each target token beside its log-prob, for losses with further needs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceHead(NamedTuple):
    """The live reference's distribution at each target: hidden states, and the LM head.

    Args:
        selected: hidden states at the predicting positions, after the final norm, [targets, hidden size].
        weight, bias, low_weight: of the LM head, as for logprobs.chunked_head.
    """

    selected: Tensor
    weight: Tensor
    bias: Tensor | None
    low_weight: Tensor | None = None


@dataclass(frozen=True)
class TokenNeeds:
    """What a loss reads of each target beside its log-prob, as columns [targets].

    Args:
        confidence: whether to give the column "confidence", log(p(target) / sum of squared probabilities). It has no
            gradient.
        reference: gives the columns "reference", the log-prob under the reference, without gradient, and "kl",
            KL(reference || policy) over the vocabulary, with gradient. A head if packed; logits [targets, vocabulary]
            if padded.
        entropy: whether to give the column "entropy", of the policy's distribution, with gradient. Not beside a
            reference.
        temperature: divides the logits. Log-probs are those of sampling at it.
    """

    confidence: bool = False
    reference: ReferenceHead | Tensor | None = None
    temperature: float = 1.0
    entropy: bool = False


NO_NEEDS = TokenNeeds()
DIFFERENTIABLE = ("kl", "entropy")  # columns with gradient


def plain_token_columns(logits: Tensor, targets: Tensor, needs: TokenNeeds) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of targets, and the columns of needs, by autograd.

    Args:
        logits: of the policy, [targets, vocabulary].
        targets: int64 [targets].

    Returns:
        all [targets], in fp32 or fp64.
    """
    if needs.temperature != 1:
        logits = logits / needs.temperature
    logps, columns = _log_softmax(logits), dict[str, Tensor]()
    of_targets = logps.gather(-1, targets[:, None]).squeeze(-1)
    if needs.confidence:
        columns["confidence"] = of_targets.detach() - (2 * logps.detach()).logsumexp(-1)
    if needs.entropy:
        columns["entropy"] = -(logps.exp() * logps).sum(-1)
    if needs.reference is not None:
        reference = _log_softmax(_plain_logits(needs.reference)).detach().to(logps.dtype)
        columns["reference"] = reference.gather(-1, targets[:, None]).squeeze(-1)
        columns["kl"] = (reference.exp() * (reference - logps)).sum(-1)
    return of_targets, columns


def _plain_logits(reference: ReferenceHead | Tensor) -> Tensor:
    if isinstance(reference, Tensor):
        return reference
    dtype = torch.promote_types(reference.weight.dtype, torch.float32)
    logits = reference.selected.to(dtype) @ reference.weight.to(dtype).T
    return logits if reference.bias is None else logits + reference.bias


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
