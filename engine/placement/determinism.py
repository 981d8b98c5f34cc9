"""Operations with the same bits in each run, on a GPU."""

import os

import torch


def set_deterministic(is_on: bool, device: torch.device) -> None:
    """Let torch use deterministic operations alone, if device is a GPU. On a CPU all of ours are.

    Call it before the first matrix product. An operation without a deterministic form raises a RuntimeError. A warning
    in its place (warn_only) would leave the backward pass of flash attention as it is.
    """
    is_on = is_on and device.type == "cuda"
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it with its first product
    # By default each new tensor is filled first. It takes time, and no such values are read.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", not is_on)  # noqa: B010  mypy does not know it
    torch.use_deterministic_algorithms(is_on)  # off too: the jobs of a sweep share a process
