"""From hidden states to one log-prob per response, without ever holding the logits of all tokens.

Only the positions that predict a response token reach the LM head. The head, the log-softmax, the loss and its
gradient are computed for a few groups at a time: as a loss sees log-probs only, its gradient with respect to a
group's logits is known as soon as the group's log-probs are, so the gradients of hidden states and head are made in
the forward pass, with the logits still at hand. That is three matrix products per group instead of four with
recomputation, and memory for one chunk of logits instead of all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from engine.batching import Microbatch, Part
from engine.triton_head import gradient_of_logits, has_triton, normalize

# Tokens whose logits are held at a time. With fewer, matrix products wait for the weights and their gradient, which
# every chunk reads anew; a small vocabulary has room for more.
CHUNK_TOKENS, CHUNK_LOGITS = 512, {"cpu": 2**22, "cuda": 2**26}

# Takes the log-probs of the responses of a part, [responses], and that part; returns the part's share of the loss.
Objective = Callable[[Tensor, Part], Tensor]


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary whose logits a process makes, where the LM head is split among a group."""

    group: dist.ProcessGroup
    first: int  # token of this part
    largest: int  # number of tokens in a part of this group

    def sum(self, values: Tensor) -> Tensor:
        """values summed over the group, in place and in full precision."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        dist.all_reduce(wide, group=self.group)
        return values.copy_(wide)


def response_logps(
    model: PreTrainedModel, batch: Microbatch, objective: Objective | None = None
) -> tuple[Tensor, Tensor]:
    """Run model over batch once. A model whose weights are sharded has them gathered around it.

    Args:
        batch: on the device of the model's LM head.
        objective: the loss, called on parts of the batch that cover it; without it no gradient is made.

    Returns:
        the loss (0 without an objective), a scalar to call backward on, and the sum of the log-probs of each
        response's tokens, [responses], detached; both in fp32, or fp64 for a model in fp64.
    """
    run = getattr(model, "run_sharded", partial(run_model, model))
    return run(batch, objective)


def run_model(model: PreTrainedModel, batch: Microbatch, objective: Objective | None = None) -> tuple[Tensor, Tensor]:
    """response_logps of a model whose weights are at hand."""
    if batch.attention_mask is not None:  # padded: the model's own logits and a plain log-softmax
        head = model.get_output_embeddings()
        with head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),)):
            logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = logits.flatten(0, 1)[batch.predict_index]
        logps = sum_by_response(plain_token_logps(logits, batch.targets), batch.response_lengths)
        loss = logps.new_zeros(()) if objective is None else objective(logps, whole(batch))
        return loss, logps.detach()
    hidden = model.base_model(
        batch.input_ids, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
    ).last_hidden_state
    weight, bias, shard = _own_part(model.get_output_embeddings())
    # Where layers are split among GPUs, the last hidden states may be elsewhere than the head and the batch.
    return chunked_head(hidden[0].to(weight.device), weight, bias, batch, objective, shard)


def _own_part(head: nn.Module) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """What this process has of the LM head: weight, bias, and its place in the vocabulary if that is split."""
    if not isinstance(head.weight, DTensor):
        return head.weight, head.bias, None  # type: ignore[return-value]
    mesh = head.weight.device_mesh
    largest = -(-len(head.weight) // mesh.size())
    shard = VocabularyShard(mesh.get_group(), largest * mesh.get_local_rank(), largest)
    return head.weight.to_local(), None if head.bias is None else head.bias.to_local(), shard  # type: ignore


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
    return torch.segment_reduce(token_logps, "sum", lengths=lengths, unsafe=True)  # a check would wait for the GPU


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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: Microbatch,
    objective: Objective | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the log-probs of all responses from the hidden states of a packed row.

    Args:
        hidden: [tokens, hidden size], after the final norm.
        weight, bias: of the LM head, [vocabulary, hidden size] and [vocabulary] or None.
        shard: of the vocabulary that weight and bias are for; None if they are for all of it.

    Returns:
        as response_logps.
    """
    with_gradient = objective is not None and torch.is_grad_enabled()
    return _ChunkedHead.apply(hidden, weight, bias, batch, objective, with_gradient, shard)


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
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor]:
        # Logits are fp32 (or fp64) whatever the dtype, and come from the weights as they are kept where that is no
        # slower; only the products of the gradients follow the dtype of the hidden states.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        low_weight = weight.to(hidden.dtype)
        wide_weight = low_weight if hidden.is_cuda else weight.to(dtype)
        needs_hidden, needs_weight, needs_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        selected = hidden[batch.predict_index]
        grad_selected = torch.empty_like(selected) if needs_hidden else None
        grad_weight = grad_bias = None
        max_targets = max(CHUNK_TOKENS, CHUNK_LOGITS[hidden.device.type] // (shard.largest if shard else len(weight)))
        buffer = hidden.new_empty(min(max_targets, len(selected)), len(weight), dtype=dtype)
        loss = hidden.new_zeros((), dtype=dtype)
        logps = hidden.new_empty(len(batch.responses), dtype=dtype)

        normalized = _normalize_on_gpu if has_triton(hidden.device) and dtype == torch.float32 else softmax_
        if shard is not None:
            normalized = partial(softmax_of_shards_, shard)

        def log_probs(span: slice) -> tuple[Tensor, GradientOfLogits]:
            logits = _logits(selected[span], wide_weight, bias, buffer[: span.stop - span.start])
            return normalized(logits, batch.targets[span])

        for part in _chunks(batch.groups, max_targets):
            spans = list(_spans(part.targets, max_targets))
            outputs = [log_probs(span) for span in spans]
            token_logps = torch.cat([logps_of_span for logps_of_span, _ in outputs])
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
            for span in spans:
                # The logits of a single group that is too long for the buffer are made again.
                _, gradient = outputs[0] if len(spans) == 1 else log_probs(span)
                # Its scale, the gradient of the loss, goes to the thin side of each product, not to the logits.
                grad_logits = gradient(hidden.dtype)
                scale = grad_logps[batch.response_index[span] - part.responses.start, None]
                if grad_selected is not None:
                    grad_selected[span] = (grad_logits @ low_weight).mul_(scale)
                if needs_weight:
                    scaled = (selected[span] * scale).to(hidden.dtype)
                    grad_weight = _add_product(grad_weight, grad_logits.T, scaled, dtype)
                if needs_bias:
                    grad_bias = _add_product(grad_bias, grad_logits.T, scale.to(hidden.dtype), dtype)
        grad_hidden = None
        if grad_selected is not None:
            if shard is not None:
                shard.sum(grad_selected)
            grad_hidden = torch.zeros_like(hidden).index_add_(0, batch.predict_index, grad_selected)
        ctx.mark_non_differentiable(logps)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias[:, 0].to(bias.dtype),
        )
        return loss, logps

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # autograd may take them as they are, when nobody else has them
        if grad_loss.is_cuda or grad_loss != 1:  # on a GPU a look at the value would wait for all that is queued
            gradients = tuple(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return (*gradients, None, None, None, None)


def _logits(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """inputs @ weight.T + bias in the dtype of out, summed and rounded in no lower one."""
    if inputs.is_cuda and inputs.dtype != out.dtype:
        torch.mm(inputs, weight.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(inputs.to(out.dtype), weight.T, out=out)
    return out if bias is None else out.add_(bias)


# Makes the gradient of the sum of all log-probs, onehot(target) - softmax(logits), in a dtype; may use up the logits.
GradientOfLogits = Callable[[torch.dtype], Tensor]


def softmax_(logits: Tensor, targets: Tensor) -> tuple[Tensor, GradientOfLogits]:
    """The log-probs of targets [tokens], in place in logits [tokens, vocabulary].

    One pass of exponentials, where a logsumexp and a softmax after it take two: the largest probability is the
    reciprocal of the sum.
    """
    largest = logits.amax(-1)
    target_logits = logits.gather(-1, targets[:, None]).squeeze(-1)
    probs = torch.softmax(logits, -1, out=logits)

    def gradient(dtype: torch.dtype) -> Tensor:
        one = probs.new_ones(1, 1).expand(len(targets), 1)
        return probs.neg_().scatter_add_(-1, targets[:, None], one).to(dtype)

    return target_logits - largest + probs.amax(-1).log(), gradient


def softmax_of_shards_(shard: VocabularyShard, logits: Tensor, targets: Tensor) -> tuple[Tensor, GradientOfLogits]:
    """The same for logits [tokens, part of the vocabulary]: no process ever has those of the whole vocabulary."""
    own = targets - shard.first
    is_own = (own >= 0) & (own < logits.shape[-1])
    own = own.where(is_own, 0)[:, None]
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    logits.sub_(largest[:, None])
    target_logits = logits.gather(-1, own).squeeze(-1).where(is_own, 0)
    total, target_logits = shard.sum(torch.stack([logits.exp_().sum(-1), target_logits]))

    def gradient(dtype: torch.dtype) -> Tensor:
        return logits.div_(-total[:, None]).scatter_add_(-1, own, is_own.to(logits.dtype)[:, None]).to(dtype)

    return target_logits - total.log(), gradient


def _normalize_on_gpu(logits: Tensor, targets: Tensor) -> tuple[Tensor, GradientOfLogits]:
    """The same in two Triton kernels, each one trip through memory."""
    normalizer, target_logits = normalize(logits, targets)

    def gradient(dtype: torch.dtype) -> Tensor:
        grad_logits = torch.empty_like(logits, dtype=dtype)
        gradient_of_logits(logits, normalizer, targets, grad_logits)
        return grad_logits

    return target_logits - normalizer, gradient


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right, total in dtype."""
    if total is None:
        return (left @ right).to(dtype)
    if left.dtype == dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def _spans(targets: slice, longest: int) -> Iterator[slice]:
    for start in range(targets.start, max(targets.stop, targets.start + 1), longest):  # one, even if there is none
        yield slice(start, min(start + longest, targets.stop))


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
