"""Optimizers by name: torch's, and those of bitsandbytes that keep their state in 8 bits or in paged memory."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from utils import quiet_bitsandbytes


def build_optimizer(name: str, groups: list[dict[str, Any]], lr: float, may_fuse: bool = True) -> torch.optim.Optimizer:
    """An optimizer of torch, as one fused pass over the weights where it has that and may, or of bitsandbytes."""
    kind = getattr(torch.optim, name, None)
    if kind is not None:
        fused = {"fused": True} if may_fuse and "fused" in inspect.signature(kind).parameters else {}
        return kind(groups, lr=lr, **fused)
    quiet_bitsandbytes()
    import bitsandbytes.optim

    # On a CPU nothing is paged, which needs no warning.
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
    return getattr(bitsandbytes.optim, name)(groups, lr=lr)


@torch.no_grad()
def restore_kinds(optimizer: torch.optim.Optimizer) -> None:
    """Bring the state of an optimizer of bitsandbytes that was loaded into the form in which it makes it itself: counts
    as numbers, not tensors, and large tensors in paged memory."""
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key == "step" and isinstance(value, Tensor):
                state[key] = int(value)
            elif key in ("state1", "state2") and parameter.is_cuda:
                state[key] = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[attr-defined]
                state[key].copy_(value)
