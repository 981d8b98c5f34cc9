"""Matrix products of low dtype with sums in fp32.

Tensor cores of a GPU take bf16 or fp16, and sum and return fp32. CPU products in low dtype return low dtype. But a CPU
with matrix units (AMX) can take fp32, round it to bf16 on the way, and sum and return fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from engine.models.rounding import Thresholds, round_by

ROW_MULTIPLE = 64  # a GPU's products of an odd number of rows take up to eight times as long
BLOCK = 4096  # rows of a weight at a time, where a result of all rows would take much memory


def has_wide_products(device: torch.device) -> bool:
    """Whether products of bf16 or fp16 can return fp32 on a device."""
    return device.type == "cuda"


def takes_low_weight(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products that return fp32 are quicker with a weight in dtype than in fp32."""
    on_cpu = device.type == "cpu" and dtype == torch.bfloat16 and cpu_rounds_products()
    return on_cpu or has_wide_products(device)


@cache
def cpu_rounds_products() -> bool:
    """Whether products of fp32 round their factors to bf16 on this CPU where that is allowed.

    oneDNN does so where it has matrix units. Its other kernels ignore the setting.
    """
    size = 64  # below 32 x 32 torch does not call oneDNN
    with _rounded_products():
        product = torch.full((size, size), 1 + 2**-10) @ torch.eye(size)
    return bool((product == 1).all())


@contextmanager
def _rounded_products() -> Iterator[None]:
    """Allow it in a with block, to all threads of the process."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def wide_product(inputs: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write inputs @ weight.T to out, summed in its dtype.

    Args:
        inputs: [rows, columns], in the dtype of out or a lower one.
        weight: [columns of out, columns]; in the dtype of inputs if takes_low_weight(), else in that of out.
    """
    if has_wide_products(inputs.device) and inputs.dtype != out.dtype:
        torch.mm(inputs, weight.T, out_dtype=out.dtype, out=out)
    elif weight.dtype == out.dtype:
        torch.mm(inputs.to(out.dtype), weight.T, out=out)
    else:  # a CPU takes fp32: a copy of all rows would need twice the memory of the weight
        wide_inputs = inputs.to(out.dtype)
        with _rounded_products():  # of factors that are bf16 already
            for start in range(0, len(weight), BLOCK):
                part = slice(start, start + BLOCK)
                torch.mm(wide_inputs, weight[part].to(out.dtype).T, out=out[:, part])


def copy_for_products(weight: Tensor, dtype: torch.dtype, thresholds: Thresholds | None = None) -> Tensor:
    """A weight in dtype, with rows of zeros up to ROW_MULTIPLE on a GPU.

    It is the weight itself where that has both already.

    Args:
        thresholds: to round to bf16 by; None to round to the nearest.
    """
    weight, num_rows = weight.detach(), len(weight)
    padding = -num_rows % ROW_MULTIPLE if has_wide_products(weight.device) else 0
    if not padding and thresholds is None:
        return weight.to(dtype)
    copy = weight.new_empty(num_rows + padding, *weight.shape[1:], dtype=dtype)
    copy[num_rows:] = 0
    if thresholds is None:
        copy[:num_rows] = weight
        return copy
    for start in range(0, num_rows, BLOCK):  # all rows at once would take five times the memory of the copy
        part = slice(start, min(start + BLOCK, num_rows))
        copy[part] = round_by(weight[part], Thresholds(thresholds.rows[part], thresholds.columns))
    return copy


def add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Add left @ right to total in place; None starts a total.

    Args:
        dtype: of the total. A product is rounded to its own dtype first only where the device has no other.
    """
    if left.dtype == dtype:
        return left @ right if total is None else total.addmm_(left, right)
    if not has_wide_products(left.device):
        total = left.new_zeros(len(left), right.shape[1], dtype=dtype) if total is None else total
        for start in range(0, len(left), BLOCK):  # a product of all rows would need half of the total's memory
            part = slice(start, start + BLOCK)
            total[part].add_(left[part] @ right)
        return total
    if total is None:
        return torch.mm(left, right, out_dtype=dtype)
    if _can_add_in_place(left.device, left.dtype, dtype):
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    return total.add_(torch.mm(left, right, out_dtype=dtype))


@cache
def _can_add_in_place(device: torch.device, low: torch.dtype, wide: torch.dtype) -> bool:
    """Whether torch adds a product of low dtype to a wide total.

    Older versions want one dtype for all.
    """
    total, factor = torch.zeros(16, 16, dtype=wide, device=device), torch.ones(16, 16, dtype=low, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=wide, out=total)
    except (TypeError, RuntimeError) as error:  # out of memory is a RuntimeError too
        if isinstance(error, TypeError | NotImplementedError) or "dtype" in str(error):
            return False
        raise
    return True
