"""Triton kernels for two elementwise passes over the LM head's logits.

As torch operations they take five passes: largest logit, softmax, largest probability, negation, cast. The kernels
read the logits once for the log-probs and once for the gradient. They write the gradient in the dtype of the next
matrix product.

They compute in fp32, whatever the dtype of the logits. Logits in fp64, and all logits without Triton, go through the
readable twin, engine.step.logprobs.softmax_. Tests compare the two.

Rows of a multiple of 16 logits are loaded in wide pieces, and others one by one. The head pads its rows with -inf.
"""

import torch
from torch import Tensor

from utils import has_c_compiler

try:
    import triton
    import triton.language as tl
except ImportError:  # only CUDA builds of torch bring it
    triton = None

# Logits of a row per program, a power of two, and its warps. 16 logits a thread fit into registers without spilling.
NORMALIZE_BLOCK, NORMALIZE_WARPS = 8192, 16
GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8


def has_triton(device: torch.device) -> bool:
    """Whether the kernels run on a device.

    Triton needs a C compiler for its launchers.
    """
    return device.type == "cuda" and triton is not None and has_c_compiler()


def normalize(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Normalizers and target logits: log p(target) is their difference.

    Args:
        logits: [targets, vocabulary] in fp32, bf16 or fp16. Each row is contiguous; the row stride is free.
        targets: int64 [targets], each in the vocabulary. The kernel does not check this, unlike torch's gather.

    Returns:
        the log-sum-exp of each row and the logit of its target, both fp32 [targets].
    """
    _check(logits, targets)
    normalizer, target_logits = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # with layers on several GPUs, the head's may not be the current one
        _normalize_kernel[(len(logits),)](
            logits,
            targets.contiguous(),
            normalizer,
            target_logits,
            logits.shape[1],
            logits.stride(0),
            block=NORMALIZE_BLOCK,
            num_warps=NORMALIZE_WARPS,
        )
    return normalizer, target_logits


def gradient_of_logits(logits: Tensor, normalizer: Tensor, targets: Tensor, out: Tensor) -> None:
    """Write onehot(target) - softmax(logits), the gradient of the sum of log-probs, to out.

    Args:
        logits, targets: as for normalize.
        normalizer: from normalize, [targets].
        out: [targets, vocabulary] in any float dtype, with contiguous rows; may be logits itself.
    """
    _check(logits, targets, normalizer, out)
    blocks = triton.cdiv(logits.shape[1], GRADIENT_BLOCK)
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(logits), blocks)](
            logits,
            normalizer.contiguous(),
            targets.contiguous(),
            out,
            logits.shape[1],
            logits.stride(0),
            out.stride(0),
            block=GRADIENT_BLOCK,
            num_warps=GRADIENT_WARPS,
        )


def _check(logits: Tensor, targets: Tensor, *others: Tensor) -> None:
    """Check shapes, dtypes and devices.

    The kernels take addresses: a mistake would overwrite other memory.
    """
    rows = len(logits)
    assert logits.ndim == 2 and logits.stride(1) == 1 and logits.dtype != torch.float64, (logits.shape, logits.dtype)
    assert targets.dtype == torch.int64 and targets.shape == (rows,), (targets.dtype, targets.shape)
    assert all(tensor.device == logits.device for tensor in (targets, *others))
    for other in others:
        matches = other.shape == logits.shape and other.stride(1) == 1 if other.ndim == 2 else other.shape == (rows,)
        assert matches, (other.shape, logits.shape)


if triton is not None:
    # Triton reads annotations. An int would be truncated to 32 bits, and a name from outside Triton is an error.
    # Row numbers have 64 bits, as row * stride may pass 2**31. Within a row 32 bits are enough.

    @triton.jit
    def _normalize_kernel(
        logits: tl.tensor,
        targets: tl.tensor,
        normalizer: tl.tensor,
        target_logits: tl.tensor,
        vocabulary: tl.tensor,
        row_stride: tl.tensor,
        block: tl.constexpr,
    ) -> None:
        """Sum exp(logit - maximum so far), one program per row.

        Rescales the sums when the maximum rises.
        """
        row = tl.program_id(0).to(tl.int64)
        row_logits = logits + row * row_stride
        columns = tl.arange(0, block)
        # The lowest finite number. With -inf, the difference to logits of -inf would be NaN.
        maximum = -3.4028234663852886e38
        sums = tl.zeros([block], dtype=tl.float32)  # one a lane, added up after the last block
        for start in range(0, vocabulary, block):
            values = tl.load(row_logits + start + columns, mask=start + columns < vocabulary, other=-float("inf"))
            values = values.to(tl.float32)
            new_maximum = tl.maximum(maximum, tl.max(values, axis=0))
            sums = sums * tl.exp(maximum - new_maximum) + tl.exp(values - new_maximum)
            maximum = new_maximum
        tl.store(normalizer + row, maximum + tl.log(tl.sum(sums, axis=0)))
        tl.store(target_logits + row, tl.load(row_logits + tl.load(targets + row)).to(tl.float32))

    @triton.jit
    def _gradient_kernel(
        logits: tl.tensor,
        normalizer: tl.tensor,
        targets: tl.tensor,
        out: tl.tensor,
        vocabulary: tl.tensor,
        row_stride: tl.tensor,
        out_stride: tl.tensor,
        block: tl.constexpr,
    ) -> None:
        """Write the gradient, one program per row and block.

        Where out is logits, a program reads only the logits it overwrites.
        """
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        within = columns < vocabulary
        values = tl.load(logits + row * row_stride + columns, mask=within, other=0.0).to(tl.float32)
        softmax = tl.exp(values - tl.load(normalizer + row))
        onehot = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
        tl.store(out + row * out_stride + columns, (onehot - softmax).to(out.dtype.element_ty), mask=within)
