"""Token log-probs from hidden states, without the logits of all tokens.

Only positions with a target reach the LM head. Head, log-softmax, loss and gradients are computed for a few groups at
a time. The objective sees log-probs only, so the log-probs of a group are enough for its gradient. It is computed in
the forward pass, with the logits still at hand. This takes three matrix products per group, where recomputation takes
four, and memory for one chunk of logits. Further columns that a loss needs of each token come from the same logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.models.wide_products import add_product, copy_for_products, takes_low_weight, wide_product
from engine.step.head_kernels import gradient_of_logits, has_triton, normalize
from engine.step.layout import GroupSpan, Microbatch
from engine.step.token_needs import DIFFERENTIABLE, NO_NEEDS, ReferenceHead, TokenNeeds, plain_token_columns

# Tokens of a chunk of logits, at least; a small vocabulary has room for more. Every chunk reads the weights and their
# gradient anew, and with few tokens the matrix products would wait for memory.
CHUNK_TOKENS, CHUNK_LOGITS = 512, {"cpu": 2**22, "cuda": 2**26, "large cuda": 2**28}
NUM_COMPARED = 3  # tensors of a chunk beside a reference: log-probs of both models, and their differences
NUM_OF_ENTROPY = 3  # tensors of a chunk with entropies: log-probs, probabilities, and their products
LARGE_MEMORY = 40 * 10**9  # bytes of a GPU with room for large chunks

# Takes the token log-probs of a span of groups, [targets of the span], the span, and the columns of TokenNeeds as
# keywords, [targets of the span] each. Returns its share of the loss, a scalar.
SpanLoss = Callable[..., Tensor]

# Takes a dtype. Returns the gradient of the sum of log-probs, onehot(target) - softmax(logits), [targets, vocabulary].
# It may overwrite the logits.
GradientOfLogits = Callable[[torch.dtype], Tensor]


class TokenOutput(NamedTuple):
    """What a head gives of a slice of targets.

    Args:
        logps: log-probs of the targets, [targets].
        columns: of TokenNeeds, [targets] each.
        gradient: takes a dtype, and gradients of the loss with respect to logps and the differentiable column if there
            is one, [targets, 1] each. Returns
            gradients of the logits [targets, columns], and a factor of their rows [targets, 1]. It may overwrite the
            logits.
    """

    logps: Tensor
    columns: dict[str, Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class VocabularyShard:
    """A rank's slice of the vocabulary, if a group splits the head."""

    group: dist.ProcessGroup
    first: int  # first token of the slice
    largest: int  # tokens in the largest slice of the group

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the group, in place and in full precision."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        dist.all_reduce(wide, group=self.group)
        return values.copy_(wide)


def chunk_logits(device_type: str, memory: int) -> int:
    """Logits of a chunk on a device with this many bytes of memory."""
    return CHUNK_LOGITS["large cuda" if device_type == "cuda" and memory >= LARGE_MEMORY else device_type]


def sum_by_response(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums of token_logps [targets] over the tokens of each response, [responses]."""
    # Not index_add: on a GPU its order, and so the last bits, change from run to run.
    return torch.segment_reduce(token_logps, "sum", lengths=lengths, unsafe=True)  # a check would wait for the GPU


def plain_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: Microbatch,
    span_loss: SpanLoss,
    needs: TokenNeeds = NO_NEEDS,
) -> tuple[Tensor, Tensor]:
    """The readable twin of chunked_head, for tests."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    logits = hidden[batch.predict_index].to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias
    logps, columns = plain_token_columns(logits, batch.targets, needs)
    return span_loss(logps, batch.span, **columns), logps.detach()


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: Microbatch,
    span_loss: SpanLoss | None = None,
    shard: VocabularyShard | None = None,
    low_weight: Tensor | None = None,
    needs: TokenNeeds = NO_NEEDS,
) -> tuple[Tensor, Tensor]:
    """Loss and token log-probs of a packed row, from its hidden states.

    Args:
        hidden: [tokens, hidden size], after the final norm.
        weight, bias: of the LM head, [vocabulary, hidden size] and [vocabulary] or None.
        shard: the slice of the vocabulary of weight and bias; None for all of it.
        low_weight: copy_for_products() of weight in the dtype of hidden; None to make it here.
        needs: columns for span_loss. The reference has the same slice of the vocabulary.

    Returns:
        the same as run_head().
    """
    with_gradient = span_loss is not None and torch.is_grad_enabled()
    return _ChunkedHead.apply(hidden, weight, bias, batch, span_loss, with_gradient, shard, low_weight, needs)


class _HeadInChunks:
    """Computes log-probs of some targets at a time, in one buffer.

    Logits are fp32 (or fp64) whatever the dtype. They come from the weights as stored, except where products of low
    dtype with wide sums are faster: on a GPU, and on a CPU with matrix units.

    Args:
        selected: hidden states at the predicting positions, [targets, hidden size].
        weight, bias, shard, low_weight: as for chunked_head.
        targets: int64 [targets].
        num_buffers: tensors of the buffer's size that share the memory for one.
    """

    def __init__(
        self,
        selected: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: VocabularyShard | None,
        low_weight: Tensor | None,
        num_buffers: int = 1,
    ):
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        # For the gradients' products. On a GPU it has more rows than weight, for speed.
        self.low_weight = copy_for_products(weight, selected.dtype) if low_weight is None else low_weight
        is_low = takes_low_weight(selected.device, selected.dtype)
        self._weight = self.low_weight if is_low else weight.to(self.dtype)
        self._selected, self._bias, self._targets, self._vocabulary = selected, bias, targets, len(weight)
        self._shard = shard
        limit = chunk_logits(selected.device.type, _memory_limit(selected.device)) // num_buffers
        self.max_targets = max(CHUNK_TOKENS, limit // (shard.largest if shard else len(weight)))
        rows = min(self.max_targets, len(selected))
        self._buffer = selected.new_empty(rows, len(self._weight), dtype=self.dtype)
        self._has_kernels = has_triton(selected.device) and self.dtype == torch.float32 and shard is None
        self._normalize = _normalize_on_gpu if self._has_kernels else softmax_
        if shard is not None:
            self._normalize = partial(softmax_of_shards_, shard)

    def log_probs(self, targets: slice) -> tuple[Tensor, GradientOfLogits]:
        """Log-probs of a slice of targets, and their gradient.

        The gradient is valid until the next call. It has a column for each row of low_weight.
        """
        return self._normalize(self._logits(targets), self._targets[targets])

    def confidence(self, targets: slice, logps: Tensor) -> Tensor:
        """log(p(target) / sum of squared probabilities) of the last targets, before their gradient is taken.

        Args:
            logps: of log_probs().
        """
        probs = self._buffer[: targets.stop - targets.start]  # up to a factor of each row
        if self._has_kernels:  # they leave the logits
            target_logits = probs.gather(-1, self._targets[targets, None])
            probs = (probs - (target_logits - logps[:, None])).exp_()
        sums = torch.stack([torch.linalg.vector_norm(probs, dim=-1).square(), probs.sum(-1)])
        squares, total = self._sum(sums)
        return logps - (squares.log() - 2 * total.log())

    def log_softmax(self, targets: slice) -> Tensor:
        """Log-probs of all tokens, [targets of the slice, rows of low_weight]; valid until the next call."""
        logits = self._logits(targets)
        if self._shard is None:
            return torch.log_softmax(logits, -1, out=logits)
        largest = logits.amax(-1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._shard.group)
        logits.sub_(largest)
        return logits.sub_(self._sum(logits.exp().sum(-1, keepdim=True)).log())

    def compare(self, reference: "_HeadInChunks", targets: slice, with_confidence: bool) -> TokenOutput:
        """Log-probs of a slice of targets, and how far the reference's distributions are.

        The gradient is valid until the next call.
        """
        logps = self.log_softmax(targets)
        reference_logps = reference.log_softmax(targets).to(logps.dtype)
        local, is_local = self._local_targets(targets)

        def of_targets(values: Tensor) -> Tensor:
            return self._sum(values.gather(-1, local).where(is_local, 0)).squeeze(-1)

        target_logps = of_targets(logps)
        columns = {"reference": of_targets(reference_logps)}
        differences = reference_logps - logps
        differences[:, self._vocabulary :] = 0  # of two -inf
        probs, reference_probs = logps.exp_(), reference_logps.exp_()
        # The sum of probs - reference_probs is 0. It cancels the rounding errors of the two normalizers.
        terms = differences.mul_(reference_probs).add_(probs).sub_(reference_probs)
        columns["kl"] = self._sum(terms.sum(-1))
        if with_confidence:
            squares = torch.linalg.vector_norm(probs, dim=-1).square()
            columns["confidence"] = target_logps - self._sum(squares).log()

        def gradient(dtype: torch.dtype, grad_logps: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor]:
            # grad_logps * (onehot - probs) + grad_kl * (probs - reference_probs), with the larger one as a factor: low
            # dtypes would lose small products.
            scale = torch.maximum(grad_logps.abs(), grad_kl.abs()).clamp_(min=torch.finfo(grad_kl.dtype).tiny)
            of_logps, of_kl = grad_logps / scale, grad_kl / scale
            grad_logits = probs.mul_(of_kl - of_logps).addcmul_(reference_probs, of_kl, value=-1)
            return grad_logits.scatter_add_(-1, local, of_logps.where(is_local, 0)).to(dtype), scale

        return TokenOutput(target_logps, columns, gradient)

    def with_entropies(self, targets: slice) -> TokenOutput:
        """Log-probs of a slice of targets, and entropies of their distributions.

        The gradient is valid until the next call.
        """
        logps = self.log_softmax(targets)
        local, is_local = self._local_targets(targets)
        target_logps = self._sum(logps.gather(-1, local).where(is_local, 0)).squeeze(-1)
        probs = logps.exp()
        logps[:, self._vocabulary :] = 0  # of probabilities 0
        entropies = -self._sum((probs * logps).sum(-1, keepdim=True))  # [targets, 1]

        def gradient(dtype: torch.dtype, grad_logps: Tensor, grad_entropies: Tensor) -> tuple[Tensor, Tensor]:
            # grad_logps * (onehot - probs) - grad_entropies * probs * (logps + entropies), scaled as in compare().
            tiny = torch.finfo(grad_logps.dtype).tiny
            scale = torch.maximum(grad_logps.abs(), grad_entropies.abs()).clamp_(min=tiny)
            of_logps, of_entropies = grad_logps / scale, grad_entropies / scale
            factors = logps.add_(entropies).mul_(-of_entropies).sub_(of_logps)
            return factors.mul_(probs).scatter_add_(-1, local, of_logps.where(is_local, 0)).to(dtype), scale

        return TokenOutput(target_logps, {"entropy": entropies.squeeze(-1)}, gradient)

    def _logits(self, targets: slice) -> Tensor:
        """Logits of a slice of targets, in the buffer."""
        logits = self._buffer[: targets.stop - targets.start]
        wide_product(self._selected[targets], self._weight, logits)
        if self._bias is not None:
            logits[:, : self._vocabulary] += self._bias
        if logits.shape[1] > self._vocabulary:
            logits[:, self._vocabulary :] = -torch.inf  # no token: its probability and gradient are 0
        return logits

    def _local_targets(self, targets: slice) -> tuple[Tensor, Tensor]:
        """Columns of a slice of targets, and whether this rank has them, [targets, 1] each."""
        first = self._shard.first if self._shard else 0
        local = self._targets[targets, None] - first
        is_local = (local >= 0) & (local < self._vocabulary)
        return local.where(is_local, 0), is_local

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks with the other slices of the vocabulary, in place."""
        return values if self._shard is None else self._shard.sum(values)


def _head_outputs(
    head: _HeadInChunks, needs: TokenNeeds, batch: Microbatch, shard: VocabularyShard | None
) -> Callable[[slice], TokenOutput]:
    """A function: a slice of targets -> what the head gives of them."""
    if needs.reference is not None:
        assert isinstance(needs.reference, ReferenceHead)
        selected, weight, bias, low_weight = needs.reference
        reference = _HeadInChunks(selected, weight, bias, batch.targets, shard, low_weight, NUM_COMPARED)
        return lambda targets: head.compare(reference, targets, needs.confidence)

    if needs.entropy:
        return head.with_entropies

    def outputs(targets: slice) -> TokenOutput:
        logps, gradient = head.log_probs(targets)
        columns = {"confidence": head.confidence(targets, logps)} if needs.confidence else {}
        return TokenOutput(logps, columns, lambda dtype, grad_logps: (gradient(dtype), grad_logps))

    return outputs


class _HeadGradients:
    """Sums the gradients of a head over slices of targets.

    Args:
        selected: hidden states at the predicting positions, [targets, hidden size].
        low_weight: in the dtype of selected, [columns, hidden size].
        dtype: of the sums for weight and bias.
        needs: a gradient of hidden states, weight, bias.
    """

    def __init__(self, selected: Tensor, low_weight: Tensor, dtype: torch.dtype, needs: tuple[bool, bool, bool]):
        self._selected, self._low_weight, self._dtype = selected, low_weight, dtype
        needs_hidden, self._needs_weight, self._needs_bias = needs
        self.are_needed = any(needs)
        self._grad_selected = torch.empty_like(selected) if needs_hidden else None
        self._grad_weight: Tensor | None = None
        self._grad_bias: Tensor | None = None

    def add(self, targets: slice, grad_logits: Tensor, scale: Tensor) -> None:
        """Add the gradients of a slice of targets.

        Args:
            grad_logits: of the sum of log-probs, [targets of the slice, columns].
            scale: gradient of the loss with respect to each log-prob, [targets of the slice, 1]. It scales the thin
                side of each product, not the logits.
        """
        low_dtype = self._selected.dtype
        if self._grad_selected is not None:
            self._grad_selected[targets] = (grad_logits @ self._low_weight).mul_(scale)
        if self._needs_weight:
            scaled = (self._selected[targets] * scale).to(low_dtype)
            self._grad_weight = add_product(self._grad_weight, grad_logits.T, scaled, self._dtype)
        if self._needs_bias:
            self._grad_bias = add_product(self._grad_bias, grad_logits.T, scale.to(low_dtype), self._dtype)

    def finish(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Microbatch, shard: VocabularyShard | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the shapes and dtypes of hidden, weight and bias."""
        grad_hidden = None
        if self._grad_selected is not None:
            if shard is not None:
                shard.sum(self._grad_selected)
            grad_hidden = scatter_selected(self._grad_selected, hidden, batch)
        grad_weight, grad_bias = self._grad_weight, self._grad_bias
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight[: len(weight)].to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias[: len(bias), 0].to(bias.dtype),
        )


def scatter_selected(grad_selected: Tensor, hidden: Tensor, batch: Microbatch) -> Tensor:
    """The gradient of hidden [tokens, hidden size] from that of hidden[batch.predict_index].

    The last position of a prompt predicts the first token of each response. Sums over a prompt's responses are taken
    in their order. index_add_ would take them in any order on a GPU.
    """
    grad_hidden = torch.zeros_like(hidden)
    if not len(grad_selected):
        return grad_hidden
    first_targets = batch.response_lengths.cumsum(0) - batch.response_lengths  # [responses]
    first_responses = batch.num_responses.cumsum(0) - batch.num_responses  # [groups]
    wide = torch.promote_types(grad_selected.dtype, torch.float32)
    sums = torch.segment_reduce(
        grad_selected[first_targets].to(wide), "sum", lengths=batch.num_responses, axis=0, unsafe=True
    )
    last_of_prompts = batch.predict_index[first_targets[first_responses]]
    grad_hidden.index_copy_(0, batch.predict_index, grad_selected)
    return grad_hidden.index_copy_(0, last_of_prompts, sums.to(hidden.dtype))  # over one of the summands


class _ChunkedHead(torch.autograd.Function):
    """chunked_head() with its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: Microbatch,
        span_loss: SpanLoss | None,
        with_gradient: bool,
        shard: VocabularyShard | None,
        low_weight: Tensor | None,
        needs: TokenNeeds,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        selected = hidden[batch.predict_index]
        num_buffers = NUM_COMPARED if needs.reference is not None else NUM_OF_ENTROPY if needs.entropy else 1
        head = _HeadInChunks(selected, weight, bias, batch.targets, shard, low_weight, num_buffers)
        outputs_of = _head_outputs(head, needs, batch, shard)
        gradients = _HeadGradients(selected, head.low_weight, head.dtype, (needs_hidden, needs_weight, needs_bias))
        loss = hidden.new_zeros((), dtype=head.dtype)
        logps = hidden.new_empty(len(selected), dtype=head.dtype)
        for span in _chunks(batch.groups, head.max_targets):
            slices = list(_slices(span.targets, head.max_targets))
            outputs = [outputs_of(targets) for targets in slices]
            span_logps = logps[span.targets] = torch.cat([output.logps for output in outputs])
            if span_loss is None:
                continue
            columns = {name: torch.cat([output.columns[name] for output in outputs]) for name in outputs[0].columns}
            differentiable = [span_logps, *(columns[name] for name in DIFFERENTIABLE if name in columns)]
            for column in differentiable:
                column.requires_grad_()
            with torch.enable_grad():
                loss_of_span = span_loss(span_logps, span, **columns)
                loss += loss_of_span.detach()
            if not gradients.are_needed:
                continue
            grad_columns = torch.autograd.grad(loss_of_span, differentiable)
            for targets in slices:
                # Several slices: one group too long for the buffer. Its logits are recomputed.
                output = outputs[0] if len(slices) == 1 else outputs_of(targets)
                within = slice(targets.start - span.targets.start, targets.stop - span.targets.start)
                gradients.add(targets, *output.gradient(hidden.dtype, *(each[within, None] for each in grad_columns)))
        ctx.mark_non_differentiable(logps)
        ctx.gradients = gradients.finish(hidden, weight, bias, batch, shard)
        return loss, logps

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd may use the tensors themselves if nothing else refers to them.
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss.is_cuda or grad_loss != 1:  # reading the value on a GPU would wait for the queue
            gradients = tuple(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return (*gradients, None, None, None, None, None, None)


def softmax_(logits: Tensor, targets: Tensor) -> tuple[Tensor, GradientOfLogits]:
    """Log-probs of targets [targets], in place in logits [targets, vocabulary].

    One pass of exponentials: the largest probability is the reciprocal of their sum. A logsumexp and a softmax would
    take two.
    """
    largest = logits.amax(-1)
    target_logits = logits.gather(-1, targets[:, None]).squeeze(-1)
    probs = torch.softmax(logits, -1, out=logits)

    def gradient(dtype: torch.dtype) -> Tensor:
        one = probs.new_ones(1, 1).expand(len(targets), 1)
        return probs.neg_().scatter_add_(-1, targets[:, None], one).to(dtype)

    return target_logits - largest + probs.amax(-1).log(), gradient


def softmax_of_shards_(shard: VocabularyShard, logits: Tensor, targets: Tensor) -> tuple[Tensor, GradientOfLogits]:
    """softmax_() for logits [targets, slice of the vocabulary].

    No rank ever has all logits.
    """
    local_targets = targets - shard.first
    is_local = (local_targets >= 0) & (local_targets < shard.largest)
    local_targets = local_targets.where(is_local, 0)[:, None]
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    logits.sub_(largest[:, None])
    target_logits = logits.gather(-1, local_targets).squeeze(-1).where(is_local, 0)
    total, target_logits = shard.sum(torch.stack([logits.exp_().sum(-1), target_logits]))

    def gradient(dtype: torch.dtype) -> Tensor:
        one = is_local.to(logits.dtype)[:, None]
        return logits.div_(-total[:, None]).scatter_add_(-1, local_targets, one).to(dtype)

    return target_logits - total.log(), gradient


def _normalize_on_gpu(logits: Tensor, targets: Tensor) -> tuple[Tensor, GradientOfLogits]:
    """softmax_() in two Triton kernels, each one trip through memory."""
    normalizer, target_logits = normalize(logits, targets)

    def gradient(dtype: torch.dtype) -> Tensor:
        grad_logits = torch.empty_like(logits, dtype=dtype)
        gradient_of_logits(logits, normalizer, targets, grad_logits)
        return grad_logits

    return target_logits - normalizer, gradient


def _memory_limit(device: torch.device) -> int:
    """Bytes of memory this process may use on a GPU; 0 on other devices."""
    if device.type != "cuda":
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def _slices(targets: slice, longest: int) -> Iterator[slice]:
    # An empty range gives one empty slice.
    for start in range(targets.start, max(targets.stop, targets.start + 1), longest):
        yield slice(start, min(start + longest, targets.stop))


def _chunks(groups: list[GroupSpan], max_targets: int) -> Iterator[GroupSpan]:
    """Join consecutive groups into spans of at most max_targets targets.

    A longer group is a span by itself.
    """
    first = groups[0]
    last = first
    for group in groups[1:]:
        if group.targets.stop - first.targets.start > max_targets:
            yield _join(first, last)
            first = group
        last = group
    yield _join(first, last)


def _join(first: GroupSpan, last: GroupSpan) -> GroupSpan:
    return GroupSpan(
        targets=slice(first.targets.start, last.targets.stop),
        responses=slice(first.responses.start, last.responses.stop),
        examples=slice(first.examples.start, last.examples.stop),
    )
