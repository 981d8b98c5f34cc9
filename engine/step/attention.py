"""Attention over packed rows.

A response sees its prompt and itself, no sibling and no other group.

Transformers calls it by a registered name, `packed`. Models pass `segments` through from their call to it.

packed: one response at a time on a CPU, one kernel for the row on a GPU.
packed_dense: builds the full mask. It is the readable twin, and every other version is tested against it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from engine.step.attention_kernels import (
    Capability,
    VariableLengths,
    efficient_attention,
    efficient_runs,
    flash_attention,
    flash_runs,
)
from utils import to_device

# Queries of a block. Larger tiles waste work on masked keys, smaller ones make small matrix products.
BLOCK = 64

# Kernels for a GPU, the quickest first. Where none of them runs, packed() computes by blocks.
GPU_KERNELS: tuple[str, ...] = ("flash", "efficient")


@dataclass(frozen=True)
class Block:
    """A tile of queries, and the keys up to its last query."""

    rows: slice  # of the packed row
    keys: slice  # of the branch


@dataclass(frozen=True)
class Branch:
    """A prompt and one of its responses in the packed row.

    The first response follows the prompt, and its branch takes the prompt's queries too.
    """

    prompt: slice
    response: slice
    is_first: bool
    rows: slice  # queries of this branch
    num_keys: int
    is_last: bool  # of its prompt

    @property
    def new_keys(self) -> slice:
        """Keys of the branch that the one before it in the row lacks."""
        return slice(0 if self.is_first else self.prompt.stop - self.prompt.start, self.num_keys)

    def gather(self, states: Tensor, keys: Tensor) -> None:
        """Copy states of this branch to keys, which hold those of the one before it.

        Args:
            states: [heads, tokens, head_dim].
            keys: [heads, num_keys or more, head_dim].
        """
        keys[:, self.new_keys] = states[:, self.rows]

    def scatter(self, keys: Tensor, states: Tensor) -> None:
        """Copy keys to the places in states where gather() reads them; those of a prompt after its last branch."""
        num_prompt = self.prompt.stop - self.prompt.start
        states[:, self.response] = keys[:, num_prompt : self.num_keys]
        if self.is_last:
            states[:, self.prompt] = keys[:, :num_prompt]

    def blocks(self, sliding_window: int | None) -> list[Block]:
        """Split the queries evenly into blocks of at most BLOCK."""
        num_queries = self.rows.stop - self.rows.start
        num_before = self.num_keys - num_queries  # keys before those of the first query
        num_blocks = math.ceil(num_queries / BLOCK)
        bounds = [num_queries * index // num_blocks for index in range(num_blocks + 1)]
        blocks = []
        for start, stop in pairwise(bounds):
            first_key = 0 if sliding_window is None else max(0, num_before + start - sliding_window + 1)
            rows = slice(self.rows.start + start, self.rows.start + stop)
            blocks.append(Block(rows, slice(first_key, num_before + stop)))
        return blocks


class Segments:
    """The division of a packed row into prompts and responses.

    A class, as torch.compile would specialise transformer layers on the numbers of a plain list. Blocks, masks and
    indices are computed once, for all layers.

    Args:
        groups: per group, the number of fed tokens of its prompt and of each response.
    """

    def __init__(self, groups: Sequence[Sequence[int]]):
        self.groups = [tuple(group) for group in groups]
        self._blocks: dict[int | None, list[tuple[Branch, list[Block]]]] = {}
        self._masks: dict[tuple, Tensor] = {}
        self._varlen: dict[torch.device, VariableLengths] = {}

    @cached_property
    def branches(self) -> list[Branch]:
        """Branches with queries, in the order of the row.

        A response of one token is not fed. Its branch has queries only if it is the first.
        """
        branches = []
        end = 0
        for prompt_length, *response_lengths in self.groups:
            prompt = slice(end, end + prompt_length)
            end = prompt.stop
            for index, length in enumerate(response_lengths):
                response = slice(end, end + length)
                end = response.stop
                rows = slice(prompt.start, end) if index == 0 else response
                if index == 0 or length:
                    is_last = not any(response_lengths[index + 1 :])
                    branches.append(Branch(prompt, response, index == 0, rows, prompt_length + length, is_last))
        return branches

    def blocks(self, sliding_window: int | None) -> list[tuple[Branch, list[Block]]]:
        """Branches with their blocks, for a window of sliding_window positions."""
        if sliding_window not in self._blocks:
            self._blocks[sliding_window] = [(branch, branch.blocks(sliding_window)) for branch in self.branches]
        return self._blocks[sliding_window]

    def varlen(self, device: torch.device) -> VariableLengths:
        """The row as a variable-length kernel on device takes it."""
        if device not in self._varlen:
            self._varlen[device] = _variable_lengths(self.branches, device)
        return self._varlen[device]

    def effective_window(self, sliding_window: int | None) -> int | None:
        """The sliding window, or None if it hides no key of the row."""
        is_wide = sliding_window is None or sliding_window >= max(branch.num_keys for branch in self.branches)
        return None if is_wide else sliding_window

    def mask(self, num_queries: int, num_keys: int, sliding_window: int | None, like: Tensor) -> Tensor:
        """The additive mask of the last num_queries of num_keys positions, [queries, keys].

        Args:
            like: gives dtype and device.
        """
        key = (num_queries, num_keys, sliding_window, like.dtype, like.device)
        if key not in self._masks:
            positions = torch.arange(num_keys)
            allowed = _causal(positions[num_keys - num_queries :], positions, sliding_window)
            mask = torch.zeros(allowed.shape, dtype=like.dtype).masked_fill_(~allowed, -torch.inf)
            self._masks[key] = mask.to(like.device)
        return self._masks[key]


def _variable_lengths(branches: list[Branch], device: torch.device) -> VariableLengths:
    def index(*spans: slice | range) -> Tensor:
        positions = [torch.arange(span.start, span.stop) for span in spans]
        return to_device(torch.cat([torch.empty(0, dtype=torch.int64), *positions]), device)

    def starts(lengths: list[int]) -> Tensor:
        return to_device(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), device)

    first_copies: list[range] = []
    repeats: list[list[tuple[slice, range]]] = []  # per further response: prompts, and their copies in the keys
    start = number = 0
    for branch in branches:
        stop, response_start = start + branch.num_keys, start + branch.prompt.stop - branch.prompt.start
        first_copies.append(range(start if branch.is_first else response_start, stop))
        number = 0 if branch.is_first else number + 1
        if number > len(repeats):
            repeats.append([])
        if number:
            repeats[number - 1].append((branch.prompt, range(start, response_start)))
        start = stop
    num_queries = [branch.rows.stop - branch.rows.start for branch in branches]
    num_keys = [branch.num_keys for branch in branches]
    num_repeats = tuple(sum(len(copy) for _, copy in spans) for spans in repeats)
    return VariableLengths(
        index(*(span for branch in branches for span in (branch.prompt, branch.response))),
        starts(num_queries),
        starts(num_keys),
        max(num_queries),
        max(num_keys),
        index(*first_copies),
        index(*(prompt for spans in repeats for prompt, _ in spans)),
        index(*(copy for spans in repeats for _, copy in spans)),
        num_repeats,
        torch.tensor(num_repeats, dtype=torch.int64),
    )


def _causal(queries: Tensor, keys: Tensor, sliding_window: int | None) -> Tensor:
    distance = queries[:, None] - keys
    return (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)


def dense_mask(segments: Segments, sliding_window: int | None = None) -> Tensor:
    """The full mask of a packed row, bool [queries, keys].

    True where a query sees a key.
    """
    num_tokens = sum(map(sum, segments.groups))
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    prompt_start = 0
    for prompt_length, *response_lengths in segments.groups:
        prompt = torch.arange(prompt_start, prompt_start + prompt_length)
        start = prompt_start + prompt_length
        for length in response_lengths:
            sequence = torch.cat([prompt, torch.arange(start, start + length)])
            positions = torch.arange(len(sequence))
            mask[sequence[:, None], sequence] = _causal(positions, positions, sliding_window)
            start += length
        prompt_start = start
    return mask


def _refuse(options: dict[str, Any]) -> None:
    """Raise a ValueError for attention options of a model without support here."""
    for name in ("softcap", "s_aux", "position_bias", "dropout"):
        value = options.get(name)
        if value is not None and not (isinstance(value, float) and value == 0):
            raise ValueError(f"its attention uses {name}, unsupported by packed attention")


def packed_dense(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the full mask, quadratic in the row.

    Arguments and results as for packed().
    """
    _refuse(kwargs)
    mask = dense_mask(segments, sliding_window).to(query.device)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


@cache
def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)


def choose_kernel(device: torch.device, head_dim: int, dtype: torch.dtype, sliding_window: int | None) -> str:
    """The kernel of packed attention: flash, efficient or blocks."""
    if device.type == "cuda":
        capability = _capability(device)
        if "flash" in GPU_KERNELS and flash_runs(capability, head_dim, dtype):
            return "flash"
        # ROCm has other kernels under these names. They are untested here.
        can_run = sliding_window is None and torch.version.hip is None and efficient_runs(capability, head_dim, dtype)
        if "efficient" in GPU_KERNELS and can_run:
            return "efficient"
    return "blocks"


def flash_serves(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed() of a model chooses flash attention for states of dtype."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return choose_kernel(device, head_dim, dtype, None) == "flash"


@torch.compiler.disable
def packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row, in the signature of transformers' AttentionInterface.

    Args:
        query: [1, heads, tokens, head_dim].
        key, value: [1, key_value_heads, tokens, head_dim].
        segments: the division of the row.
        scaling: of the scores; None for head_dim ** -0.5.
        sliding_window: positions in sight of a query, itself included; None for all.

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.

    Raises:
        ValueError: the model's attention needs softcap, sinks, position biases or dropout.
    """
    _refuse(kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sliding_window = segments.effective_window(sliding_window)
    kernel = choose_kernel(query.device, query.shape[-1], query.dtype, sliding_window)
    if kernel == "flash":
        return packed_varlen(query[0], key[0], value[0], segments, scaling, sliding_window)[None], None
    if kernel == "efficient":
        lengths = segments.varlen(query.device)
        return efficient_attention(query[0], key[0], value[0], lengths, scaling)[None], None
    output = _PackedAttention.apply(query[0], key[0], value[0], segments, scaling, sliding_window)
    return output.transpose(0, 1)[None], None


def packed_compiled(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """packed() with flash attention, in a form that torch.compile takes as part of a layer's graph."""
    _refuse(kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_varlen(query[0], key[0], value[0], segments, scaling, sliding_window)[None], None


def packed_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    sliding_window: int | None,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """Attention by one variable-length flash kernel for the row, on a GPU.

    Masks are causal and aligned to the end of the keys.

    Args:
        query, key, value: [heads, tokens, head_dim]; key and value may have fewer heads.
        kernel: with the signature of torch.nn.attention.varlen.varlen_attn.

    Returns:
        [tokens, heads, head_dim].
    """
    return flash_attention(query, key, value, segments.varlen(query.device), scaling, sliding_window, kernel)


class _Buffers:
    """Memory that blocks use in turn: fresh memory is cold, and costs page faults.

    Args:
        like: gives dtype and device.
    """

    def __init__(self, like: Tensor):
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """The named buffer in a shape, uninitialised."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def stack(self, name: str, states: Tensor, num_key_heads: int) -> Tensor:
        """A copy of states with heads of shared keys stacked as more rows.

        [heads, rows, head_dim] -> [key heads, heads per key head * rows, head_dim].
        """
        copy = self.take(name, *states.shape).copy_(states)
        return copy.view(num_key_heads, -1, states.shape[-1])


class _PackedAttention(torch.autograd.Function):
    """softmax(query key^T) value, one block of queries at a time, forward and backward.

    - A block reads no key beyond its last query. This saves nearly half of the work.
    - The backward pass recomputes the weights of each block. So memory is linear in the tokens, not quadratic.
    - Heads with shared keys are stacked as more queries.
    - Computes in fp32, or fp64 for fp64 states. On a CPU, lower dtypes are no faster for products this small.
    - Copies in that dtype are of one branch and one block, in memory that the next ones reuse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """All [heads, tokens, head_dim]; key and value may have fewer heads."""
        ctx.save_for_backward(query, key, value)
        ctx.arguments = segments, scaling, sliding_window
        buffers, (keys, values) = _Buffers(_wide_empty(query, 0)), _branch_states(segments, key, value)
        output = torch.empty_like(query)
        for branch, blocks in segments.blocks(sliding_window):
            branch.gather(key, keys)
            branch.gather(value, values)
            for block in blocks:
                queries = buffers.stack("queries", query[:, block.rows], len(key))
                weights = _weights(queries, keys[:, block.keys], scaling, segments, block, sliding_window, buffers)
                result = torch.bmm(weights, values[:, block.keys], out=buffers.take("result", *queries.shape))
                output[:, block.rows] = _unstack(result, len(query))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        segments, scaling, sliding_window = ctx.arguments
        buffers, (keys, values) = _Buffers(_wide_empty(query, 0)), _branch_states(segments, key, value)
        grad_keys, grad_values = torch.empty_like(keys), torch.empty_like(values)
        grad_query, grad_key, grad_value = (torch.empty_like(states) for states in (query, key, value))
        for branch, blocks in segments.blocks(sliding_window):
            branch.gather(key, keys)
            branch.gather(value, values)
            # Gradients of a prompt add up over its branches.
            grad_keys[:, branch.new_keys] = 0
            grad_values[:, branch.new_keys] = 0
            for block in blocks:
                block_keys = keys[:, block.keys]
                queries = buffers.stack("queries", query[:, block.rows], len(key))
                grad = buffers.stack("grad", grad_output[:, block.rows], len(key))
                weights = _weights(queries, block_keys, scaling, segments, block, sliding_window, buffers)
                grad_values[:, block.keys].baddbmm_(weights.mT, grad)
                grad_weights = torch.bmm(grad, values[:, block.keys].mT, out=buffers.take("scores", *weights.shape))
                grad_scores = torch.ops.aten._softmax_backward_data.out(
                    grad_weights, weights, -1, weights.dtype, grad_input=buffers.take("grad_scores", *weights.shape)
                )
                result = buffers.take("result", *queries.shape)
                result.baddbmm_(grad_scores, block_keys, beta=0, alpha=scaling)
                grad_query[:, block.rows] = _unstack(result, len(query))
                grad_keys[:, block.keys].baddbmm_(grad_scores.mT, queries, alpha=scaling)
            branch.scatter(grad_keys, grad_key)
            branch.scatter(grad_values, grad_value)
        return grad_query, grad_key, grad_value, None, None, None


def _wide_empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised memory in the dtype of sums."""
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _branch_states(segments: Segments, *states: Tensor) -> list[Tensor]:
    """Memory for states of one branch, each [heads, keys of the longest branch, head_dim]."""
    longest = max(branch.num_keys for branch in segments.branches)
    return [_wide_empty(each, each.shape[0], longest, each.shape[-1]) for each in states]


def _unstack(states: Tensor, num_heads: int) -> Tensor:
    return states.view(num_heads, -1, states.shape[-1])


def _weights(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    segments: Segments,
    block: Block,
    sliding_window: int | None,
    buffers: _Buffers,
) -> Tensor:
    """Attention weights of a block, [key heads, stacked queries, keys]."""
    scores = buffers.take("scores", *queries.shape[:2], keys.shape[1])
    scores.baddbmm_(queries, keys.mT, beta=0, alpha=scaling)
    num_queries, num_keys = block.rows.stop - block.rows.start, keys.shape[1]
    # Without a window, all queries of the block see all keys before it. Only the last columns need the mask.
    num_masked = num_queries if sliding_window is None else num_keys
    mask = segments.mask(num_queries, num_masked, sliding_window, scores)
    scores.unflatten(1, (-1, num_queries))[..., num_keys - num_masked :] += mask
    return torch.softmax(scores, -1, out=buffers.take("weights", *scores.shape))


def register_packed_attention() -> None:
    """Make packed, packed_compiled and packed_dense known to transformers, for set_attn_implementation."""
    # Without a mask function of the same name, transformers builds no mask.
    AttentionInterface.register("packed", packed)
    AttentionInterface.register("packed_compiled", packed_compiled)
    AttentionInterface.register("packed_dense", packed_dense)
