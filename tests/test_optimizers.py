"""Optimizers: those of bitsandbytes are saved and resumed bitwise; fused ones skip updates by themselves."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.models.archives import OPTIMIZER, STATE_FILE, WEIGHTS
from engine.models.optimizers import build_optimizer, load_optimizer_state
from engine.models.parameters import named_state, named_weights
from engine.models.shards import copy_to_shard, local_shard
from engine.models.weight_files import tensors_of
from engine.run.checkpoint_reader import state_by_parameter
from engine.settings.choices import BITSANDBYTES_OPTIMIZERS, TORCH_OPTIMIZERS


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def new_model_and_optimizer(name: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(96, 64)  # the weight gets 8-bit state, the small bias does not
    return model, build_optimizer(name, [{"params": list(model.parameters())}], 1e-2)


@pytest.mark.parametrize("name", [name for name in TORCH_OPTIMIZERS if name not in ("SGD", "Adafactor")])  # read values
def test_optimizers_take_weights_on_a_gpu(name: str) -> None:
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(2, device="cuda"))
        optimizer = build_optimizer(name, [{"params": [parameter]}], 1e-2)
        if type(optimizer).__module__.startswith("torch."):  # kernels of Triton take no fake tensors
            parameter.grad = torch.empty(2, device="cuda")
            optimizer.step()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BITSANDBYTES_OPTIMIZERS)
def test_state_is_saved_and_resumed_exactly(name: str, tmp_path: Path) -> None:
    model, optimizer = new_model_and_optimizer(name)
    run_steps(model, optimizer, 0, 3)
    has_small_state = optimizer.state[model.weight]["state1"].dtype == torch.uint8
    assert has_small_state == name.endswith("8bit")
    for kind, tensors in ((WEIGHTS, named_weights(model)), (OPTIMIZER, named_state(model, optimizer))):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / f"{kind}.safetensors")
    state = {
        "settings": {"optimizer": name}, "counters": {"examples": 3, "updates": 3}, "evaluation_due": False,
        "log_sizes": {}, "data": "", "token_budget": 1, "best": {},
    }  # fmt: skip
    (tmp_path / STATE_FILE).write_text(json.dumps(state))
    again, other = new_model_and_optimizer(name)
    with torch.no_grad():
        for key, tensor in tensors_of(tmp_path, WEIGHTS):
            copy_to_shard(named_weights(again)[key], tensor)
    load_optimizer_state(again, other, state_by_parameter(tmp_path, other), {})
    for key, value in optimizer.state[model.weight].items():
        assert type(other.state[again.weight][key]) is type(value)
    run_steps(model, optimizer, 3, 6)
    run_steps(again, other, 3, 6)
    assert torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_sharded_updates_are_skipped_by_a_flag(name: str) -> None:
    """Without the host: found_inf is a plain scalar beside sharded weights, in torch's fused optimizers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = nn.Linear(4, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = build_optimizer(name, [{"params": list(model.parameters())}], 1e-2)
        weights = [local_shard(model.weight).clone()]
        for found_inf in (0.0, 1.0, 0.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan if found_inf else 1.0)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf)  # type: ignore[attr-defined]
            optimizer.step()
            weights.append(local_shard(model.weight).clone())
        assert [torch.equal(*pair) for pair in pairwise(weights)] == [False, True, False]
        assert optimizer.state[model.weight]["step"] == 2 and weights[-1].isfinite().all()
    finally:
        dist.destroy_process_group()
