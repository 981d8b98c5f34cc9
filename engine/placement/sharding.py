"""Split a model among processes with FSDP2, and with tensor parallelism inside of it."""

import math
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
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
from transformers import PreTrainedModel

from engine.models.adapters import adapter_of
from engine.models.precision import cast_embeddings, rounded_shards
from engine.models.score_head import AUTO_CLASSES, has_score_head, head_of, train_all_embeddings
from engine.models.shards import ShardPermutations, copy_to_shard, local_shard, split_axes
from engine.placement.tensor_parallel import split_products
from engine.step.attention import register_packed_attention
from engine.step.heads import run_unsharded_head, run_unsharded_reference
from utils import UserError


def make_mesh(device: torch.device, shape: tuple[int, int, int], timeout_s: int) -> DeviceMesh:
    """The mesh of all processes. Neighbours are tensor-parallel ranks: they communicate the most.

    Args:
        shape: numbers of replicas, of shards, and of tensor-parallel processes.
        timeout_s: seconds until a collective fails.
    """
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard", "tensor"))
    for group in mesh.get_all_groups():  # torch gives new groups its default, not that of all processes
        if dist.get_backend(group) == "fake":  # of a plan
            continue
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
    return mesh


def without_weights(full: PreTrainedModel | None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Rank 0's model on every rank, without weights, on the meta device."""
    config_of_rank_0: list[Any] = [None]
    if full is not None:
        attention = full.config._attn_implementation
        original_attention = getattr(full, "original_attention", attention)
        head = "score" if has_score_head(full) else "lm"
        config_of_rank_0 = [(full.config, full.generation_config, attention, original_attention, head)]
    dist.broadcast_object_list(config_of_rank_0, src=0)
    config, generation_config, attention, original_attention, head = config_of_rank_0[0]
    register_packed_attention()
    with torch.device("meta"):
        model = AUTO_CLASSES[head].from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    if head == "score":
        train_all_embeddings(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.generation_config = generation_config
    model.config._attn_implementation = attention
    model.original_attention = original_attention  # for sampling
    return model.eval()


def shard_model(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    mixed_precision: torch.dtype | None,
    offload: bool,
    deterministic: bool,
) -> ShardPermutations:
    """Split a model on the meta device in place. It still has no weights afterwards.

    Args:
        layers: their weights are gathered one layer at a time.
        mixed_precision: the dtype of all but embeddings and head, as in precision.run_in_dtype.
        offload: keep the shards in CPU memory.
        deterministic: sum gradients by CanonicalReduceScatter.

    Returns:
        the permutations of parameters split by tensor parallelism.

    Raises:
        UserError: CONFIG, if the trained weights of a layer have several dtypes.
    """
    if adapter_of(model) is not None:
        _check_one_dtype(layers)
    permutations = split_products(model, mesh["tensor"]) if mesh["tensor"].size() > 1 else {}
    offload_policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()

    def shard(module: nn.Module, dtype: torch.dtype | None) -> None:
        fully_shard(
            module,
            mesh=mesh["replica", "shard"] if mesh["replica"].size() > 1 else mesh["shard"],
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None),
            offload_policy=offload_policy,
            reshard_after_forward=True,  # the root too: outside of a forward pass, all parameters are shards
        )

    embeddings, head = model.get_input_embeddings(), head_of(model)
    for layer in layers:
        shard(layer, mixed_precision)
    if has_score_head(model):
        shard(head, None)  # in fp32 beside weights of another dtype
    if mixed_precision is not None:
        in_layers = {module for layer in layers for module in layer.modules()}
        for module in model.modules():  # the final norm, position embeddings: their dtype differs from the root's
            if module not in in_layers and module not in (embeddings, head) and [*module.parameters(recurse=False)]:
                shard(module, mixed_precision)
        embeddings.register_forward_hook(partial(cast_embeddings, mixed_precision))
        model.rounded_shards = partial(rounded_shards, model, permutations)
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    shard(model, None)
    _sum_gradients(model, deterministic)
    _add_head_methods(model)
    return permutations


def _sum_gradients(model: PreTrainedModel, deterministic: bool) -> None:
    """Sum gradients over processes, not their means."""
    model.canonical_sums = []
    for module in fsdp_modules(model):
        # Losses are divided by the global count already, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if deterministic:
            model.canonical_sums.append(CanonicalReduceScatter())
            module.set_custom_reduce_scatter(model.canonical_sums[-1])


def _add_head_methods(model: PreTrainedModel) -> None:
    """Give a sharded model the methods of engine.step.heads. They gather the LM head's weight."""
    model.run_sharded = types.MethodType(run_unsharded_head, model)
    model.run_sharded_reference = types.MethodType(run_unsharded_reference, model)
    for name in ("run_sharded", "run_sharded_reference"):
        register_fsdp_forward_method(model, name)
    model.head_at_hand = types.MethodType(_head_at_hand, model)


def _check_one_dtype(layers: Sequence[nn.Module]) -> None:
    """Raise a UserError if a layer's trained weights have several dtypes.

    FSDP cannot mix them.
    """
    for layer in layers:
        dtypes = {p.dtype: name for name, p in layer.named_parameters() if p.requires_grad}
        if len(dtypes) > 1:
            low = min(dtypes, key=lambda dtype: dtype.itemsize)
            shown = str(low).removeprefix("torch.")
            problem = f"peft: {dtypes[low]} trains in {shown} beside adapters in fp32; FSDP cannot mix them"
            raise UserError("CONFIG", problem, f"set mixed_precision={shown} in place of that dtype")


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def load_full(
    model: PreTrainedModel,
    full: PreTrainedModel | None,
    permutations: ShardPermutations,
    device: torch.device,
    offload: bool,
) -> None:
    """Copy the weights of rank 0's full model into the shards of all ranks, one tensor at a time."""
    model.to_empty(device="cpu" if offload else device)

    def from_rank_0(tensor: Tensor | None, like: Tensor) -> Tensor:
        if tensor is None:
            tensor = torch.empty(like.shape, dtype=like.dtype)
        tensor = tensor.detach().to(device, like.dtype).contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    parameters = dict(full.named_parameters()) if full is not None else {}
    for name, parameter in model.named_parameters():
        copy_to_shard(parameter, from_rank_0(parameters.get(name), parameter), permutations.get(name))
    # Buffers too. No state dict holds some of them, such as rotary frequencies.
    buffers = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in model.named_buffers():
        buffer.copy_(from_rank_0(buffers.get(name), buffer))
    if offload:  # operations combine buffers with activations on the device
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)


def num_copies(tensor: Tensor) -> int:
    """The number of processes holding each element of a tensor."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    return dist.get_world_size() // math.prod(tensor.device_mesh.size(axis) for axis, _ in split_axes(tensor))


def global_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """The 2-norm of all gradients over all processes, in fp64."""
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(num_copies(gradient), []).append(local_shard(gradient))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, parts in by_copies.items():
        norms = torch.stack([norm.double().to(device) for norm in torch._foreach_norm(parts)])
        total += norms.square().sum() / copies
    dist.all_reduce(total)
    return total.sqrt()


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Keep all shards gathered inside a with block. Forward passes then gather nothing."""
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


@contextmanager
def _head_at_hand(model: FSDPModule) -> Iterator[None]:
    """Keep the weights outside of the layers gathered after a forward pass, until the end of a with block."""
    model.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True, recurse=False)
        model.reshard()


class CanonicalReduceScatter(ReduceScatter):
    """Sums the gradients of microbatches one by one, in their order in the batch.

    So the sum is bitwise the same for every world size. Each sum continues from the previous microbatches. So
    gradients must be None before each backward pass, and finish_sums() must follow the last one.
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


def finish_sums(model: PreTrainedModel) -> None:
    """Reset the sums after a batch. The next batch starts from zero."""
    for sums in model.canonical_sums:
        sums.total = None
