"""Rounding by thresholds in one Triton kernel, for GPUs.

As single operations it moves six times as many bytes. The readable twin is round_by() of rounding.py.
"""

import torch
from torch import Tensor

from engine.models.rmsprop_kernel import has_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # only CUDA builds of torch bring it
    triton = None

BLOCK, WARPS = 1024, 4  # values of a program, all in one row
MOST_COLUMN_BLOCKS = 65_535  # of a launch


def runs_on(values: Tensor) -> bool:
    """Whether the kernel can round values."""
    return (
        values.device.type == "cuda"
        and values.dtype == torch.float32
        and values.is_contiguous()
        and 0 < values.shape[-1] <= MOST_COLUMN_BLOCKS * BLOCK
        and has_triton()
    )


def round_by(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Round fp32 values to bf16 by the thresholds rows[i] ^ columns[j]; see Thresholds."""
    assert values.numel() == len(rows) * len(columns) and values.is_contiguous()
    rows, columns = rows.contiguous(), columns.contiguous()
    copy = torch.empty_like(values, dtype=torch.bfloat16)
    if values.numel():
        grid = len(rows), triton.cdiv(len(columns), BLOCK)
        with torch.cuda.device_of(values):
            _round_kernel[grid](
                values, rows, columns, copy.view(torch.int16), len(columns), block=BLOCK, num_warps=WARPS
            )
    return copy


if triton is not None:
    # Triton reads annotations. See engine/step/head_kernels.py.

    @triton.jit
    def _round_kernel(
        values: tl.tensor,
        rows: tl.tensor,
        columns: tl.tensor,
        copy: tl.tensor,
        num_columns: tl.tensor,
        block: tl.constexpr,
    ) -> None:
        """Round a part of a row."""
        row = tl.program_id(0).to(tl.int64)  # a weight may have more than 2**31 elements
        places = tl.program_id(1) * block + tl.arange(0, block)
        within = places < num_columns
        value = tl.load(values + row * num_columns + places, mask=within, other=0.0)
        bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))  # one NaN: others may carry to 0
        threshold = tl.load(rows + row) ^ tl.load(columns + places, mask=within, other=0)
        tl.store(copy + row * num_columns + places, ((bits + threshold) >> 16).to(tl.int16), mask=within)
