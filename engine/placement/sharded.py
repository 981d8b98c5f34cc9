"""Placements in several processes: FSDP shards, tensor parallelism, or both."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.models.adapters import match_structure
from engine.models.layers import find_layers
from engine.models.loading import hf_config_of
from engine.models.parameters import named_aliases
from engine.models.shards import full_tensor, local_shard, rank_and_size
from engine.placement.placement import Placement
from engine.placement.process_group import rank_0_first
from engine.placement.sharding import (
    finish_sums,
    gathered,
    global_norm,
    load_full,
    make_mesh,
    shard_model,
    without_weights,
)
from engine.placement.tensor_parallel import check_divides
from engine.settings.schema import Settings
from utils import UserError

T = TypeVar("T")


class ShardedProcesses(Placement):
    """One process per device; each holds a shard of the weights. See engine/placement/sharding.py."""

    unfused = ("SGD", "Adagrad")

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase, run_dir: Path):
        super().__init__(settings, tokenizer, run_dir)
        self.rank, self.num_ranks = rank_and_size()
        replicas, shards, tensor = self.mesh_shape()
        if shards < 1 or replicas * shards * tensor != self.num_ranks:
            raise UserError(
                "CONFIG",
                f"num_processes: {self.num_ranks} is not a multiple of tensor_parallel_size x fsdp.replicas"
                f" = {tensor} x {replicas}",
                "choose numbers that divide it",
            )
        self.mesh = make_mesh(self.device, (replicas, shards, tensor), settings.collective_timeout)
        self.data_rank, self.num_data_ranks = self.rank // tensor, replicas * shards
        self.compute_dtype = None  # FSDP casts

    def choose_device(self) -> torch.device:
        device = super().choose_device()
        return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device

    def mesh_shape(self) -> tuple[int, int, int]:
        """Numbers of replicas, of shards, and of tensor-parallel processes."""
        raise NotImplementedError

    @property
    def sums_in_order(self) -> bool:
        """Whether gradients are summed in the order of the batch, whatever the world size."""
        return self.settings.deterministic and self.num_data_ranks > 1

    def all_reduce_sum(self, totals: Tensor) -> None:
        dist.all_reduce(totals)
        totals /= self.num_ranks // self.num_data_ranks  # tensor-parallel ranks hold the same values

    def all_reduce_max(self, values: Tensor) -> None:
        dist.all_reduce(values, dist.ReduceOp.MAX)

    def gather_from_data_ranks(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values[:: self.num_ranks // self.num_data_ranks]

    def split_batch(self, examples: Sequence[Example], num_parts: int, token_budget: int) -> list[list[Example]]:
        if not self.settings.deterministic:
            return super().split_batch(examples, num_parts, token_budget)
        # Split as for one rank, so that the world size changes nothing. The last ranks get empty microbatches.
        microbatches = self.split_among(1, examples, num_parts, token_budget)
        return microbatches + [[] for _ in range(-len(microbatches) % self.num_data_ranks)]

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        settings = self.settings
        if self.mesh["tensor"].size() > 1:
            check_divides(hf_config_of(settings.model, self.tokenizer), self.mesh["tensor"].size())
        if settings.model.trust_remote_code:  # every rank needs the model's own code
            hf_config_of(settings.model, self.tokenizer)
        with rank_0_first():
            full = self.load_model(dtype, torch.device("cpu")) if self.rank == 0 else None
        return self._shard(full)

    def place_again(self, dtype: torch.dtype) -> PreTrainedModel:
        full, problem = None, None
        with rank_0_first():
            try:
                full = self.load_model(dtype, torch.device("cpu")) if self.rank == 0 else None
            except (UserError, OSError) as error:
                problem = str(error)
        if problem := self.gather_from_data_ranks(problem)[0]:
            raise OSError(problem)
        return self._shard(full)

    def _shard(self, full: PreTrainedModel | None) -> PreTrainedModel:
        """Split rank 0's model among all ranks."""
        settings = self.settings
        empty = without_weights(full, settings.model.trust_remote_code)
        model = self.compile_layers(match_structure(empty, full, settings))
        self.permutations = shard_model(
            model,
            find_layers(model, settings.model.block_name),
            self.mesh,
            mixed_precision=self.mixed_precision,
            offload=settings.fsdp.cpu_offload,
            deterministic=settings.deterministic,
        )
        load_full(model, full, self.permutations, self.device, settings.fsdp.cpu_offload)
        self.aliases = named_aliases(model)
        return model

    def copy_policy(self, policy: PreTrainedModel) -> PreTrainedModel:
        return self.place_model(getattr(torch, self.settings.model.policy_dtype))

    def gathered(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return gathered(model)

    def parameter_groups(self, policy: PreTrainedModel) -> list[dict[str, Any]]:
        groups: dict[DeviceMesh, list[nn.Parameter]] = {}  # no operation mixes tensors of several meshes
        for parameter in (parameter for parameter in policy.parameters() if parameter.requires_grad):
            groups.setdefault(parameter.device_mesh, []).append(parameter)
        return [{"params": parameters} for parameters in groups.values()]

    def start_backward(self, optimizer: torch.optim.Optimizer) -> None:
        if self.sums_in_order:
            optimizer.zero_grad(set_to_none=True)  # each sum continues from the previous one

    def finish_backward(self, policy: PreTrainedModel) -> None:
        if self.sums_in_order:
            finish_sums(policy)

    def clip_gradients(self, policy: PreTrainedModel) -> Tensor:
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        if self.settings.deterministic:
            norm = nn.utils.get_total_norm([full_tensor(gradient).to(self.device) for gradient in gradients])
        else:
            norm = global_norm(gradients, self.device)
        scale = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local_shard(gradient).mul_(scale.to(gradient.device, gradient.dtype))
        return norm


class FSDP(ShardedProcesses):
    """FSDPTrainer's placement: each process holds a shard of all weights, and trains on other examples."""

    def mesh_shape(self) -> tuple[int, int, int]:
        tensor, replicas = self.settings.tensor_parallel_size or 1, self.settings.fsdp.replicas
        return replicas, self.num_ranks // (replicas * tensor), tensor


class TensorParallel(ShardedProcesses):
    """TensorParallelTrainer's placement: processes split each matrix product, and train on the same examples."""

    def mesh_shape(self) -> tuple[int, int, int]:
        tensor = self.settings.tensor_parallel_size or self.num_ranks
        return 1, self.num_ranks // tensor, tensor
