"""RMSprop in one kernel per parameter, against its readable twin: torch.optim.RMSprop.

Without a GPU the kernel runs under Triton's interpreter, in another process; see tests/test_triton_head.py.
"""

import copy
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.models import optimizers, rmsprop_kernel
from engine.models.optimizers import build_optimizer, load_optimizer_state
from engine.models.parameters import named_state
from engine.models.rmsprop_kernel import BLOCK, FusedRMSprop

LR = 1e-2
STATE = ("step", "square_avg")
SHAPES = [(1,), (7, 3), (BLOCK,), (3, BLOCK + 5), (0,)]
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Runs a function of a device and more arguments where kernels work."""
    pytest.importorskip("triton")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield lambda function, *arguments: function(torch.device("cuda"), *arguments)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result(60)  # the first call starts the process, with this environment
        yield lambda function, *arguments: pool.submit(function, torch.device("cpu"), *arguments).result(60)


def make_parameters(device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.device, parameter.dtype)


def take_steps(device: torch.device, dtype: torch.dtype, bad: set[int]) -> list[tuple[Tensor, Tensor]]:
    """(ours, the twin's) weights, averages and counts after each of five steps. Those in bad are skipped.

    Each step of the twin starts from our values, and computes in fp32.
    """
    parameters, results = make_parameters(device, dtype), []
    optimizer = FusedRMSprop([{"params": parameters}], LR)
    for step in range(5):
        set_gradients(parameters, step)
        twins = [nn.Parameter(parameter.detach().to(torch.float32, copy=True)) for parameter in parameters]
        twin = torch.optim.RMSprop(twins, lr=LR / (step + 1), foreach=False)
        for parameter, other in zip(parameters, twins, strict=True):
            assert parameter.grad is not None
            other.grad = parameter.grad.float()
            if state := optimizer.state[parameter]:
                copies = [state[key].to("cpu" if key == "step" else device, torch.float32, copy=True) for key in STATE]
                twin.state[other] = dict(zip(STATE, copies, strict=True))
            if step in bad:
                parameter.grad.fill_(torch.nan)
        if step not in bad:
            twin.step()
        optimizer.param_groups[0]["lr"] = LR / (step + 1)
        optimizer.found_inf = torch.tensor(float(step in bad), device=device)
        optimizer.step()
        for parameter, other in zip(parameters, twins, strict=True):
            results.append((parameter.detach().clone(), other.detach()))
            if twin.state[other]:
                results += [(optimizer.state[parameter][key].clone(), twin.state[other][key]) for key in STATE]
            assert optimizer.state[parameter]["step"] == step + 1 - len({*range(step + 1)} & bad)
    return [(ours.cpu(), expected.cpu()) for ours, expected in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [set(), {0, 3}], ids=["finite", "skips"])
def test_steps_match_the_twin(run: Callable[..., Any], dtype: torch.dtype, bad: set[int]) -> None:
    results = run(take_steps, dtype, bad)
    assert len(results) == 5 * 3 * len(SHAPES) - (2 * len(SHAPES) if 0 in bad else 0)
    for ours, expected in results:
        assert ours.isfinite().all()
        # Two last bits of a change of 10 * LR, the first one, where it cancels a weight.
        torch.testing.assert_close(ours.float(), expected.float(), rtol=2 * ULP[dtype], atol=20 * LR * ULP[dtype])


def skip_a_step(device: torch.device) -> bool:
    """Whether a skipped step leaves weights and state bitwise as they were."""
    parameters = make_parameters(device, torch.float32)
    optimizer = FusedRMSprop([{"params": parameters}], LR)
    set_gradients(parameters, 0)
    optimizer.step()  # without found_inf, as torch's fused optimizers
    before = copy.deepcopy([[parameter.detach(), *optimizer.state[parameter].values()] for parameter in parameters])
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    after = [[parameter.detach(), *optimizer.state[parameter].values()] for parameter in parameters]
    kept = [map(torch.equal, old, new) for old, new in zip(before, after, strict=True)]
    return all(all(each) for each in kept)


def test_a_skipped_step_changes_nothing(run: Callable[..., Any]) -> None:
    assert run(skip_a_step)


def continue_from(device: torch.device, first_is_ours: bool) -> tuple[Tensor, Tensor]:
    """Weights after a step by one optimizer and two by the other, through checkpoints; and after three by torch's."""
    outputs = []
    for kinds in ([first_is_ours, not first_is_ours], [False, False]):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).to(device)
        state: dict[str, dict[str, Tensor]] = {}
        for kind, steps in zip(kinds, (range(1), range(1, 3)), strict=True):
            groups = [{"params": list(model.parameters())}]
            optimizer = FusedRMSprop(groups, LR) if kind else torch.optim.RMSprop(groups, lr=LR, foreach=False)
            load_optimizer_state(model, optimizer, state, {})
            for step in steps:
                set_gradients(list(model.parameters()), step)
                optimizer.step()
            state = {}
            for name, value in named_state(model, optimizer).items():
                parameter, _, key = name.rpartition(".")
                state.setdefault(parameter, {})[key] = value.clone().cpu()
        assert state["weight"]["step"] == 3 and [*state["weight"]] == ["step", "square_avg"]
        outputs.append(model.weight.detach().cpu())
    return outputs[0], outputs[1]


@pytest.mark.parametrize("first_is_ours", [True, False])
def test_checkpoints_load_into_the_other_optimizer(run: Callable[..., Any], first_is_ours: bool) -> None:
    weight, expected = run(continue_from, first_is_ours)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)


def shard_of_a_rank(device: torch.device) -> tuple[Tensor, Tensor]:
    """The shard of rank 1 of 2 after a step by its local tensors, and the same rows without shards."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    full = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(device)
    plain = nn.Parameter(full.clone())
    plain.grad = full.sin()
    FusedRMSprop([{"params": [plain]}], LR).step()
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh(device.type, (2,))
        shape: dict[str, Any] = {"shape": full.shape, "stride": full.stride()}
        sharded = nn.Parameter(DTensor.from_local(full[3:].clone(), mesh, [Shard(0)], **shape))
        sharded.grad = DTensor.from_local(full[3:].sin(), mesh, [Shard(0)], **shape)
        FusedRMSprop([{"params": [sharded]}], LR).step()
        return sharded.to_local().detach().cpu(), plain.detach()[3:].cpu()  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def test_shards_are_updated_by_their_local_tensors(run: Callable[..., Any]) -> None:
    shard, expected = run(shard_of_a_rank)
    assert shard.shape == (2, 4) and torch.equal(shard, expected)


def test_it_is_chosen_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"params": make_parameters(torch.device("cpu"), torch.float32)}]
    assert type(build_optimizer("RMSprop", groups, LR)) is torch.optim.RMSprop
    monkeypatch.setattr(optimizers, "runs_on", lambda parameters: len([*parameters]) == len(SHAPES))
    chosen = build_optimizer("RMSprop", groups, LR)
    assert type(chosen) is FusedRMSprop and chosen.param_groups[0]["lr"] == LR
    assert type(build_optimizer("RMSprop", groups, LR, may_fuse=False)) is torch.optim.RMSprop
    assert type(build_optimizer("AdamW", groups, LR)) is torch.optim.AdamW


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_a_gpu(dtype: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is stricter than the interpreter, and needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"num_weights": "i64", "num_steps": "*fp32", "found_inf": "*fp32", "block": "constexpr"}
    types |= {name: f"*{dtype}" for name in ("weights", "gradient", "square_avg")}
    kernel = rmsprop_kernel._rmsprop_kernel
    source = ASTSource(kernel, {name: types.get(name, "fp32") for name in kernel.arg_names}, {"block": BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": rmsprop_kernel.WARPS})
    assert compiled.asm["cubin"]


def test_without_triton_torch_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("rmsprop_alone", rmsprop_kernel.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.has_triton()
