"""Quantised layers against their dequantised weights, also after a cast, move or copy."""

import copy
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.models.layers import find_layers
from engine.models.precision import parameters_in
from engine.models.quantization import QuantizedLinear, quantize
from tests.models import tiny_model
from utils import UserError

CPU = torch.device("cpu")
KINDS = ("nf4", "fp4", "int8")


def quantized(layer: nn.Linear | Conv1D, kind: str = "nf4", **options: object) -> QuantizedLinear:
    settings = {"double_quant": True, "compute_dtype": None, "storage_dtype": torch.uint8, "device": CPU, **options}
    return QuantizedLinear(layer, quant_type=kind, **settings)  # type: ignore[arg-type]


def linear(inputs: int = 64, outputs: int = 48) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


@pytest.mark.parametrize("sizes", [(64, 48), (32, 33), (7, 5)])  # rows of full blocks, and others
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_product_with_the_dequantised_weight(
    kind: str, double_quant: bool, sizes: tuple[int, int]
) -> None:
    layer = linear(*sizes)
    weight = layer.weight.detach().clone()
    packed = quantized(layer, kind, double_quant=double_quant)
    error = (packed.dequantize() - weight).abs().max()
    assert 0 < error < weight.abs().max() * (0.01 if kind == "int8" else 0.3)
    inputs = torch.randn(3, sizes[0], requires_grad=True)
    expected = nn.functional.linear(inputs, packed.dequantize(), layer.bias)
    torch.testing.assert_close(packed(inputs), expected)
    (gradient,) = torch.autograd.grad(packed(inputs).square().sum(), inputs)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantised_weights_are_those_of_bitsandbytes(kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    layer = linear(320, 200)  # more blocks than one scale of scales serves
    arguments: dict[str, Any] = {"blocksize": 64, "compress_statistics": double_quant, "quant_type": kind}
    expected_packed, state = functional.quantize_4bit(layer.weight.detach(), **arguments)
    state.dtype = dtype
    packed = quantized(layer, kind, double_quant=double_quant)
    assert torch.equal(packed.weight, expected_packed)
    assert torch.equal(packed.dequantize(dtype), functional.dequantize_4bit(expected_packed, state))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_give_the_same_bits(kind: str) -> None:
    packed = quantized(linear(), kind)
    inputs = torch.randn(5, 64)
    with torch.no_grad():
        expected = packed.eval()(inputs)
    assert torch.equal(packed.train()(inputs.requires_grad_()), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_storage_dtypes_hold_the_same_numbers_and_are_not_cast(kind: str, storage: torch.dtype) -> None:
    expected = quantized(linear(), kind).dequantize()
    packed = quantized(linear(), kind, storage_dtype=storage)
    assert packed.weight.dtype == storage and torch.equal(packed.dequantize(), expected)
    with parameters_in(packed, torch.bfloat16):
        assert packed.weight.dtype == storage and torch.equal(packed.dequantize(), expected)
        assert packed.bias.dtype == torch.bfloat16
    assert packed.bias.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_must_fill_whole_numbers_of_the_storage_dtype(device: str) -> None:
    quantized(nn.Linear(30, 3, device=device), storage_dtype=torch.uint8)
    with pytest.raises(UserError, match="a layer of 3 x 30 weights in 4 bits"):
        quantized(nn.Linear(30, 3, device=device), storage_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_dtype_of_inputs(kind: str, compute: torch.dtype | None, dtype: torch.dtype) -> None:
    packed = quantized(linear(), kind, compute_dtype=compute)
    inputs = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    output: Tensor = packed(inputs)
    output.sum().backward()
    assert output.dtype == dtype and inputs.grad is not None and inputs.grad.dtype == dtype
    expected = nn.functional.linear(inputs.double(), packed.dequantize().double(), packed.bias.double())
    low = torch.bfloat16 in (dtype, compute)
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.03 if low else 1e-5)


def test_weights_of_gpt2_are_transposed() -> None:
    layer = Conv1D(48, 64)
    weight = layer.weight.detach().T.clone()
    packed = quantized(layer, "int8")
    assert (packed.in_features, packed.out_features) == (64, 48)
    torch.testing.assert_close(packed.dequantize(), weight, rtol=0, atol=0.001)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts_are_complete(kind: str) -> None:
    packed = quantized(linear(), kind)
    copied = copy.deepcopy(packed)
    assert torch.equal(copied.dequantize(), packed.dequantize())
    other = quantized(nn.Linear(64, 48), kind)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dequantize(), packed.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(64, 48), (520, 256)])
def test_a_layer_on_meta_has_the_same_shapes(sizes, kind, double_quant: bool, storage: torch.dtype) -> None:
    full, empty = (
        quantized(nn.Linear(sizes[0], sizes[1], device=device), kind, double_quant=double_quant, storage_dtype=storage)
        for device in ("cpu", "meta")
    )
    tensors = [{name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} for layer in (full, empty)]
    assert tensors[0] == tensors[1] and empty.weight.is_meta


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_a_model_keeps_its_head_embeddings_and_norms(architecture: str) -> None:
    model = tiny_model(architecture)
    kept = {name: value.clone() for name, value in model.named_parameters() if value.ndim == 1}
    before = sum(parameter.nbytes for layer in find_layers(model, None) for parameter in layer.parameters())
    layers = find_layers(model, None)
    quantize(
        model, layers, device=CPU, quant_type="nf4", double_quant=True, compute_dtype=None, storage_dtype=torch.uint8
    )
    after = sum(tensor.nbytes for layer in find_layers(model, None) for tensor in layer.state_dict().values())
    assert after < before / 2  # layers are tiny, and each has a code of 1 KB
    assert not isinstance(model.get_output_embeddings(), QuantizedLinear)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in kept.items())
    linears = [m for layer in find_layers(model, None) for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert linears and all(isinstance(module, QuantizedLinear) for module in linears)
