"""The forward pass of LoRA layers, with fewer passes over their outputs.

peft computes result + lora_B(lora_A(x)) * scaling: it writes three tensors of the output's size, and the backward pass
scales the gradient once more. Here the product with B is scaled and added to the base layer's output by one kernel.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class FusedLoraLinear(Linear):
    """peft's LoRA layer with its plain case in one kernel. peft's own forward does the rest, and is its readable twin.

    The plain case: one active adapter without variants such as DoRA, in the dtype of the input.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else self.plain_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        output = self.base_layer(x)  # a new tensor that no backward pass reads
        rank_side = self.lora_A[adapter](self.lora_dropout[adapter](x))  # [rows, tokens, rank]
        weight = self.lora_B[adapter].weight.T.expand(len(x), -1, -1)  # [rows, rank, out]
        return output.baddbmm_(rank_side, weight, alpha=self.scaling[adapter])

    def plain_adapter(self, x: Tensor) -> str | None:
        """The name of the active adapter in the plain case, else None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or x.ndim != 3:
            return None
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        # A class of FSDP's: only its own forward gathers the weight.
        if type(self.lora_B[name]) is not nn.Linear or not _keeps_dtype(self.base_layer, x.dtype):
            return None
        return name if self.lora_A[name].weight.dtype == self.lora_B[name].weight.dtype == x.dtype else None


def _keeps_dtype(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the outputs of a layer have the dtype of its inputs."""
    return getattr(layer, "is_quantized", False) or layer.weight.dtype == dtype


def fuse_lora(model: nn.Module) -> None:
    """Give the LoRA layers of a model the fused forward pass."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear
