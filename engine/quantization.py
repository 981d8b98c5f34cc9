"""Frozen linear layers whose weights bitsandbytes keeps in 4 or 8 bits, turned back layer by layer to be used.

bitsandbytes' own layers are not used: where no gradient is needed they run other kernels than in training, so a margin
would not be 0 before the first step; they take their dtype from the first input they see, and change biases in place;
and what belongs to a weight is no buffer of theirs, so it would not be sharded, saved and moved with the model.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils import UserError, quiet_bitsandbytes

BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that do


def bitsandbytes_functional() -> ModuleType:
    quiet_bitsandbytes()
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
        if quant_type != "int8" and (weight.numel() + 1) // 2 % storage_dtype.itemsize:
            shown, sizes = str(storage_dtype).removeprefix("torch."), " x ".join(map(str, weight.shape))
            problem = f"peft.storage_dtype: a layer of {sizes} weights in 4 bits is no whole number of {shown}"
            raise UserError("CONFIG", problem, "peft.storage_dtype=uint8")
        if weight.is_meta:  # to be filled by what another process has
            packed, buffers = _empty(weight.shape, quant_type, double_quant, storage_dtype)
        else:
            weight = weight.detach().contiguous().to(device)
            packed, buffers = _pack(weight, quant_type, double_quant, storage_dtype)
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

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


def _pack(weight: Tensor, kind: str, double_quant: bool, storage: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight [out, in] in few bits, and what its numbers count."""
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
    """What _pack gives for a weight of a shape, without contents (on the meta device)."""

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    if kind == "int8":
        return empty(*shape, dtype=torch.int8), {"scales": empty(shape[0])}
    packed = empty((shape.numel() + 1) // (2 * storage.itemsize), 1, dtype=storage)
    blocks = -(-shape.numel() // BLOCK)
    if not double_quant:
        return packed, {"scales": empty(blocks), "code": empty(16)}
    nested = {"nested_scales": empty(-(-blocks // NESTED_BLOCK)), "nested_code": empty(256)}
    return packed, {"scales": empty(blocks, dtype=torch.uint8), "code": empty(16), "offset": empty(), **nested}


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
