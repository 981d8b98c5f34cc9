"""RMSprop in one Triton kernel per parameter, for GPUs.

torch's version makes a temporary as large as all weights. It needs the host to skip an update of NaN or Inf, and the
host would wait for the GPU. The readable twin is torch.optim.RMSprop(foreach=False). Tests compare the two.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engine.models.shards import local_shard
from utils import has_c_compiler

try:
    import triton
    import triton.language as tl
except ImportError:  # only CUDA builds of torch bring it
    triton = None

BLOCK, WARPS = 1024, 4  # weights of a program, a power of two; 8 a thread, in two or four wide loads
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_triton() -> bool:
    """Whether Triton can build kernels. It needs a C compiler for its launchers."""
    return triton is not None and has_c_compiler()


def runs_on(parameters: Iterable[Tensor]) -> bool:
    """Whether FusedRMSprop can train parameters, or their local shards."""
    return has_triton() and all(
        parameter.device.type == "cuda" and parameter.dtype in DTYPES and local_shard(parameter).is_contiguous()
        for parameter in parameters
    )


class FusedRMSprop(torch.optim.RMSprop):
    """torch.optim.RMSprop without momentum, in one kernel per parameter.

    - Its state has the names, shapes and dtypes of torch's. So each loads checkpoints of the other.
    - All is computed in fp32. Weights and state are rounded once, in their dtype.
    - Sharded parameters are updated by their local shards.

    Attributes:
        found_inf: 1.0 in a scalar on a device skips the update; 0.0 or None does not. torch's fused optimizers and
            torch.amp.GradScaler share this contract.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, lr=lr, capturable=True)  # steps are counted on the device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters with a gradient."""
        assert closure is None and self.grad_scale is None
        found_inf: dict[torch.device, Tensor] = {}  # layers may be split among GPUs
        for group in self.param_groups:
            assert not (group["momentum"] or group["weight_decay"] or group["centered"] or group["maximize"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, device = self.state[parameter], parameter.device
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                    state["square_avg"] = torch.zeros_like(parameter)
                if device not in found_inf:
                    given = self.found_inf
                    found_inf[device] = torch.zeros((), device=device) if given is None else given.to(device)
                rmsprop_(
                    local_shard(parameter),
                    local_shard(parameter.grad),
                    local_shard(state["square_avg"]),
                    state["step"],
                    found_inf[device],
                    lr=group["lr"],
                    alpha=group["alpha"],
                    eps=group["eps"],
                )


def rmsprop_(
    weights: Tensor,
    gradient: Tensor,
    square_avg: Tensor,
    num_steps: Tensor,
    found_inf: Tensor,
    *,
    lr: float,
    alpha: float,
    eps: float,
) -> None:
    """Update weights, square_avg and num_steps in place, or none of them if found_inf is 1.

    Args:
        weights, gradient, square_avg: of one shape, in DTYPES.
        num_steps, found_inf: fp32 scalars.
    """
    gradient = gradient.contiguous()
    # The kernel takes addresses: a mistake would overwrite other memory.
    assert weights.shape == gradient.shape == square_avg.shape
    assert weights.is_contiguous() and square_avg.is_contiguous()
    assert num_steps.shape == found_inf.shape == () and num_steps.dtype == found_inf.dtype == torch.float32
    assert {tensor.device for tensor in (gradient, square_avg, num_steps, found_inf)} == {weights.device}
    num_blocks = max(1, triton.cdiv(weights.numel(), BLOCK))  # an empty shard counts its steps too
    with torch.cuda.device_of(weights):
        _rmsprop_kernel[(num_blocks,)](
            weights,
            gradient,
            square_avg,
            num_steps,
            found_inf,
            weights.numel(),
            lr,
            alpha,
            1 - alpha,
            eps,
            block=BLOCK,
            num_warps=WARPS,
        )


if triton is not None:
    # Triton reads annotations. See engine/step/head_kernels.py.

    @triton.jit
    def _rmsprop_kernel(
        weights: tl.tensor,
        gradient: tl.tensor,
        square_avg: tl.tensor,
        num_steps: tl.tensor,
        found_inf: tl.tensor,
        num_weights: tl.tensor,
        lr: tl.tensor,
        alpha: tl.tensor,
        one_minus_alpha: tl.tensor,
        eps: tl.tensor,
        block: tl.constexpr,
    ) -> None:
        """Update a block of weights. The first program counts the step."""
        program = tl.program_id(0).to(tl.int64)  # a weight may have more than 2**31 elements
        places = program * block + tl.arange(0, block)
        is_skipped = tl.load(found_inf)
        within = places < tl.where(is_skipped == 0, num_weights, 0)
        grad = tl.load(gradient + places, mask=within, other=0.0).to(tl.float32)
        average = tl.load(square_avg + places, mask=within, other=0.0).to(tl.float32)
        average = average * alpha + one_minus_alpha * grad * grad
        # Exact roots and quotients, as in torch. Memory is slower than either.
        change = tl.div_rn(lr * grad, tl.sqrt_rn(average) + eps)
        updated = tl.load(weights + places, mask=within, other=0.0).to(tl.float32) - change
        tl.store(square_avg + places, average.to(square_avg.dtype.element_ty), mask=within)
        tl.store(weights + places, updated.to(weights.dtype.element_ty), mask=within)
        is_first = program == 0
        tl.store(num_steps, tl.load(num_steps, mask=is_first, other=0.0) + 1 - is_skipped, mask=is_first)
