"""Copies of fp32 weights in bf16, rounded up or down by a fixed threshold of each weight.

Rounded to the nearest, copies hide updates below half a step of bf16. By thresholds, copies of many weights show small
updates on average. An update by a hundredth of a step tips a hundredth of the copies.

- A threshold depends on the name of the weight and the place in it. Policy and reference have the same: before the
  first update they are equal, bitwise. Later, only the copies of changed weights differ.
- So thresholds are in no checkpoint, and cached log-probs of a reference serve all runs.
- Values of bf16 stay as they are.
"""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from engine.models import rounding_kernel
from engine.models.shards import local_shard, shard_slices
from utils import content_hash

CUT_OFF = 16  # lower bits of fp32, not in bf16


class Thresholds(NamedTuple):
    """A threshold for each value: rows[i] ^ columns[j], below 2^16.

    Args:
        rows: int32 [rows]; all but the last dimension of the values.
        columns: int32 [columns]; their last dimension.
    """

    rows: Tensor
    columns: Tensor


class RoundedCopy(torch.autograd.Function):
    """round_by() of fp32 values; their gradients are those of the copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, thresholds: Thresholds) -> Tensor:
        return round_by(values, thresholds)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


def has_thresholds(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast to dtype rounds by thresholds; else to the nearest."""
    return values.dtype == torch.float32 and dtype == torch.bfloat16 and values.dim() > 0


def round_by(values: Tensor, thresholds: Thresholds) -> Tensor:
    """Round fp32 values to bf16, away from 0 or towards it.

    Away from 0, if the lower bits and the threshold add up to a step of bf16. On a GPU in one kernel.
    """
    if rounding_kernel.runs_on(values):
        return rounding_kernel.round_by(values, *thresholds)
    bits = values.nan_to_num(torch.nan, torch.inf, -torch.inf).view(torch.int32)  # one NaN: others may carry to 0
    of_values = (thresholds.rows[:, None] ^ thresholds.columns).view(values.shape)
    return bits.add_(of_values).bitwise_right_shift_(CUT_OFF).to(torch.int16).view(torch.bfloat16)


def weight_thresholds(name: str, weight: Tensor, permutation: tuple[int, Tensor] | None = None) -> Thresholds:
    """Thresholds of this rank's shard of a weight.

    Args:
        permutation: of the rows or columns of the full weight, before it is split.
    """
    device, slices = local_shard(weight).device, shard_slices(weight)
    axes = [_draws(name, dimension, size, device) for dimension, size in enumerate(weight.shape)]
    if permutation is not None:
        dimension, indices = permutation
        axes[dimension] = axes[dimension][indices.to(device)]
    *rows, columns = (axis[part] for axis, part in zip(axes, slices, strict=True))
    return Thresholds(_combined(rows) if rows else columns.new_zeros(1), columns)


def embedding_thresholds(tokens: Tensor, num_embeddings: int, embeddings: Tensor) -> Thresholds:
    """Thresholds of embeddings [..., hidden size] of tokens [...].

    They are those of the token, wherever it stands.
    """
    device = embeddings.device
    of_token = _draws("embeddings", 0, num_embeddings, device)[tokens.to(device)]
    return Thresholds(of_token.flatten(), _draws("embeddings", 1, embeddings.shape[-1], device))


# (name of a weight, dimension, size, device) -> numbers; of all weights together, they are as small as a few biases
_drawn: dict[tuple[str, int, int, torch.device], Tensor] = {}


def _draws(name: str, dimension: int, size: int, device: torch.device) -> Tensor:
    """Random numbers below 2^16 for a dimension of a weight, int32 [size].

    They are drawn once, on the device: a copy from the host would wait for a GPU.
    """
    key = name, dimension, size, device
    is_real = device.type != "meta" and _get_current_dispatch_mode() is None  # not a simulation
    if is_real and key in _drawn:
        return _drawn[key]
    generator = torch.Generator(device).manual_seed(int(content_hash([name, dimension])[:15], 16))
    numbers = torch.randint(1 << CUT_OFF, (size,), generator=generator, dtype=torch.int32, device=device)
    if is_real:
        _drawn[key] = numbers
    return numbers


def _combined(axes: list[Tensor]) -> Tensor:
    """Combine the numbers of several dimensions, int32 [product of their sizes].

    The results are uniform, and any two are independent. Mean and variance of an update in the copies depend on no
    more. A draw for each weight would take several times as long.
    """
    shapes = ([-1] + [1] * (len(axes) - 1 - dimension) for dimension in range(len(axes)))
    return reduce(torch.bitwise_xor, (axis.view(shape) for axis, shape in zip(axes, shapes, strict=True))).flatten()
