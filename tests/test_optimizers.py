"""Optimizers of bitsandbytes: each is saved and resumed to the last bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.checkpoint import OPTIMIZER, STATE_FILE, WEIGHTS, load_checkpoint, named_state, named_weights
from engine.optimizers import build_optimizer
from engine.validation import SMALL_OPTIMIZERS


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def fresh(name: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(96, 64)  # a weight with 8-bit state, and a bias that is too small for it
    return model, build_optimizer(name, [{"params": list(model.parameters())}], 1e-2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SMALL_OPTIMIZERS)
def test_state_is_saved_and_resumed_exactly(name: str, tmp_path: Path) -> None:
    model, optimizer = fresh(name)
    steps(model, optimizer, 0, 3)
    has_small_state = optimizer.state[model.weight]["state1"].dtype == torch.uint8
    assert has_small_state == name.endswith("8bit")
    for kind, tensors in ((WEIGHTS, named_weights(model)), (OPTIMIZER, named_state(model, optimizer))):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / f"{kind}.safetensors")
    (tmp_path / STATE_FILE).write_text(json.dumps({"settings": {"optimizer": name}}))
    again, other = fresh(name)
    load_checkpoint(tmp_path, again, other, {}, WEIGHTS, named_weights(again))
    for key, value in optimizer.state[model.weight].items():
        assert type(other.state[again.weight][key]) is type(value)
    steps(model, optimizer, 3, 6)
    steps(again, other, 3, 6)
    assert torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)
