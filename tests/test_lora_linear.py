"""The fused forward pass of LoRA layers against peft's own."""

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.models.lora_linear import FusedLoraLinear, fuse_lora
from engine.models.quantization import QuantizedLinear

QUANTIZED: dict[str, Any] = {"double_quant": True, "storage_dtype": torch.uint8, "device": torch.device("cpu")}
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(64, 48),
    "no-bias": lambda: nn.Linear(64, 48, bias=False),
    "conv1d": lambda: Conv1D(48, 64),
    "nf4": lambda: QuantizedLinear(nn.Linear(64, 48), quant_type="nf4", compute_dtype=None, **QUANTIZED),
    "int8": lambda: QuantizedLinear(nn.Linear(64, 48), quant_type="int8", compute_dtype=torch.float32, **QUANTIZED),
}


def lora_layers(base: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Models of one layer with the same adapter: peft's, and the fused one."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["0"], init_lora_weights=False, **options)
    config.fan_in_fan_out = base == "conv1d"
    with warnings.catch_warnings(action="ignore"):
        plain = inject_adapter_in_model(config, nn.Sequential(BASES[base]()))
    for name, parameter in plain.named_parameters():
        if "base_layer" not in name or base not in ("nf4", "int8"):
            parameter.data = parameter.data.to(dtype)
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    assert type(plain[0]) is Linear and type(fused[0]) is FusedLoraLinear
    return plain, fused


def results(model: Any, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and gradients of inputs and trained weights. Dropout is the same for each model."""
    torch.manual_seed(1)
    leaf = inputs.clone().requires_grad_()
    hidden = leaf * 1  # as in a model, where inputs are no leaves
    output = model(hidden)
    torch.sin(output).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert leaf.grad is not None and any("lora_A" in name for name in gradients)
    return output, gradients | {"inputs": leaf.grad}


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_rslora": True}])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("base", BASES)
def test_outputs_and_gradients_are_those_of_peft(base: str, rows: int, options: dict[str, Any]) -> None:
    plain, fused = lora_layers(base, **options)
    inputs = torch.randn(rows, 6, 64, dtype=torch.float64)
    assert fused[0].plain_adapter(inputs) == "default"
    (expected, expected_gradients), (output, gradients) = (results(model, inputs) for model in (plain, fused))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_new_adapter_changes_no_bit(base: str, dtype: torch.dtype) -> None:
    _, fused = lora_layers(base, dtype)
    fused[0].lora_B["default"].weight.data.zero_()
    inputs = torch.randn(1, 33, 64, dtype=dtype)
    assert fused[0].plain_adapter(inputs) == "default"
    output = fused(inputs)
    fused[0]._disable_adapters = True
    assert torch.equal(output, fused(inputs))


@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_bf16_is_as_exact_as_in_peft(base: str) -> None:
    plain, fused = lora_layers(base, torch.bfloat16)
    exact = copy.deepcopy(plain)
    for parameter in exact.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.double()
    inputs = torch.randn(1, 200, 64, dtype=torch.bfloat16)
    expected = exact(inputs.double())
    errors = [(model(inputs).double() - expected).abs().mean() for model in (plain, fused)]
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("change", ["dora", "lora_bias", "merged", "two", "two_dimensions", "other_dtype", "disabled"])
def test_other_cases_run_the_forward_of_peft(change: str) -> None:
    options: dict[str, Any] = {"dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}.get(change, {})
    models = lora_layers("linear", **options)
    inputs = torch.randn(2, 5, 64, dtype=torch.float64)
    if change == "two_dimensions":
        inputs = inputs[0]
    outputs = []
    for model in models:
        layer = model[0]
        if change == "merged":
            layer.merge()
        elif change == "two":
            torch.manual_seed(2)
            config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
            inject_adapter_in_model(config, model, "other")
            layer.lora_A["other"].double(), layer.lora_B["other"].double()
            layer._active_adapter = ["default", "other"]
        elif change == "other_dtype":
            layer.lora_A.float(), layer.lora_B.float()
        elif change == "disabled":
            layer._disable_adapters = True
        outputs.append(model(inputs))
    assert layer.plain_adapter(inputs) is None
    assert torch.equal(*outputs)
