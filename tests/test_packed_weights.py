"""Products from packed weights equal those of the layers, and leave no trace."""

import pytest
import torch
from torch import nn

from engine.models.packed_weights import packed_weights
from tests.models import tiny_model


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(num_rows, bias):
    layer, inputs = nn.Linear(48, 70, bias=bias), torch.randn(num_rows, 2, 48)
    with torch.no_grad():
        expected = layer(inputs)
        with packed_weights(layer):
            found = layer(inputs)
            assert "forward" in vars(layer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(layer)


@torch.no_grad()
def test_logits_of_a_model():
    model, tokens = tiny_model("llama"), torch.randint(2, 60, (3, 5))
    expected = model(tokens).logits
    with packed_weights(model):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
def test_other_layers_stay_as_they_are():
    """Of fp64, of a subclass, and with a forward pass of its own; inputs of other dtypes take the plain product."""

    class Quantised(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(4, 4).double(), Quantised(4, 4), nn.Linear(4, 4)])
    layers[2].forward = lambda inputs: inputs + 1
    with packed_weights(layers):
        assert ["forward" in vars(layer) for layer in layers] == [False, False, True]
    assert layers[2](torch.zeros(1)).item() == 1
    layer, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(inputs)
        with packed_weights(layer):
            assert torch.equal(layer(inputs), expected)
