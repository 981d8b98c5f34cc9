"""Attention over a packed row: each response sees its prompt and itself, never a sibling or another group.

Registered with transformers under the name "packed"; models hand `segments` through from their call. `packed` runs a
kernel per segment; `packed_dense` builds the whole mask, and is the readable truth that every other way is tested
against.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel


class Segment(NamedTuple):
    """Queries [start, end) of the row, which attend to the prompt at [prompt_start, prompt_end) and causally to
    themselves. A group's first segment holds the prompt too: start == prompt_start."""

    prompt_start: int
    prompt_end: int
    start: int
    end: int


class Segments:
    """The segments of a row, in its order; they cover every token once. A class of its own, because torch.compile
    would specialise the blocks that it passes through on the numbers in a plain list."""

    def __init__(self, segments: Sequence[Segment]):
        self.list = list(segments)


def dense_mask(segments: Segments, num_tokens: int, sliding_window: int | None = None) -> Tensor:
    """Which position attends to which: bool [tokens, tokens]."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for segment in segments.list:
        keys = _key_positions(segment)
        positions = torch.arange(len(keys))  # in the sequence prompt + response
        queries = positions[len(keys) - (segment.end - segment.start) :]
        mask[keys[queries][:, None], keys] = _causal(queries, positions, sliding_window)
    return mask


def _key_positions(segment: Segment) -> Tensor:
    own = torch.arange(segment.start, segment.end)
    if segment.start == segment.prompt_start:
        return own
    return torch.cat([torch.arange(segment.prompt_start, segment.prompt_end), own])


def _causal(queries: Tensor, keys: Tensor, sliding_window: int | None) -> Tensor:
    distance = queries[:, None] - keys
    return (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)


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
    mask = dense_mask(segments, query.shape[2], sliding_window).to(query.device)
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
    """Attention one segment at a time, in the signature of transformers' AttentionInterface.

    Args:
        query: [1, heads, tokens, head_dim].
        key, value: [1, key_value_heads, tokens, head_dim].
        segments: of the row.
        sliding_window: the number of positions that a query sees, itself included; None for all.

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.
    """
    outputs = []
    for segment in segments.list:
        queries = query[:, :, segment.start : segment.end]
        keys, values = (_segment_keys(states, segment) for states in (key, value))
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        windowed = sliding_window is not None and num_keys > sliding_window
        mask = None
        if windowed or (num_queries > 1 and num_queries < num_keys):
            positions = torch.arange(num_keys, device=query.device)
            mask = _causal(positions[num_keys - num_queries :], positions, sliding_window if windowed else None)
        outputs.append(
            F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and num_queries == num_keys,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _segment_keys(states: Tensor, segment: Segment) -> Tensor:
    own = states[:, :, segment.start : segment.end]
    if segment.start == segment.prompt_start:
        return own
    return torch.cat([states[:, :, segment.prompt_start : segment.prompt_end], own], dim=2)


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
