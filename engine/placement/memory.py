"""How many tokens fit into memory, and what becomes of freed memory."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.models.shards import local_shard
from engine.step.heads import run_head
from engine.step.microbatches import MicrobatchRunner

FEWEST_TOKENS = 512
# The fraction of memory for saved activations. Temporaries, gradients and fragmentation take the rest.
SHARE = 0.6
# Parameters of glibc's mallopt(): the smallest block from the system itself, and the most free memory that is kept.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # a user's own choice
SECOND_MODEL_SHARE = 0.6  # of the memory for a second model. Copies in a low dtype and activations take the rest.


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; on a CPU, of the machine or this process's container.

    Free memory does not matter: a repeated run must split its batches the same way.
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


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far, in 10^9 bytes: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep freed memory for its next tensors, if device is a CPU.

    By default glibc returns each freed block above 32 MB to the system. Then each step gets gradients and logits anew,
    page by page and filled with zeros. Other C libraries stay as they are.
    """
    if device.type != "cpu" or any(name in os.environ for name in MALLOC_VARIABLES):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    # Before 2.35 glibc refuses more than 32 MB. The second option alone would fix the threshold at its start of 128 kB.
    if not set_option(MMAP_THRESHOLD, 2**30):
        set_option(MMAP_THRESHOLD, 2**25)
    set_option(TRIM_THRESHOLD, 2**31 - 1)


def fits_twice(model: PreTrainedModel) -> bool:
    """Whether a second model of the same size fits beside it now. On a CPU, memory is taken to be there."""
    needed: dict[torch.device, float] = {}
    for shard in map(local_shard, model.parameters()):
        needed[shard.device] = needed.get(shard.device, 0) + shard.nbytes / SECOND_MODEL_SHARE
    for device, num_bytes in needed.items():
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if num_bytes > torch.cuda.mem_get_info(device)[0] + unused:
                return False
    return True


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors a forward pass keeps for its backward pass, each storage once."""
    kept: dict[int, Tensor] = {}  # keeping the tensors prevents the reuse of their addresses

    def pack(tensor: Tensor) -> Tensor:
        # Detached: else the graph would hold its own tensors, in a cycle Python cannot see. Nothing would be freed.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure_bytes_per_token(runner: MicrobatchRunner, max_length: int, num_responses: int) -> float:
    """Bytes of saved activations per fed token, measured on short examples.

    Args:
        num_responses: of each example.
    """
    ids = np.zeros(64, dtype=np.int32)
    length = max(1, min(32, (max_length - 5) // 2))
    responses = (ids[:length], ids[: length + 1])[:num_responses]

    def measured(num_examples: int) -> tuple[int, int]:
        prompts = (ids[: length + 1 + index] for index in range(num_examples))
        batch = runner.lay_out([Example(prompt, responses, index) for index, prompt in enumerate(prompts)])
        with runner.in_mixed_precision():
            kept = saved_bytes(lambda: run_head(runner.policy, batch, lambda values, span: values.sum())[0])
        return kept, batch.input_ids.numel()

    (few, few_tokens), (many, many_tokens) = measured(1), measured(4)
    return (many - few) / (many_tokens - few_tokens)  # the difference leaves out constant parts


def max_efficient_tokens(on_gpu: bool, gradients: int, bytes_per_token: float) -> int:
    """The number of tokens beyond which a pass is hardly faster per token.

    On a CPU, activations then outweigh the gradients; each pass adds to these once.
    """
    return 65536 if on_gpu else max(2048, int(2 * gradients / bytes_per_token))


def tokens_that_fit(
    memory: int,
    state: int,
    bytes_per_token: float,
    num_layers: int,
    *,
    wanted: int,
    most: int,
    checkpointed: int | None,
) -> tuple[int, int]:
    """Tokens of a microbatch, and the number of layers that must recompute their activations.

    Args:
        memory: bytes in total.
        state: bytes of weights, gradients, optimizer state and reference.
        bytes_per_token: of activations, with no recomputing layer.
        wanted: tokens that should fit; layers recompute for no more than these.
        most: an upper limit for tokens.
        checkpointed: the number of recomputing layers; None finds the smallest for wanted.

    Returns:
        tokens, layers.
    """
    room = max(0.0, memory - state) * SHARE
    per_layer = bytes_per_token / (num_layers + 1)  # the head and the embeddings count as one
    tokens, layers = 0.0, 0
    for layers in range(num_layers + 1) if checkpointed is None else (checkpointed,):
        # A recomputing layer keeps its input, about a twelfth. One layer at a time holds all of its activations.
        held = bytes_per_token - layers * per_layer * 11 / 12 + (per_layer if layers else 0)
        tokens = room / held
        if tokens >= wanted:
            break
    return max(FEWEST_TOKENS, int(min(tokens, most))), layers
