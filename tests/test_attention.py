"""Packed attention: blocks and the variable-length kernel against the dense mask, indices by hand."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import engine.step.attention
from engine.step.attention import Block, Branch, Segments, packed, packed_dense, packed_varlen

# One to four responses, some of one token (0 fed tokens), and prompts of one token.
GROUPS = [(5, 3, 2, 4, 1), (1, 2), (4, 0), (1, 0, 3, 0), (3, 8, 0, 2)]
NUM_TOKENS = sum(map(sum, GROUPS))
HEADS, SCALING = 4, 0.7
Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


def by_blocks(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    states = (query[None], key[None], value[None])
    output, _ = packed(
        torch.nn.Module(), *states, None, segments=Segments(GROUPS), scaling=SCALING, sliding_window=window
    )
    return output[0]


def by_varlen(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    return packed_varlen(query, key, value, Segments(GROUPS), SCALING, window, kernel=plain_varlen_attn)


def dense(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    states = (query[None], key[None], value[None])
    output, _ = packed_dense(
        torch.nn.Module(), *states, None, segments=Segments(GROUPS), scaling=SCALING, sliding_window=window
    )
    return output[0]


def plain_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """A readable version of torch's kernel: one sequence at a time, the mask aligned to the end of its keys."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    outputs = []
    for rows, columns in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        queries, keys, values = query[slice(*rows)], key[slice(*columns)], value[slice(*columns)]
        assert len(queries) <= max_q and len(keys) <= max_k
        scores = torch.einsum("qhd,khd->hqk", queries.double(), keys.double()) * scale
        distance = torch.arange(len(keys) - len(queries), len(keys))[:, None] - torch.arange(len(keys))
        hidden = distance < 0
        if window_size[0] >= 0:
            hidden |= distance > window_size[0]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values.double()).to(query.dtype))
    return torch.cat(outputs)


def states(num_key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Random query, key, value, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, NUM_TOKENS, 8), *[(num_key_heads, NUM_TOKENS, 8)] * 2, (NUM_TOKENS, HEADS, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(attention: Attention, tensors: list[Tensor], window: int | None) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    query, key, value = (tensor.clone().requires_grad_() for tensor in tensors[:3])
    output = attention(query, key, value, window)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), tensors[3])]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.step.attention, "BLOCK", 3)


@pytest.mark.parametrize("attention", [by_blocks, by_varlen])
@pytest.mark.parametrize("num_key_heads", [1, 2, HEADS])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_blocks_and_varlen_match_the_dense_mask(attention: Attention, num_key_heads: int, window: int | None) -> None:
    tensors = states(num_key_heads, torch.float64)
    for ours, truth in zip(run(attention, tensors, window), run(dense, tensors, window), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_key_heads", [2, HEADS])
@pytest.mark.parametrize("window", [None, 3])
def test_blocks_round_bfloat16_once_at_the_end(num_key_heads: int, window: int | None) -> None:
    tensors = states(num_key_heads, torch.bfloat16)
    truths = run(dense, [tensor.double() for tensor in tensors], window)
    for ours, truth in zip(run(by_blocks, tensors, window), truths, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), truth, rtol=2**-8, atol=1e-6)  # half a unit in the last place


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_key_heads", [2, HEADS])
def test_blocks_write_all_memory_that_they_read(dtype: torch.dtype, num_key_heads: int) -> None:
    """In deterministic mode, torch fills uninitialised memory with NaN."""
    tensors = states(num_key_heads, dtype)
    expected = run(by_blocks, tensors, None)
    torch.use_deterministic_algorithms(True)
    try:
        found = run(by_blocks, tensors, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))
    assert all(values.isfinite().all() for values in found)


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_in_bfloat16_is_near_the_dense_mask(window: int | None) -> None:
    tensors = states(2, torch.bfloat16)
    truths = run(dense, [tensor.double() for tensor in tensors], window)
    for ours, truth in zip(run(by_varlen, tensors, window), truths, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ((ours.double() - truth).norm() / truth.norm()).item() < 0.01


@pytest.mark.parametrize("function", ["packed", "packed_dense"])
def test_unsupported_options_are_refused(function: str) -> None:
    query, key, value, _ = (tensor[None] for tensor in states(HEADS, torch.float32))
    attention = getattr(engine.step.attention, function)
    with pytest.raises(ValueError, match="softcap"):
        attention(torch.nn.Module(), query, key, value, None, segments=Segments(GROUPS), softcap=30.0)


def test_branches_by_hand() -> None:
    """The row P P r | (empty) | s s s | Q (empty)."""
    prompt, other = slice(0, 2), slice(6, 7)
    assert Segments([(2, 1, 0, 3), (1, 0)]).branches == [
        Branch(prompt, slice(2, 3), True, rows=slice(0, 3), num_keys=3, is_last=False),
        Branch(prompt, slice(3, 6), False, rows=slice(3, 6), num_keys=5, is_last=True),
        Branch(other, slice(7, 7), True, rows=slice(6, 7), num_keys=1, is_last=True),
    ]


@pytest.mark.parametrize("window, first_keys", [(None, (0, 0)), (2, (1, 2)), (4, (0, 0))])
def test_blocks_by_hand(window: int | None, first_keys: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries after a prompt of two, split into one and two."""
    monkeypatch.setattr(engine.step.attention, "BLOCK", 2)
    _, (_, blocks), _ = Segments([(2, 1, 0, 3), (1, 0)]).blocks(window)
    assert blocks == [Block(slice(3, 4), slice(first_keys[0], 3)), Block(slice(4, 6), slice(first_keys[1], 5))]


def test_variable_lengths_by_hand() -> None:
    lengths = Segments([(2, 1, 0, 3), (1, 0)]).varlen(torch.device("cpu"))
    assert lengths.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert lengths.query_starts.tolist() == [0, 3, 6, 7]
    assert lengths.key_starts.tolist() == [0, 3, 8, 9]
    assert (lengths.longest_query, lengths.longest_key) == (3, 5)
