"""Frozen linear layers with weights in 4 or 8 bits, dequantised for each product.

bitsandbytes packs the weights, but its own layers do not serve here:
- Without gradients they run other kernels than in training, so the margin would not be 0 before the first step.
- They take their dtype from the first input, and change biases in place.
- Their scales are not buffers, so these would not be sharded, saved or moved with the model.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.settings.schema import QLoraSettings
from utils import UserError, quiet_bitsandbytes

BLOCK, NESTED_BLOCK = 64, 256  # weights per scale, and scales per scale of scales


def bitsandbytes_functional() -> ModuleType:
    quiet_bitsandbytes()
    import bitsandbytes.functional

    return bitsandbytes.functional


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen quantised weight. Input and bias get gradients.

    Its state is plain parameters and buffers. So it can be moved, copied, hashed and sharded like other layers.

    Args:
        layer: gives weight and bias.
        quant_type: nf4, fp4 (4 bits) or int8.
        double_quant: quantise the scales of 4-bit blocks too.
        compute_dtype: of the product; None for the dtype of the input.
        storage_dtype: holds several 4-bit weights per number. It matters to FSDP only.
        device: of the quantised weight.

    Raises:
        UserError: CONFIG, if the weight does not fill whole numbers of storage_dtype.
    """

    is_quantized = True  # the weight must not be cast

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
        bitsandbytes_functional()  # registers the operators for _dequantize
        self.quant_type, self.compute_dtype = quant_type, compute_dtype
        self.bias = layer.bias
        self.requires_grad_(False)
        if quant_type != "int8" and (weight.numel() + 1) // 2 % storage_dtype.itemsize:
            shown, sizes = str(storage_dtype).removeprefix("torch."), " x ".join(map(str, weight.shape))
            problem = f"peft.storage_dtype: a layer of {sizes} weights in 4 bits does not fill whole numbers of {shown}"
            raise UserError("CONFIG", problem, "peft.storage_dtype=uint8")
        if weight.is_meta:  # filled later from rank 0
            packed, buffers = _empty(weight.shape, quant_type, double_quant, storage_dtype)
        else:
            weight = weight.detach().contiguous().to(device)
            packed, buffers = _pack(weight, quant_type, double_quant, storage_dtype)
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    @property
    def W_q(self) -> Tensor:
        """The packed weight. By this name peft knows to call dequantize()."""
        return self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as used in the product, [out, in]."""
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


def _pack(weight: Tensor, kind: str, double_quant: bool, storage: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantise a weight [out, in]: packed weight, and buffers to dequantise it."""
    functional = bitsandbytes_functional()
    if weight.dtype == torch.float64:
        weight = weight.float()
    if kind == "int8":
        packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return packed, {"scales": scales}
    packed, state = functional.quantize_4bit(weight, None, None, BLOCK, double_quant, kind, quant_storage=storage)
    if not double_quant:
        return packed, {"scales": state.absmax, "code": state.code}
    nested = {"nested_scales": state.state2.absmax, "nested_code": state.state2.code}
    return packed, {"scales": state.absmax, "code": state.code, "offset": state.offset, **nested}


def _empty(shape: torch.Size, kind: str, double_quant: bool, storage: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The results of _pack for a weight of a shape, on the meta device."""

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    if kind == "int8":
        return empty(*shape, dtype=torch.int8), {"scales": empty(shape[0])}
    packed = empty((shape.numel() + 1) // (2 * storage.itemsize), 1, dtype=storage)
    num_blocks = -(-shape.numel() // BLOCK)
    if not double_quant:
        return packed, {"scales": empty(num_blocks), "code": empty(16)}
    nested = {"nested_scales": empty(-(-num_blocks // NESTED_BLOCK)), "nested_code": empty(256)}
    return packed, {"scales": empty(num_blocks, dtype=torch.uint8), "code": empty(16), "offset": empty(), **nested}


def _dequantize(packed: Tensor, kind: str, shape: tuple[int, int], scales: list[Tensor], dtype: torch.dtype) -> Tensor:
    # The operators themselves: bitsandbytes' functions build several objects for each call.
    operators = torch.ops.bitsandbytes
    if kind == "int8":
        return operators.int8_vectorwise_dequant(packed, scales[0]).to(dtype)
    largest = scales[0]  # of each block
    if len(scales) > 2:
        offset, nested_scales, nested_code = scales[2:]
        largest = operators.dequantize_blockwise(largest, nested_scales, nested_code, NESTED_BLOCK, torch.float32)
        largest += offset
    wide = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    return operators.dequantize_4bit(packed, largest, BLOCK, kind, shape, wide).to(dtype)


class _Product(torch.autograd.Function):
    """input @ weight.T for a quantised weight.

    The backward pass dequantises the weight again, to save memory.
    """

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
def quantize(model: PreTrainedModel, layers: list[nn.Module], **options: Any) -> None:
    """Replace the linear layers inside transformer layers by quantised ones, one at a time.

    Args:
        options: arguments of QuantizedLinear.
    """
    inside = {module for layer in layers for module in layer.modules()}
    for parent in [module for module in model.modules() if module in inside]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D):
                setattr(parent, name, QuantizedLinear(child, **options))


def quantization_settings(peft: QLoraSettings) -> dict[str, Any]:
    """The arguments of QuantizedLinear, but for layer and device."""
    return {
        "quant_type": peft.quant_type,
        "double_quant": peft.double_quant,
        "compute_dtype": getattr(torch, peft.compute_dtype) if peft.compute_dtype else None,
        "storage_dtype": getattr(torch, peft.storage_dtype),
    }
