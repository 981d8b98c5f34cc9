"""Attention over a packed row: each response sees its prompt and itself, never a sibling or another group.

Registered with transformers under the name "packed"; models hand `segments` through from their call. `packed` runs a
kernel per response; `packed_dense` builds the whole mask, and is the readable truth that every other way is tested
against.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel


class Segments:
    """How a packed row is divided: for each group, the number of tokens of its prompt and of each of its responses.

    A class of its own, because torch.compile would specialise the blocks that it passes through on the numbers in a
    plain list.
    """

    def __init__(self, groups: Sequence[Sequence[int]]):
        self.groups = [tuple(group) for group in groups]
        self._masks: dict[tuple, Tensor] = {}

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
    # The row is split once, not sliced for each response: the gradient of a slice is as long as the row. A group's
    # prompt attends together with its first response, which follows it.
    query_lengths = [n for prompt, first, *others in segments.groups for n in (prompt + first, *others)]
    key_lengths = [n for group in segments.groups for n in group]
    queries = iter(query.split(query_lengths, dim=2))
    keys, values = (iter(states.split(key_lengths, dim=2)) for states in (key, value))
    outputs = []
    for _, *response_lengths in segments.groups:
        prompt_key, prompt_value = next(keys), next(values)
        for _ in response_lengths:
            segment_query = next(queries)
            segment_key = torch.cat([prompt_key, next(keys)], dim=2)
            segment_value = torch.cat([prompt_value, next(values)], dim=2)
            num_queries, num_keys = segment_query.shape[2], segment_key.shape[2]
            if num_queries == 0:  # a response of one token, which is not fed
                continue
            is_plain = num_queries == num_keys and (sliding_window is None or num_keys <= sliding_window)
            outputs.append(
                F.scaled_dot_product_attention(
                    segment_query,
                    segment_key,
                    segment_value,
                    attn_mask=None if is_plain else segments.mask(num_queries, num_keys, sliding_window, query),
                    is_causal=is_plain,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


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
