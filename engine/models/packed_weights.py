"""Matrix products of few rows on a CPU, from weights in oneDNN's own order.

A step of sampling feeds a token of each row. torch's product of so few rows is up to three times as slow, as it reads
the weights in the order of training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

TYPICAL_ROWS = 8  # the order is chosen for so many; others are as exact


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Run linear layers of fp32 on a CPU from copies of their weights in a with block.

    The weights must stay as they are inside it. Their memory is needed once more, as for gradients in training.
    """
    # A subclass, or a layer with a forward pass of its own, may hold weights of another form.
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and _can_pack(module.weight)
    ]
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TYPICAL_ROWS)
        layer.forward = partial(_product, layer, packed)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_pack(weight: Tensor) -> bool:
    is_plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _product(layer: nn.Linear, packed: Tensor, inputs: Tensor) -> Tensor:
    if inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return functional.linear(inputs, layer.weight, layer.bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, layer.bias, "none", [], "")
    return product
