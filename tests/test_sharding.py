"""Every trainer and world size gives the same losses, gradient norms and weights."""

import itertools
from pathlib import Path

import pytest
import torch

from engine.placement.sharding import make_mesh
from tests.quick import slow_except
from tests.ranks import Job, Trajectory, on_ranks, trajectories

pytestmark = pytest.mark.alone

ARCHITECTURES = ("llama", "qwen2", "gpt_neox", "gpt2")
LOSSES = ("sft", "dpo")
FSDP, TENSOR = "trainer=FSDPTrainer", "trainer=TensorParallelTrainer"
PLACEMENTS = {
    "fsdp-2": (2, (FSDP,)),
    "tensor-2": (2, (TENSOR,)),
    "fsdp-4": (4, (FSDP,)),
    "fsdp-2-tensor-2": (4, (FSDP, "tensor_parallel_size=2")),
}


CASES = [*itertools.product(PLACEMENTS, ARCHITECTURES, LOSSES)]
# Both trainers with both losses, and each architecture; `make soak` runs all cases.
QUICK_CASES = [
    ("fsdp-2", "llama", "dpo"),
    ("fsdp-2", "qwen2", "sft"),
    ("tensor-2", "gpt2", "dpo"),
    ("tensor-2", "gpt_neox", "sft"),
]
Results = dict[tuple[str, Job], Trajectory]


def run_all(cases: list[tuple[str, str, str]], directory: Path) -> Results:
    """Trajectories of all cases and of one process; jobs of the same number of ranks share processes."""
    found: Results = {}
    for num_ranks in (1, 2, 4):
        run_jobs: list[tuple[str, Job]] = []
        for name, architecture, loss in cases:
            if num_ranks == 1 and ("basic", (architecture, loss, ())) not in run_jobs:
                run_jobs.append(("basic", (architecture, loss, ())))
            elif PLACEMENTS[name][0] == num_ranks:
                run_jobs.append((name, (architecture, loss, PLACEMENTS[name][1])))
        if run_jobs:
            arguments = ([job for _, job in run_jobs], directory / str(num_ranks))
            run = trajectories(*arguments) if num_ranks == 1 else on_ranks(num_ranks, trajectories, *arguments)[0]
            found |= dict(zip(run_jobs, run, strict=True))
    return found


@pytest.fixture(scope="module")
def quick_results(tmp_path_factory) -> Results:
    return run_all(QUICK_CASES, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory) -> Results:
    return run_all([case for case in CASES if case not in QUICK_CASES], tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name, architecture, loss", slow_except(CASES, *QUICK_CASES))
def test_all_placements_train_the_same(name: str, architecture: str, loss: str, request) -> None:
    is_quick = (name, architecture, loss) in QUICK_CASES
    results = request.getfixturevalue("quick_results" if is_quick else "slow_results")
    losses, norms, weights = results[name, (architecture, loss, PLACEMENTS[name][1])]
    expected_losses, expected_norms, expected_weights = results["basic", (architecture, loss, ())]
    assert len(losses) == 20 and norms.max() > 1.0  # clipping takes part
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=1e-6)
    assert weights.keys() == expected_weights.keys()
    difference = sum((weights[key] - value).square().sum() for key, value in expected_weights.items())
    assert difference.sqrt() / sum(value.square().sum() for value in expected_weights.values()).sqrt() < 1e-5


def group_timeouts() -> list[float]:
    groups = make_mesh(torch.device("cpu"), (1, 2, 1), timeout_s=77).get_all_groups()
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_every_group_of_a_mesh_has_the_time_out_of_the_settings() -> None:
    assert on_ranks(2, group_timeouts) == [[77, 77, 77]] * 2


def compiled_trajectories(jobs: list[Job], directory: Path) -> tuple[list[Trajectory], int]:
    """The trajectories, and the number of graphs that were compiled."""
    from torch._dynamo.utils import counters  # slow to import

    return trajectories(jobs, directory), counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [FSDP, TENSOR])
def test_compiled_layers_of_several_processes_train_as_plain_ones(trainer: str, tmp_path: Path) -> None:
    jobs: list[Job] = [("llama", "dpo", ("n_epochs=1", trainer, f"compile={on}")) for on in ("false", "true")]
    ((plain, compiled), num_graphs), _ = on_ranks(2, compiled_trajectories, jobs, tmp_path)
    for expected, found in zip(plain[:2], compiled[:2], strict=True):  # losses, norms
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, weight in plain[2].items():
        torch.testing.assert_close(compiled[2][name], weight, rtol=0, atol=1e-5)
    assert 0 < num_graphs <= 4  # shared by all layers, and by the reference


@pytest.mark.parametrize("num_ranks", slow_except([2, 4], 2))
def test_ordered_sums_are_bitwise_equal(num_ranks: int, tmp_path: Path) -> None:
    in_order = ("deterministic=true", "gradient_accumulation_steps=4", "optimizer=RMSprop")
    ((losses, norms, weights),) = trajectories([("llama", "dpo", in_order)], tmp_path / "one")
    (others,), *_ = on_ranks(num_ranks, trajectories, [("llama", "dpo", (*in_order, FSDP))], tmp_path / "sharded")
    assert torch.equal(others[1], norms)
    torch.testing.assert_close(others[0], losses, rtol=1e-12, atol=0)
    assert all(torch.equal(others[2][name], value) for name, value in weights.items())
