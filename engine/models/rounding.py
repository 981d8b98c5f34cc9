"""Copies of fp32 weights in bf16, rounded up or down by a fixed threshold of each weight.

Rounded to the nearest, copies hide updates below half a step of bf16. By thresholds, copies of many weights show small
updates on average. An update by a hundredth of a step tips a hundredth of the copies.

- A threshold depends on the name of the weight and the place in it. Policy and reference have the same: before the
  first update they are equal, bitwise. Later, only the copies of changed weights differ.
- So thresholds are in no checkpoint, and cached log-probs of a reference serve all runs.
- Values of bf16 stay as they are.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from engine.models.shards import local_shard, shard_slices
from utils import content_hash

CUT_OFF = 16  # lower bits of fp32, not in bf16


class RoundedCopy(torch.autograd.Function):
    """round_by() of fp32 values; their gradients are those of the copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, thresholds: Tensor) -> Tensor:
        return round_by(values, thresholds)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


def has_thresholds(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast to dtype rounds by thresholds; else to the nearest."""
    return values.dtype == torch.float32 and dtype == torch.bfloat16 and values.dim() > 0


def round_by(values: Tensor, thresholds: Tensor) -> Tensor:
    """Round fp32 values to bf16, away from 0 or towards it.

    Away from 0, if the lower bits and the threshold add up to a step of bf16.

    Args:
        thresholds: int32 below 2^16, in the shape of values.
    """
    bits = values.nan_to_num(torch.nan, torch.inf, -torch.inf).view(torch.int32)  # one NaN: others may carry to 0
    return bits.add_(thresholds).bitwise_right_shift_(CUT_OFF).to(torch.int16).view(torch.bfloat16)


def weight_thresholds(name: str, weight: Tensor, permutation: tuple[int, Tensor] | None = None) -> Tensor:
    """Thresholds of this rank's shard of a weight, int32.

    Args:
        permutation: of the rows or columns of the full weight, before it is split.
    """
    device, slices = local_shard(weight).device, shard_slices(weight)
    axes = [_draws(name, dimension, size, device) for dimension, size in enumerate(weight.shape)]
    if permutation is not None:
        dimension, indices = permutation
        axes[dimension] = axes[dimension][indices.to(device)]
    return _combined([axis[part] for axis, part in zip(axes, slices, strict=True)])


def embedding_thresholds(tokens: Tensor, num_embeddings: int, embeddings: Tensor) -> Tensor:
    """Thresholds of embeddings [..., hidden size] of tokens [...], int32.

    They are those of the token, wherever it stands.
    """
    device = embeddings.device
    of_token = _draws("embeddings", 0, num_embeddings, device)[tokens.to(device)]
    return of_token[..., None] ^ _draws("embeddings", 1, embeddings.shape[-1], device)


def _draws(name: str, dimension: int, size: int, device: torch.device) -> Tensor:
    """Random numbers below 2^16 for a dimension of a weight, int32 [size].

    Each call returns the same. It draws on the device: a copy from the host would wait for a GPU.
    """
    generator = torch.Generator(device).manual_seed(int(content_hash([name, dimension])[:15], 16))
    return torch.randint(1 << CUT_OFF, (size,), generator=generator, dtype=torch.int32, device=device)


def _combined(axes: list[Tensor]) -> Tensor:
    """Combine the numbers of all dimensions, int32 [size of each axis, ...].

    The results are uniform, and any two are independent. Mean and variance of an update in the copies depend on no
    more. A draw for each weight would take several times as long.
    """
    shapes = ([-1] + [1] * (len(axes) - 1 - dimension) for dimension in range(len(axes)))
    return reduce(torch.bitwise_xor, (axis.view(shape) for axis, shape in zip(axes, shapes, strict=True)))
