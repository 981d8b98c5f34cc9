"""Split a model among processes, by FSDP2's shards, by tensor parallelism or by both, and put it together again.

The processes form a grid of replicas x shards x tensor: those that differ in `tensor` alone share each matrix product
and train the same examples; those that differ in `shard` hold different shards of all weights; those that differ in
`replica` hold the same. Any extent may be 1.
"""

import math
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.logprobs import run_model
from engine.tensor_parallel import split_products

# Name of a parameter -> the order of its rows or columns, where they are split in another than their own.
Orders = dict[str, tuple[int, Tensor]]


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def make_mesh(device: torch.device, replicas: int, shards: int, tensor: int) -> DeviceMesh:
    """The grid of all processes; neighbours share matrix products, for which they talk the most."""
    return init_device_mesh(device.type, (replicas, shards, tensor), mesh_dim_names=("replica", "shard", "tensor"))


def without_weights(full: PreTrainedModel | None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that rank 0 has in full, on every rank, without weights (on the meta device)."""
    description: list[Any] = [None]
    if full is not None:
        attention = full.config._attn_implementation
        description = [(full.config, full.generation_config, attention, getattr(full, "own_attention", attention))]
    dist.broadcast_object_list(description, src=0)
    config, generation_config, attention, own_attention = description[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.generation_config = generation_config
    model.config._attn_implementation = attention
    model.own_attention = own_attention  # for sampling
    return model.eval()


def shard_model(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    mixed_precision: torch.dtype | None,
    offload: bool,
    deterministic: bool,
) -> Orders:
    """Split a model on the meta device in place, as mesh says; it still has no weights after that.

    Args:
        blocks: whose weights are brought together one at a time.
        mixed_precision: what the model runs in, embeddings and head aside, as precision.model_in has it.
        offload: keep the shards in CPU memory.
        deterministic: sum gradients by CanonicalReduceScatter.
    """
    orders = split_products(model, mesh["tensor"]) if mesh["tensor"].size() > 1 else {}
    offload_policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()

    def shard(module: nn.Module, dtype: torch.dtype | None) -> None:
        fully_shard(
            module,
            mesh=mesh["replica", "shard"] if mesh["replica"].size() > 1 else mesh["shard"],
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None),
            offload_policy=offload_policy,
            reshard_after_forward=True,  # the root's too, so that outside of a forward pass all parameters are shards
        )

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for block in blocks:
        shard(block, mixed_precision)
    if mixed_precision is not None:
        in_blocks = {module for block in blocks for module in block.modules()}
        for module in model.modules():  # the final norm, position embeddings: what runs in another dtype than the root
            if module not in in_blocks and module not in (embeddings, head) and [*module.parameters(recurse=False)]:
                shard(module, mixed_precision)
        embeddings.register_forward_hook(lambda module, inputs, output: output.to(mixed_precision))
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    shard(model, None)
    for module in fsdp_modules(model):
        # Losses are shares of the mean over all processes, so their gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if deterministic:
            module.set_custom_reduce_scatter(CanonicalReduceScatter())
    model.run_sharded = types.MethodType(run_model, model)  # with the LM head's weight at hand
    register_fsdp_forward_method(model, "run_sharded")
    return orders


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def load_full(
    model: PreTrainedModel, full: PreTrainedModel | None, orders: Orders, device: torch.device, offload: bool
) -> None:
    """Give a sharded model without weights those that rank 0 has in full, one tensor after another."""
    model.to_empty(device="cpu" if offload else device)

    def from_first_rank(tensor: Tensor | None, like: Tensor) -> Tensor:
        if tensor is None:
            tensor = torch.empty(like.shape, dtype=like.dtype)
        tensor = tensor.detach().to(device, like.dtype).contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    parameters = dict(full.named_parameters()) if full is not None else {}
    for name, parameter in model.named_parameters():
        fill(parameter, from_first_rank(parameters.get(name), parameter), orders.get(name))
    # Buffers too: those that no state dict holds, like rotary frequencies, would stay empty.
    buffers = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in model.named_buffers():
        buffer.copy_(from_first_rank(buffers.get(name), buffer))
    if offload:  # activations meet them on the device
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)


def fill(target: Tensor, full: Tensor, order: tuple[int, Tensor] | None = None) -> None:
    """Copy into a tensor, of which this process may have a shard only, what is its own of the full one."""
    if order is not None:
        dimension, indices = order
        full = full.index_select(dimension, indices.to(full.device))
    own(target).copy_(full[own_slices(target)])


def own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _splits(tensor: Tensor) -> list[tuple[int, int]]:
    """The axes of the mesh along which a tensor is split, and its dimension that each splits, the first to do so first:
    what tensor parallelism has split, FSDP splits again into shards."""
    if not isinstance(tensor, DTensor):
        return []
    axes = reversed([*enumerate(tensor.placements)])
    return [(axis, placement.dim) for axis, placement in axes if hasattr(placement, "dim")]


def own_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where the shard that this process has of a tensor lies in the full one."""
    bounds = [(0, size) for size in tensor.shape]
    for axis, dimension in _splits(tensor):
        first, last = bounds[dimension]
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        largest = -(-(last - first) // mesh.size(axis))
        start = min(last, first + largest * mesh.get_local_rank(axis))
        bounds[dimension] = (start, min(last, start + largest))
    return tuple(slice(*bound) for bound in bounds)


@torch.no_grad()
def full_tensor(tensor: Tensor, order: tuple[int, Tensor] | None = None) -> Tensor:
    """A tensor as it would be on one process. All processes must call this together."""
    full, sizes = own(tensor), [*tensor.shape]
    steps = []
    for axis, dimension in _splits(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        steps.append((mesh.get_group(axis), dimension, sizes[dimension]))
        largest = -(-sizes[dimension] // mesh.size(axis))
        sizes[dimension] = max(0, min(largest, sizes[dimension] - largest * mesh.get_local_rank(axis)))
    for group, dimension, size in reversed(steps):
        full = _gather(full, group, dimension, size)
    if order is not None:
        dimension, indices = order
        full = full.index_select(dimension, indices.argsort().to(full.device))
    return full


def _gather(part: Tensor, group: dist.ProcessGroup, dimension: int, size: int) -> Tensor:
    """A tensor that is split along a dimension of a size among a group; the last parts may be smaller, or empty."""
    largest = -(-size // group.size())
    padded = part.new_zeros(largest, *part.movedim(dimension, 0).shape[1:])
    padded[: part.shape[dimension]] = part.movedim(dimension, 0)
    gathered = padded.new_empty(group.size() * largest, *padded.shape[1:])
    dist.all_gather_single(gathered, padded, group=group)
    return gathered[:size].movedim(0, dimension)


def num_copies(tensor: Tensor) -> int:
    """How many processes hold each element of a tensor."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    return dist.get_world_size() // math.prod(tensor.device_mesh.size(axis) for axis, _ in _splits(tensor))


def global_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """The 2-norm of all elements of gradients over all processes, in fp64."""
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(num_copies(gradient), []).append(own(gradient))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, parts in by_copies.items():
        norms = torch.stack([norm.double().to(device) for norm in torch._foreach_norm(parts)])
        total += norms.square().sum() / copies
    dist.all_reduce(total)
    return total.sqrt()


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Inside this, every process has all shards at hand, so that many forward passes need no communication but that of
    tensor parallelism."""
    modules = fsdp_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


class CanonicalReduceScatter(ReduceScatter):
    """Sums the gradients of the microbatches of a batch one after another, in their order in the batch, however many
    processes they were shared among: so the sum is bitwise the same.

    As each sum goes on from that of the microbatches before, gradients must be None before each backward pass, and
    end_of_sums() called after the last.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        total = self.total
        for part in parts.chunk(group.size()):
            total = part.clone() if total is None else total.add_(part)
        assert total is not None
        self.total = total
        output_tensor.copy_(total)


def end_of_sums(model: nn.Module) -> None:
    """The gradients of a batch are complete: those of the next are not added to them."""
    for module in fsdp_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if isinstance(group._reduce_scatter_comm, CanonicalReduceScatter):
                group._reduce_scatter_comm.total = None
