"""Matrix products of low dtype with sums in fp32.

Tensor cores of a GPU take bf16 or fp16, and sum and return fp32. CPU products in low dtype return low dtype.
"""

from functools import cache

import torch
from torch import Tensor

# A GPU's products of an odd number of rows take up to eight times as long.
ROW_MULTIPLE = 64


def has_wide_products(device: torch.device) -> bool:
    """Whether products of bf16 or fp16 can return fp32 on a device."""
    return device.type == "cuda"


def copy_for_products(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in dtype, with rows of zeros up to ROW_MULTIPLE on a GPU.

    It is the weight itself where that has both already.
    """
    weight, num_rows = weight.detach(), len(weight)
    padding = -num_rows % ROW_MULTIPLE if has_wide_products(weight.device) else 0
    if not padding:
        return weight.to(dtype)
    copy = weight.new_empty(num_rows + padding, *weight.shape[1:], dtype=dtype)
    copy[:num_rows], copy[num_rows:] = weight, 0
    return copy


def add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Add left @ right to total in place; None starts a total.

    Args:
        dtype: of the total. A product is rounded to its own dtype first only where the device has no other.
    """
    if left.dtype == dtype:
        return left @ right if total is None else total.addmm_(left, right)
    if not has_wide_products(left.device):
        return (left @ right).to(dtype) if total is None else total.add_(left @ right)
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
