"""How much memory there is, what a token of a forward pass takes of it, and so how many tokens fit."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FEWEST_TOKENS = 512
# Share of the memory that saved activations may fill: the rest is for what operations need for themselves, the
# gradients on their way, and what the allocator cannot use.
SHARE = 0.6


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; on a CPU, of the machine or of the container that this process may use.

    All of it, not what is free now: a run must be cut the same way each time.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return total


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, each storage once."""
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses their own

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def most_useful(on_gpu: bool, gradients: int, bytes_per_token: float) -> int:
    """The tokens past which a pass is hardly faster per token, only larger.

    On a CPU that is when the activations outweigh the gradients of the weights, which each pass adds to once.
    """
    return 65536 if on_gpu else max(2048, int(2 * gradients / bytes_per_token))


def fitting(
    memory: int,
    state: int,
    bytes_per_token: float,
    num_blocks: int,
    *,
    wanted: int,
    most: int,
    checkpointed: int | None,
) -> tuple[int, int]:
    """How many tokens fit into one forward and backward pass, and how many blocks must recompute their activations.

    Args:
        memory: bytes that there are.
        state: those that weights, gradients, optimizer and reference take.
        bytes_per_token: of activations, when no block recomputes its own.
        wanted: tokens that should fit; only for these are blocks recomputed.
        most: tokens, however many fit.
        checkpointed: the number of blocks that recompute theirs; None finds the smallest that wanted fits with.

    Returns:
        tokens, blocks.
    """
    room = max(0.0, memory - state) * SHARE
    per_block = bytes_per_token / (num_blocks + 1)  # the head and the embeddings count as one
    tokens, blocks = 0.0, 0
    for blocks in range(num_blocks + 1) if checkpointed is None else (checkpointed,):
        # Of a checkpointed block its input is kept, about a twelfth; one at a time has all of its own again.
        held = bytes_per_token - blocks * per_block * 11 / 12 + (per_block if blocks else 0)
        tokens = room / held
        if tokens >= wanted:
            break
    return max(FEWEST_TOKENS, int(min(tokens, most))), blocks
