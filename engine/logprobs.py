"""From hidden states to one log-prob per response, without ever holding the logits of all tokens.

Only the positions that predict a response token reach the LM head. The head, the log-softmax, the loss and its
gradient are computed for a few groups at a time: as a loss sees log-probs only, its gradient with respect to a
group's logits is known as soon as the group's log-probs are, so the gradients of hidden states and head are made in
the forward pass, with the logits still at hand. That is three matrix products per group instead of four with
recomputation, and memory for one chunk of logits instead of all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.batching import Microbatch, Part

# Logits that are held at a time: 2**22 are 16 MiB in fp32, which a CPU keeps in its last cache.
CHUNK_LOGITS = 2**22

# Takes the log-probs of the responses of a part, [responses], and that part; returns the part's share of the loss.
Objective = Callable[[Tensor, Part], Tensor]


def response_logps(
    model: PreTrainedModel, batch: Microbatch, objective: Objective | None = None
) -> tuple[Tensor, Tensor]:
    """Run model over batch once.

    Args:
        batch: on the device of the model's LM head.
        objective: the loss, called on parts of the batch that cover it; without it no gradient is made.

    Returns:
        the loss (0 without an objective), a scalar to call backward on, and the sum of the log-probs of each
        response's tokens, [responses], detached; both in fp32, or fp64 for a model in fp64.
    """
    if batch.attention_mask is not None:  # padded: the model's own logits and a plain log-softmax
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = logits.flatten(0, 1)[batch.predict_index]
        logps = sum_by_response(plain_token_logps(logits, batch.targets), batch.response_lengths)
        loss = logps.new_zeros(()) if objective is None else objective(logps, whole(batch))
        return loss, logps.detach()
    hidden = model.base_model(
        batch.input_ids, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
    ).last_hidden_state
    head = model.get_output_embeddings()
    # Where layers are split among GPUs, the last hidden states may be elsewhere than the head and the batch.
    return chunked_head(hidden[0].to(head.weight.device), head.weight, head.bias, batch, objective)


def whole(batch: Microbatch) -> Part:
    """The part that is all of a batch."""
    return Part(slice(0, len(batch.targets)), slice(0, len(batch.responses)), slice(0, batch.num_examples))


def plain_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of targets [targets] under logits [targets, vocabulary], in fp32 or more: the readable version."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def sum_by_response(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums of token_logps [targets] over the tokens of each response, [responses]."""
    # Not index_add, whose order on a GPU, and so its last bits, changes from run to run.
    return torch.segment_reduce(token_logps, "sum", lengths=lengths)


def plain_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Microbatch, objective: Objective
) -> tuple[Tensor, Tensor]:
    """What chunked_head computes, in the plainest way: the readable twin that it is tested against."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    logits = hidden[batch.predict_index].to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias
    logps = sum_by_response(plain_token_logps(logits, batch.targets), batch.response_lengths)
    return objective(logps, whole(batch)), logps.detach()


def chunked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Microbatch, objective: Objective | None = None
) -> tuple[Tensor, Tensor]:
    """The loss and the log-probs of all responses from the hidden states of a packed row.

    Args:
        hidden: [tokens, hidden size], after the final norm.
        weight, bias: of the LM head, [vocabulary, hidden size] and [vocabulary] or None.

    Returns:
        as response_logps.
    """
    with_gradient = objective is not None and torch.is_grad_enabled()
    return _ChunkedHead.apply(hidden, weight, bias, batch, objective, with_gradient)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: Microbatch,
        objective: Objective | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        # Log-probs are made in fp32 (or fp64) from the weights as they are kept; only the products of the gradients
        # follow the lower dtype of autocast or of the weights.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device_type = hidden.device.type
        gradient_dtype = weight.dtype
        if torch.is_autocast_enabled(device_type):
            gradient_dtype = torch.get_autocast_dtype(device_type)
        needs_hidden, needs_weight, needs_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        with torch.autocast(device_type, enabled=False):
            selected = hidden[batch.predict_index]
            grad_selected = torch.empty_like(selected) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias and bias is not None else None
            low_weight = weight.to(gradient_dtype)
            parts = list(_chunks(batch.groups, max(1, CHUNK_LOGITS // weight.shape[0])))
            longest = max(part.targets.stop - part.targets.start for part in parts)
            buffer = hidden.new_empty(longest, weight.shape[0], dtype=dtype)
            loss = hidden.new_zeros((), dtype=dtype)
            logps = hidden.new_empty(len(batch.responses), dtype=dtype)
            for part in parts:
                inputs = selected[part.targets]
                targets = batch.targets[part.targets, None]
                response_index = batch.response_index[part.targets] - part.responses.start
                logits = _logits(inputs, weight, bias, buffer[: len(inputs)])
                normalizer = logits.logsumexp(-1, keepdim=True)
                token_logps = (logits.gather(-1, targets) - normalizer).squeeze(-1)
                part_logps = sum_by_response(token_logps, batch.response_lengths[part.responses])
                logps[part.responses] = part_logps
                if objective is None:
                    continue
                part_logps.requires_grad_()
                with torch.enable_grad():
                    part_loss = objective(part_logps, part)
                    loss += part_loss.detach()
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                (grad_logps,) = torch.autograd.grad(part_loss, part_logps)
                grad_tokens = grad_logps[response_index, None]  # [targets of the part, 1]
                # d logp(target) / d logits = onehot(target) - softmax(logits), in the buffer of the logits.
                grad_logits = logits.sub_(normalizer).exp_().mul_(-grad_tokens).scatter_add_(-1, targets, grad_tokens)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                low = grad_logits.to(gradient_dtype)
                if grad_selected is not None:
                    grad_selected[part.targets] = low @ low_weight
                if grad_weight is not None:
                    grad_weight += low.T @ inputs.to(gradient_dtype)
            grad_hidden = None
            if grad_selected is not None:
                grad_hidden = torch.zeros_like(hidden).index_add_(0, batch.predict_index, grad_selected)
        ctx.mark_non_differentiable(logps)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss, logps

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.gradients)
        return (*gradients, None, None, None)


def _logits(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """inputs @ weight.T + bias in the dtype of out; a low-precision weight is widened a slice at a time."""
    inputs = inputs.to(out.dtype)
    if weight.dtype == out.dtype:
        torch.mm(inputs, weight.T, out=out)
    else:
        rows = max(1, CHUNK_LOGITS // (4 * weight.shape[1]))
        for start in range(0, weight.shape[0], rows):
            out[:, start : start + rows] = inputs @ weight[start : start + rows].to(out.dtype).T
    return out if bias is None else out.add_(bias)


def _chunks(groups: list[Part], max_targets: int) -> Iterator[Part]:
    """Join groups that follow one another into parts of at most max_targets targets; a longer group is its own."""
    first = groups[0]
    last = first
    for group in groups[1:]:
        if group.targets.stop - first.targets.start > max_targets:
            yield _join(first, last)
            first = group
        last = group
    yield _join(first, last)


def _join(first: Part, last: Part) -> Part:
    return Part(
        targets=slice(first.targets.start, last.targets.stop),
        responses=slice(first.responses.start, last.responses.stop),
        examples=slice(first.examples.start, last.examples.stop),
    )
