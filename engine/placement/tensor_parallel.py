"""Tensor parallelism: split the matrix products of a model among processes."""

import re
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.models.score_head import has_score_head, head_of
from engine.models.shards import all_gather
from utils import UserError

# Plans missing in transformers: module -> style. fused_colwise: queries, keys and values in one matrix.
PLANS = {
    "gpt2": {
        "h.*.attn.c_attn": "fused_colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
}
STYLES = ("colwise", "rowwise", "fused_colwise", "replicated_with_grad_allreduce")


class _Copy(torch.autograd.Function):
    """Identity forward, all-reduce backward: the tensor is the same on all ranks of a group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """All-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    """All-gather forward, slice backward, along the last dimension."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, total: int) -> Tensor:
        largest = -(-total // group.size())  # size of a part; the last ones may be smaller
        ctx.rank_slice = slice(group.rank() * largest, group.rank() * largest + part.shape[-1])
        padded = F.pad(part, (0, largest - part.shape[-1]))
        gathered = padded.new_empty(group.size() * len(padded), *padded.shape[1:])
        all_gather(gathered, padded, group)
        return gathered.view(group.size(), *padded.shape).movedim(0, -2).flatten(-2)[..., :total].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[..., ctx.rank_slice].contiguous(), None, None


def _summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def check_divides(hf_config: PretrainedConfig, size: int) -> dict[str, str]:
    """The plan for splitting a model among size processes; it needs no weights.

    Raises:
        UserError: CONFIG if no plan fits.
    """
    name, fix = hf_config.model_type, "trainer=FSDPTrainer splits any model"
    plan = dict(PLANS.get(name) or getattr(hf_config, "base_model_tp_plan", None) or {})
    plan.pop("embed_tokens", None)  # split_products splits the embeddings of every model
    unknown = sorted(set(plan.values()) - set(STYLES))
    if not plan or unknown:
        reason = f"its plan has {', '.join(unknown)}" if unknown else "it has no plan for tensor parallelism"
        raise UserError("CONFIG", f"tensor_parallel_size: {name} cannot be split: {reason}", fix)
    heads = {
        key: getattr(hf_config, key, None) or hf_config.num_attention_heads
        for key in ("num_attention_heads", "num_key_value_heads")
    }
    for key, count in heads.items():
        if count % size:
            divisors = [str(number) for number in range(2, count + 1) if all(n % number == 0 for n in heads.values())]
            fix = f"tensor_parallel_size={' or '.join(divisors)}" if divisors else fix
            raise UserError(
                "CONFIG",
                f"tensor_parallel_size: {size} does not divide the model's {count} {key.replace('num_', '')}",
                fix,
            )
    return plan


def split_products(model: PreTrainedModel, mesh: DeviceMesh) -> dict[str, tuple[int, Tensor]]:
    """Split a model on the meta device in place among the processes of a mesh of one dimension.

    Split parameters become DTensors; modules compute with their local shards.

    Returns:
        name of a parameter -> dimension, permutation of its rows or columns; for parameters with scattered shards.
    """
    plan = check_divides(model.config, mesh.size())
    permutations: dict[str, tuple[int, Tensor]] = {}
    prefix = model.base_model_prefix
    for name, module in model.base_model.named_modules():
        style = next((plan[pattern] for pattern in plan if re.fullmatch(_regex(pattern), name)), None)
        if style == "rowwise":
            _split_rows(module, mesh)
        elif style == "replicated_with_grad_allreduce":
            _sum_gradients(module, mesh)
        elif style is not None:
            _split_columns(module, mesh)
            if style == "fused_colwise":
                width = module.weight.shape[1] // 3
                order = torch.arange(3 * width).view(3, mesh.size(), -1).transpose(0, 1).flatten()
                permutations[f"{prefix}.{name}.weight"] = 1, order
                permutations[f"{prefix}.{name}.bias"] = 0, order
        if hasattr(module, "split_size"):  # in GPT-2's attention
            module.split_size //= mesh.size()
    embeddings, head = model.get_input_embeddings(), head_of(model)
    _split_embedding(embeddings, mesh)
    if has_score_head(model):  # too small to split
        return permutations
    _split_columns(head, mesh, gathers_outputs=True)
    if model.config.tie_word_embeddings:
        head.weight = embeddings.weight
    return permutations


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"\d+")


def _split(module: nn.Module, name: str, mesh: DeviceMesh, dimension: int) -> None:
    parameter = getattr(module, name)
    part = distribute_tensor(parameter, mesh, [Shard(dimension)], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _split_columns(module: nn.Module, mesh: DeviceMesh, gathers_outputs: bool = False) -> None:
    """Each process computes some outputs of a Linear or Conv1D.

    Args:
        gathers_outputs: all processes get all outputs.
    """
    is_transposed, total = isinstance(module, Conv1D), _num_outputs(module)
    _split(module, "weight", mesh, 1 if is_transposed else 0)
    if module.bias is not None:
        _split(module, "bias", mesh, 0)
    group = mesh.get_group()

    def forward(self: Any, inputs: Tensor) -> Tensor:
        weight, bias = self.weight.to_local(), None if self.bias is None else self.bias.to_local()
        outputs = F.linear(_Copy.apply(inputs, group), weight.T if is_transposed else weight, bias)
        return _Gather.apply(outputs, group, total) if gathers_outputs else outputs

    module.forward = MethodType(forward, module)


def _split_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """Each process has some inputs of a Linear or Conv1D; all get the sum."""
    is_transposed = isinstance(module, Conv1D)
    _split(module, "weight", mesh, 0 if is_transposed else 1)
    group = mesh.get_group()

    def forward(self: Any, inputs: Tensor) -> Tensor:
        weight = self.weight.to_local()
        outputs = _Sum.apply(F.linear(inputs, weight.T if is_transposed else weight), group)
        return outputs if self.bias is None else outputs + self.bias

    module.forward = MethodType(forward, module)


def _split_embedding(module: nn.Module, mesh: DeviceMesh) -> None:
    """Each process has the embeddings of some tokens."""
    first = -(-len(module.weight) // mesh.size()) * mesh.get_local_rank()  # type: ignore[arg-type]
    _split(module, "weight", mesh, 0)
    group = mesh.get_group()

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        weight = self.weight.to_local()
        rows = input_ids - first
        is_local = (rows >= 0) & (rows < len(weight))
        return _Sum.apply(F.embedding(rows.where(is_local, 0), weight) * is_local[..., None], group)

    module.forward = MethodType(forward, module)


def _sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Every process has the full norm, and applies it to its local heads."""
    group, original = mesh.get_group(), module.forward

    def forward(self: Any, inputs: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        self._parameters["weight"] = _Copy.apply(weight, group)
        try:
            return original(inputs)
        finally:
            self._parameters["weight"] = weight

    module.forward = MethodType(forward, module)


def _num_outputs(module: nn.Module) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features  # type: ignore[return-value]
