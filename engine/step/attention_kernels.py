"""GPU kernels of packed attention: one call for a whole row.

flash: torch's varlen_attn, for 16-bit states.
efficient: torch's memory-efficient kernel, for fp32 and for 16-bit states without flash.

Both take a row as a list of branches, with gathered keys and values.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

Capability = tuple[int, int]  # compute capability of a GPU, major and minor

CAUSAL_FROM_BOTTOM_RIGHT = 2  # a mask type of the memory-efficient kernel: aligned to the end of the keys


@dataclass(frozen=True)
class VariableLengths:
    """A packed row as a list of branches, for a variable-length kernel.

    Queries stay in the order of the row. The keys of a prompt repeat for each of its responses.
    """

    key_index: Tensor  # int64 [keys], into the row
    query_starts: Tensor  # int32 [branches + 1]
    key_starts: Tensor  # int32 [branches + 1]
    longest_query: int
    longest_key: int
    first_copies: Tensor  # int64 [tokens], where each row stands first among the keys
    repeat_rows: Tensor  # int64 [repeats], rows of prompts, by response number from the second on
    repeat_copies: Tensor  # int64 [repeats], where they stand among the keys
    num_repeats: tuple[int, ...]  # of each further response
    repeat_sizes: Tensor  # the same on the CPU, int64: to a compiled layer, numbers would be constants

    @property
    def copy_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each row has its copies among the keys."""
        return self.first_copies, self.repeat_rows, self.repeat_copies


def flash_runs(capability: Capability, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether flash attention runs forward and backward.

    Source: sdp_utils.cpp and flash_api.cpp of torch.
    """
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0):
        return False
    # Cards with little shared memory lack a backward pass for these heads.
    is_small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    return head_dim % 8 == 0 and head_dim <= 256 and not (is_small and 192 < head_dim <= 224)


def efficient_runs(capability: Capability, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether memory-efficient attention runs forward and backward.

    Source: sdp_utils.cpp, cutlassF.h and cutlassB.h of torch. Kernels load 16 bytes at a time.
    """
    first = {torch.float32: (5, 0), torch.float16: (5, 0), torch.bfloat16: (8, 0)}.get(dtype)
    return first is not None and first <= capability <= (12, 1) and head_dim * dtype.itemsize % 16 == 0


@cache
def _parameters(kernel: Callable[..., Any]) -> Set[str]:
    return signature(kernel).parameters.keys()


@torch.compiler.assume_constant_result
def takes_gqa(kernel: Callable[..., Any]) -> bool:
    """Whether a varlen kernel asks for enable_gqa. In torch 2.11, heads may always share keys."""
    return "enable_gqa" in _parameters(kernel)


def _sum_copies(
    copies: Tensor, first_copies: Tensor, repeat_rows: Tensor, repeat_copies: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Sum over the copies of each row: [keys, heads, head_dim] -> [tokens, heads, head_dim]."""
    total = copies.index_select(0, first_copies)
    if len(sizes) > 1:  # Three or more terms: round once, at the end.
        total = total.to(torch.promote_types(total.dtype, torch.float32))
    for rows, index in zip(repeat_rows.split(sizes), repeat_copies.split(sizes), strict=True):
        # Under torch.use_deterministic_algorithms, index_add_ sorts after all. The sum is the same.
        total.index_add_(0, rows, copies.index_select(0, index).to(total.dtype))
    return total.to(copies.dtype)


class _GatherKeys(torch.autograd.Function):
    """Keys and values of all branches.

    The backward pass of key[index] would sort the index in every layer. Here each row's first copy is selected. Then
    the copies of the prompts are added, one response number after the other. Their rows are unique, so no two threads
    add to the same row, and the sum is the same in each run.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, lengths: VariableLengths) -> tuple[Tensor, Tensor]:
        """[tokens, heads, head_dim] -> [keys, heads, head_dim]."""
        ctx.indices = *lengths.copy_indices, lengths.num_repeats
        return key.index_select(0, lengths.key_index), value.index_select(0, lengths.key_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(_sum_copies(grad, *ctx.indices) for grad in grads), None


def gather_keys(key: Tensor, value: Tensor, lengths: VariableLengths) -> tuple[Tensor, Tensor]:
    """Keys and values of all branches: [tokens, heads, head_dim] -> [keys, heads, head_dim]."""
    if torch.compiler.is_compiling():
        return _gather_keys_operator(key, value, lengths.key_index, *lengths.copy_indices, lengths.repeat_sizes)
    return _GatherKeys.apply(key, value, lengths)


# _GatherKeys as an operator. The compiler would trace a function, and make index_add_ a sort again.


@torch.library.custom_op("packed_attention::gather_keys", mutates_args=())
def _gather_keys_operator(
    key: Tensor,
    value: Tensor,
    key_index: Tensor,
    first_copies: Tensor,
    repeat_rows: Tensor,
    repeat_copies: Tensor,
    repeat_sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    return key.index_select(0, key_index), value.index_select(0, key_index)


@_gather_keys_operator.register_fake
def _(key: Tensor, value: Tensor, key_index: Tensor, *indices: Tensor) -> tuple[Tensor, Tensor]:
    num_keys = key_index.shape[0]
    return key.new_empty(num_keys, *key.shape[1:]), value.new_empty(num_keys, *value.shape[1:])


@torch.library.custom_op("packed_attention::sum_copies", mutates_args=())
def _sum_copies_operator(
    copies: Tensor, first_copies: Tensor, repeat_rows: Tensor, repeat_copies: Tensor, repeat_sizes: Tensor
) -> Tensor:
    return _sum_copies(copies, first_copies, repeat_rows, repeat_copies, repeat_sizes.tolist())


@_sum_copies_operator.register_fake
def _(copies: Tensor, first_copies: Tensor, *indices: Tensor) -> Tensor:
    return copies.new_empty(first_copies.shape[0], *copies.shape[1:])


def _save_indices(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[3:])


def _sum_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return *(_sum_copies_operator(grad, *ctx.saved_tensors) for grad in grads), *[None] * 5


_gather_keys_operator.register_autograd(_sum_gradients, setup_context=_save_indices)


def plain_gather_keys(key: Tensor, value: Tensor, lengths: VariableLengths) -> tuple[Tensor, Tensor]:
    """The readable twin of gather_keys."""
    return key[lengths.key_index], value[lengths.key_index]


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: VariableLengths,
    scaling: float,
    sliding_window: int | None,
    kernel: Callable[..., Any],
) -> Tensor:
    """Flash attention of a row. Masks are causal and aligned to the end of the keys.

    Args:
        query, key, value: [heads, tokens, head_dim]; key and value may have fewer heads.
        kernel: with the signature of torch.nn.attention.varlen.varlen_attn.

    Returns:
        [tokens, heads, head_dim].
    """
    query = query.transpose(0, 1)
    key, value = gather_keys(key.transpose(0, 1), value.transpose(0, 1), lengths)
    options = {"enable_gqa": query.shape[1] != key.shape[1]} if takes_gqa(kernel) else {}
    return kernel(
        query,
        key,
        value,
        lengths.query_starts,
        lengths.key_starts,
        lengths.longest_query,
        lengths.longest_key,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: VariableLengths,
    scaling: float,
    forward: Callable[..., Any] = torch.ops.aten._efficient_attention_forward,
    backward: Callable[..., Any] = torch.ops.aten._efficient_attention_backward,
) -> Tensor:
    """Memory-efficient attention of a row, without a window.

    The kernel's window is not used: its backward pass (torch 2.11 to 2.13) places the window as if a branch had as
    many queries as keys.

    Args:
        query, key, value: [heads, tokens, head_dim]; key and value may have fewer heads.
        forward, backward: with the signatures of torch's kernels.

    Returns:
        [tokens, heads, head_dim].
    """
    query = query.transpose(0, 1)
    key, value = gather_keys(key.transpose(0, 1), value.transpose(0, 1), lengths)
    if query.shape[1] != key.shape[1]:  # The kernel has no heads with shared keys.
        num_shared = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(num_shared, dim=1) for states in (key, value))
    return _EfficientAttention.apply(query, key, value, lengths, scaling, forward, backward)


class _EfficientAttention(torch.autograd.Function):
    """torch's memory-efficient kernels, with a gradient. Torch has none for calls with sequence starts."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: VariableLengths,
        scaling: float,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
    ) -> Tensor:
        """All [tokens or keys, heads, head_dim], with equal heads."""
        output, logsumexp, seed, offset, longest_query, longest_key = forward(
            query[None],
            key[None],
            value[None],
            None,
            lengths.query_starts,
            lengths.key_starts,
            lengths.longest_query,
            lengths.longest_key,
            0.0,  # dropout
            CAUSAL_FROM_BOTTOM_RIGHT,
            compute_log_sumexp=True,
            scale=scaling,
        )
        ctx.save_for_backward(query, key, value, output, logsumexp, seed, offset)
        ctx.arguments = lengths, longest_query, longest_key, scaling, backward
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, seed, offset = ctx.saved_tensors
        lengths, longest_query, longest_key, scaling, backward = ctx.arguments
        grads = backward(
            grad_output[None],
            query[None],
            key[None],
            value[None],
            None,
            output,
            lengths.query_starts,
            lengths.key_starts,
            longest_query,
            longest_key,
            logsumexp,
            0.0,
            seed,
            offset,
            CAUSAL_FROM_BOTTOM_RIGHT,
            False,  # no gradient of a bias
            scale=scaling,
            # Several blocks of keys at once add to a query's gradient in the order they finish.
            num_splits_key=1 if torch.are_deterministic_algorithms_enabled() else None,
        )
        return *(grad[0] for grad in grads[:3]), None, None, None, None, None
