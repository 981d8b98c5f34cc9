"""Frozen linear layers whose weights bitsandbytes keeps in 4 or 8 bits, turned back layer by layer to be used.

bitsandbytes' own layers are not used: where no gradient is needed they run other kernels than in training, so a margin
would not be 0 before the first step; they take their dtype from the first input they see, and change biases in place;
and what belongs to a weight is no buffer of theirs, so it would not be sharded, saved and moved with the model.
"""

import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that do


def bitsandbytes_functional() -> ModuleType:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says which optional kernels it lacks
    import bitsandbytes.functional

    return bitsandbytes.functional


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen quantised weight; gradients pass through to the input and the bias.

    A plain parameter and plain buffers hold all there is of it, so it is moved, copied, hashed and sharded like others.

    Args:
        layer: to take the weight and bias of.
        quant_type: nf4, fp4 (4 bits) or int8.
        double_quant: quantise the scales of 4-bit blocks too.
        compute_dtype: of the product; None for that of the input.
        storage_dtype: that 4-bit weights are held as, several in each number. It matters to FSDP alone.
        device: where the weight is quantised, and stays.
    """

    is_quantized = True  # the weight is no number that could be cast

    def __init__(
        self,
        layer: nn.Linear | Conv1D,
        *,
        quant_type: str,
        double_quant: bool,
        compute_dtype: torch.dtype | None,
        storage_dtype: torch.dtype,
        device: torch.device,
    ):
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # [out, in]
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.quant_type, self.compute_dtype = quant_type, compute_dtype
        self.bias = layer.bias
        self.requires_grad_(False)
        is_empty = weight.is_meta  # to be filled by another process's
        weight = torch.zeros(weight.shape, dtype=torch.float32) if is_empty else weight.detach().contiguous().to(device)
        if weight.dtype == torch.float64:
            weight = weight.float()
        functional = bitsandbytes_functional()
        if quant_type == "int8":
            packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
            buffers = {"scales": scales}
        else:
            packed, state = functional.quantize_4bit(
                weight, None, None, BLOCK, double_quant, quant_type, quant_storage=storage_dtype
            )
            buffers = {"scales": state.absmax, "code": state.code}
            if double_quant:
                nested = {
                    "offset": state.offset,
                    "nested_scales": state.state2.absmax,
                    "nested_code": state.state2.code,
                }
                buffers |= nested
        self.weight = nn.Parameter(packed.to("meta") if is_empty else packed, requires_grad=False)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.to("meta") if is_empty else buffer)

    @property
    def W_q(self) -> Tensor:
        """By this name peft knows that the weight is to be read by dequantize()."""
        return self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as it is used, [out, in]."""
        return _dequantize(self.weight, self.quant_type, (self.out_features, self.in_features), self._scales(), dtype)

    def _scales(self) -> list[Tensor]:
        return [buffer for buffer in self._buffers.values() if buffer is not None]

    def forward(self, input: Tensor) -> Tensor:
        dtype = self.compute_dtype or input.dtype
        shape = (self.out_features, self.in_features)
        output = _Product.apply(input.to(dtype), self.weight, self.quant_type, shape, *self._scales())
        if self.bias is not None:
            output = output + self.bias.to(dtype)
        return output.to(input.dtype)


def _dequantize(packed: Tensor, kind: str, shape: tuple[int, int], scales: list[Tensor], dtype: torch.dtype) -> Tensor:
    functional = bitsandbytes_functional()
    if kind == "int8":
        return functional.int8_vectorwise_dequant(packed, scales[0]).to(dtype)
    nested = None
    if len(scales) > 2:
        nested = functional.QuantState(absmax=scales[3], code=scales[4], blocksize=NESTED_BLOCK, dtype=torch.float32)
    wide = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    state = functional.QuantState(
        absmax=scales[0],
        shape=torch.Size(shape),
        code=scales[1],
        blocksize=BLOCK,
        quant_type=kind,
        dtype=wide,
        offset=scales[2] if nested else None,
        state2=nested,
    )
    return functional.dequantize_4bit(packed, state).to(dtype)


class _Product(torch.autograd.Function):
    """input @ weight.T for a quantised weight, which is turned back again in the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, kind: str, shape: tuple[int, int], *scales: Tensor) -> Tensor:
        ctx.save_for_backward(packed, *scales)
        ctx.kind, ctx.shape, ctx.dtype = kind, shape, input.dtype
        return nn.functional.linear(input, _dequantize(packed, kind, shape, list(scales), input.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        packed, *scales = ctx.saved_tensors
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ _dequantize(packed, ctx.kind, ctx.shape, scales, ctx.dtype)
        return (grad_input, None, None, None, *(None for _ in scales))


@torch.no_grad()
def quantize(model: PreTrainedModel, blocks: list[nn.Module], **how: Any) -> None:
    """Replace the linear layers inside the blocks of a model, one at a time, by quantised ones; see QuantizedLinear."""
    inside = {module for block in blocks for module in block.modules()}
    for parent in [module for module in model.modules() if module in inside]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D):
                setattr(parent, name, QuantizedLinear(child, **how))
