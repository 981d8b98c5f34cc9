"""Attention over a packed row: each response sees its prompt and itself, never a sibling or another group.

Registered with transformers under the name "packed"; models hand `segments` through from their call. `packed` runs a
kernel per response; `packed_dense` builds the whole mask, and is the readable truth that every other way is tested
against.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from utils import to_device

# Queries of a block: more see more keys in vain, fewer make the matrix products small.
BLOCK = 128


@dataclass(frozen=True)
class Block:
    """Some queries of a branch, and the keys that they may see: up to the last of them."""

    rows: slice  # of the packed row
    keys: slice  # of the branch


@dataclass(frozen=True)
class Branch:
    """A prompt and one of its responses, as they lie in the packed row. The queries of the prompt go with the first
    response, which follows it."""

    prompt: slice
    response: slice
    is_first: bool
    rows: slice  # its queries
    num_keys: int

    def gather(self, states: Tensor) -> Tensor:
        """Its part of states [heads, tokens, head_dim]."""
        if self.is_first:
            return states[:, self.rows]
        return torch.cat([states[:, self.prompt], states[:, self.response]], dim=1)

    def scatter_add(self, states: Tensor, part: Tensor) -> None:
        """Add part to states, there where gather takes it from."""
        num_prompt = self.prompt.stop - self.prompt.start
        states[:, self.prompt] += part[:, :num_prompt]
        states[:, self.response] += part[:, num_prompt:]

    def blocks(self, sliding_window: int | None) -> list[Block]:
        """Its queries, cut evenly into blocks of at most BLOCK."""
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


@dataclass(frozen=True)
class VariableLengths:
    """A packed row as one branch after another, for a kernel of variable lengths. Queries need no index: each row has
    its own, in order; a prompt's keys come once for each of its responses."""

    key_index: Tensor  # int64 [keys], into the row
    query_starts: Tensor  # int32 [branches + 1]
    key_starts: Tensor  # int32 [branches + 1]
    longest_query: int
    longest_key: int


class Segments:
    """How a packed row is divided: for each group, the number of tokens of its prompt and of each of its responses.

    A class of its own, because torch.compile would specialise the blocks that it passes through on the numbers in a
    plain list. What attention derives from it is kept for the next layer.
    """

    def __init__(self, groups: Sequence[Sequence[int]]):
        self.groups = [tuple(group) for group in groups]
        self._blocks: dict[int | None, list[tuple[Branch, list[Block]]]] = {}
        self._masks: dict[tuple, Tensor] = {}
        self._varlen: dict[torch.device, VariableLengths] = {}

    @cached_property
    def branches(self) -> list[Branch]:
        """All responses, in the order of the row, but those without queries: of one token, which is not fed."""
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
                    branches.append(Branch(prompt, response, index == 0, rows, prompt_length + length))
        return branches

    def blocks(self, sliding_window: int | None) -> list[tuple[Branch, list[Block]]]:
        """The blocks of each branch."""
        if sliding_window not in self._blocks:
            self._blocks[sliding_window] = [(branch, branch.blocks(sliding_window)) for branch in self.branches]
        return self._blocks[sliding_window]

    def varlen(self, device: torch.device) -> VariableLengths:
        """The same for a kernel of variable lengths."""
        if device not in self._varlen:
            spans = [span for branch in self.branches for span in (branch.prompt, branch.response)]
            num_queries = torch.tensor([branch.rows.stop - branch.rows.start for branch in self.branches])
            num_keys = torch.tensor([branch.num_keys for branch in self.branches])
            self._varlen[device] = VariableLengths(
                to_device(torch.cat([torch.arange(span.start, span.stop) for span in spans]), device),
                to_device(F.pad(num_queries.cumsum(0), (1, 0)).int(), device),
                to_device(F.pad(num_keys.cumsum(0), (1, 0)).int(), device),
                int(num_queries.max()),
                int(num_keys.max()),
            )
        return self._varlen[device]

    def mask(self, num_queries: int, num_keys: int, sliding_window: int | None, like: Tensor) -> Tensor:
        """The additive mask of the last num_queries of num_keys positions, [queries, keys]; kept for the next layer."""
        key = (num_queries, num_keys, sliding_window, like.dtype, like.device)
        if key not in self._masks:
            positions = torch.arange(num_keys)
            allowed = _causal(positions[num_keys - num_queries :], positions, sliding_window)
            mask = torch.zeros(allowed.shape, dtype=like.dtype).masked_fill_(~allowed, -torch.inf)
            self._masks[key] = mask.to(like.device)
        return self._masks[key]


def _causal(queries: Tensor, keys: Tensor, sliding_window: int | None) -> Tensor:
    distance = queries[:, None] - keys
    return (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)


def dense_mask(segments: Segments, sliding_window: int | None = None) -> Tensor:
    """Which position of the row attends to which: bool [tokens, tokens]."""
    num_tokens = sum(map(sum, segments.groups))
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    prompt_start = 0
    for prompt_length, *response_lengths in segments.groups:
        prompt = torch.arange(prompt_start, prompt_start + prompt_length)
        start = prompt_start + prompt_length
        for length in response_lengths:
            sequence = torch.cat([prompt, torch.arange(start, start + length)])  # as if it stood alone
            positions = torch.arange(len(sequence))
            mask[sequence[:, None], sequence] = _causal(positions, positions, sliding_window)
            start += length
        prompt_start = start
    return mask


def _refuse(options: dict[str, Any]) -> None:
    """Raise for what a model asks of its attention and would not get."""
    for name in ("softcap", "s_aux", "position_bias", "dropout"):
        value = options.get(name)
        if value is not None and not (isinstance(value, float) and value == 0):
            raise ValueError(f"its attention uses {name}, which packed attention has not")


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
    """Attention with the whole mask: memory and time grow with the square of the row. Shapes as for packed."""
    _refuse(kwargs)
    mask = dense_mask(segments, sliding_window).to(query.device)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


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
    """Attention one response at a time, in the signature of transformers' AttentionInterface.

    Args:
        query: [1, heads, tokens, head_dim].
        key, value: [1, key_value_heads, tokens, head_dim].
        segments: how the row is divided.
        sliding_window: the number of positions that a query sees, itself included; None for all.

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.
    """
    _refuse(kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return packed_varlen(query[0], key[0], value[0], segments, scaling, sliding_window)[None], None
    output = _PackedAttention.apply(query[0], key[0], value[0], segments, scaling, sliding_window)
    return output.transpose(0, 1)[None], None


def packed_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    sliding_window: int | None,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """Attention by one variable-length flash kernel for the whole row, on a GPU.

    Masks are causal, aligned to the end of the keys.

    Args:
        query, key, value: [heads, tokens, head_dim]; key and value may have fewer heads.
        kernel: with the signature of torch.nn.attention.varlen.varlen_attn.

    Returns:
        [tokens, heads, head_dim].
    """
    lengths = segments.varlen(query.device)
    return kernel(
        query.transpose(0, 1),
        key.transpose(0, 1)[lengths.key_index],
        value.transpose(0, 1)[lengths.key_index],
        lengths.query_starts,
        lengths.key_starts,
        lengths.longest_query,
        lengths.longest_key,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[0] != key.shape[0],
    )


class _PackedAttention(torch.autograd.Function):
    """softmax(query key^T) value, a block of the queries of one branch at a time, forward and backward.

    Blocks see no key beyond their last query, which saves nearly half of the work, and the weights of one block are
    all that is held: the backward pass makes them anew, so memory grows with the tokens, not with their square. Heads
    that share keys are stacked as more queries. Works in fp32, or fp64, whatever the dtype of the states: on a CPU
    products this small are as fast.
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
        """Shapes: [heads, tokens, head_dim], with fewer heads for key and value if they are shared."""
        ctx.save_for_backward(query, key, value)
        ctx.arguments = segments, scaling, sliding_window
        wide_query, wide_key, wide_value = _widen(query, key, value)
        wide_query = wide_query * scaling
        output = torch.empty_like(query)
        for branch, blocks in segments.blocks(sliding_window):
            keys, values = branch.gather(wide_key), branch.gather(wide_value)
            for block in blocks:
                queries = _stack(wide_query[:, block.rows], len(key))
                weights = _weights(queries, keys[:, block.keys], segments, block, sliding_window)
                output[:, block.rows] = _unstack(weights @ values[:, block.keys], len(query))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        segments, scaling, sliding_window = ctx.arguments
        wide_query, wide_key, wide_value, grad_output = _widen(query, key, value, grad_output)
        wide_query = wide_query * scaling
        grad_query = torch.empty_like(wide_query)
        grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
        for branch, blocks in segments.blocks(sliding_window):
            keys, values = branch.gather(wide_key), branch.gather(wide_value)
            grad_keys, grad_values = branch.gather(grad_key), branch.gather(grad_value)
            if not branch.is_first:  # those are copies
                grad_keys.zero_()
                grad_values.zero_()
            for block in blocks:
                queries = _stack(wide_query[:, block.rows], len(key))
                weights = _weights(queries, keys[:, block.keys], segments, block, sliding_window)
                grad = _stack(grad_output[:, block.rows], len(key))
                grad_values[:, block.keys].baddbmm_(weights.mT, grad)
                grad_weights = grad @ values[:, block.keys].mT
                grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_query[:, block.rows] = _unstack(grad_scores @ keys[:, block.keys], len(query))
                grad_keys[:, block.keys].baddbmm_(grad_scores.mT, queries)
            if not branch.is_first:
                branch.scatter_add(grad_key, grad_keys)
                branch.scatter_add(grad_value, grad_values)
        grad_query *= scaling
        return *(grad.to(query.dtype) for grad in (grad_query, grad_key, grad_value)), None, None, None


def _widen(*states: Tensor) -> Iterator[Tensor]:
    return (state.to(torch.promote_types(state.dtype, torch.float32)) for state in states)


def _stack(states: Tensor, num_key_heads: int) -> Tensor:
    """Heads that share keys as one: [heads, rows, head_dim] -> [key heads, heads per key head * rows, head_dim]."""
    return states if len(states) == num_key_heads else states.reshape(num_key_heads, -1, states.shape[-1])


def _unstack(states: Tensor, num_heads: int) -> Tensor:
    return states if len(states) == num_heads else states.reshape(num_heads, -1, states.shape[-1])


def _weights(queries: Tensor, keys: Tensor, segments: Segments, block: Block, sliding_window: int | None) -> Tensor:
    """The softmax of the scores of a block, [key heads, stacked queries, keys]."""
    scores = queries @ keys.mT
    num_queries, num_keys = block.rows.stop - block.rows.start, scores.shape[-1]
    # Without a window all keys before the block's first query are seen: only the last columns need the mask.
    masked = num_queries if sliding_window is None else num_keys
    mask = segments.mask(num_queries, masked, sliding_window, scores)
    scores.unflatten(1, (-1, num_queries))[..., num_keys - masked :] += mask
    return scores.softmax(-1)


# No mask function is registered with the names, so transformers builds no mask for them.
AttentionInterface.register("packed", packed)
AttentionInterface.register("packed_dense", packed_dense)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run model with another attention implementation inside a with block, such as sdpa to generate."""
    before = model.config._attn_implementation
    if name == before:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
