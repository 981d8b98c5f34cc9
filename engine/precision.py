"""Run a model in another dtype than its weights are kept in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def parameters_in(module: nn.Module, dtype: torch.dtype | None, keep: nn.Module | None = None) -> Iterator[None]:
    """Inside a with block, the parameters of module are copies in dtype; gradients reach the originals in their own.

    So every operation runs in dtype, as under FSDP's mixed precision, and each weight is cast once, however many
    forward and backward passes the block holds. (Autocast would keep the states between operations in fp32, and cast
    them before each product.)

    Args:
        dtype: None leaves all as it is.
        keep: a part of module that keeps its own dtype.
    """
    kept = set() if keep is None else set(keep.modules())
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    copies: dict[int, Tensor] = {}  # a parameter that modules share is copied once
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if dtype is None or child in kept or parameter is None or parameter.dtype == dtype:
                continue
            if parameter.is_floating_point():  # quantised weights are integers
                originals.append((child, name, parameter))
    try:
        for child, name, parameter in originals:
            if id(parameter) not in copies:
                copies[id(parameter)] = parameter.to(dtype)
            # A plain tensor may stand in for a parameter here, though not in module.weight = ...
            child._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for child, name, parameter in originals:
            child._parameters[name] = parameter
