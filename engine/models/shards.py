"""Local shards of distributed tensors, and their full tensors."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# Name of a parameter -> (dimension, permutation of its rows or columns before they are split). For fused weights, such
# as query, key and value in one.
ShardPermutations = dict[str, tuple[int, Tensor]]


def rank_and_size() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_gather(gathered: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
    """Write the shards of all ranks of a group to gathered, one after another."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(gathered, shard, group=group)


def copy_to_shard(target: Tensor, full: Tensor, permutation: tuple[int, Tensor] | None = None) -> None:
    """Copy a full tensor, or this rank's shard of it, to target."""
    if permutation is not None:
        dimension, indices = permutation
        full = full.index_select(dimension, indices.to(full.device))
    local_shard(target).copy_(full[shard_slices(target)])


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or an unsharded tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_axes(tensor: Tensor) -> list[tuple[int, int]]:
    """(mesh axis, tensor dimension) of each split, in the order of splitting.

    Tensor parallelism splits first. FSDP splits the result again.
    """
    if not isinstance(tensor, DTensor):
        return []
    axes = reversed([*enumerate(tensor.placements)])
    return [(axis, placement.dim) for axis, placement in axes if hasattr(placement, "dim")]


def shard_slices(tensor: Tensor) -> tuple[slice, ...]:
    """The place of this rank's shard in the full tensor."""
    bounds = [(0, size) for size in tensor.shape]
    for axis, dimension in split_axes(tensor):
        first, last = bounds[dimension]
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        largest = -(-(last - first) // mesh.size(axis))
        start = min(last, first + largest * mesh.get_local_rank(axis))
        bounds[dimension] = (start, min(last, start + largest))
    return tuple(slice(*bound) for bound in bounds)


@torch.no_grad()
def full_tensor(tensor: Tensor, permutation: tuple[int, Tensor] | None = None) -> Tensor:
    """The full tensor, with its permutation undone.

    All ranks call this together.
    """
    full, sizes = local_shard(tensor), [*tensor.shape]
    steps = []
    for axis, dimension in split_axes(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        steps.append((mesh.get_group(axis), dimension, sizes[dimension]))
        largest = -(-sizes[dimension] // mesh.size(axis))
        sizes[dimension] = max(0, min(largest, sizes[dimension] - largest * mesh.get_local_rank(axis)))
    for group, dimension, size in reversed(steps):
        full = _gather(full, group, dimension, size)
    if permutation is not None:
        dimension, indices = permutation
        full = full.index_select(dimension, indices.argsort().to(full.device))
    return full


def _gather(shard: Tensor, group: dist.ProcessGroup, dimension: int, size: int) -> Tensor:
    """Join the shards of a group along a dimension.

    The last shards may be smaller, or empty.

    Args:
        size: of the full dimension.
    """
    largest = -(-size // group.size())
    padded = shard.new_zeros(largest, *shard.movedim(dimension, 0).shape[1:])
    padded[: shard.shape[dimension]] = shard.movedim(dimension, 0)
    gathered = padded.new_empty(group.size() * largest, *padded.shape[1:])
    all_gather(gathered, padded, group)
    return gathered[:size].movedim(0, dimension)
