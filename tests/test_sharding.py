"""Every trainer and world size gives the same losses, gradient norms and weights."""

from pathlib import Path

import pytest
import torch

from engine.placement.sharding import make_mesh
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
IN_ORDER = ("deterministic=true", "gradient_accumulation_steps=4", "optimizer=RMSprop")


def is_slow(name: str, architecture: str, loss: str) -> bool:
    """Whether a case belongs to `make soak`: it is unusual in more than one way."""
    return (PLACEMENTS[name][0] == 4) + (loss == "sft") + (architecture not in ("llama", "gpt2")) > 1


CASES = [
    pytest.param(name, architecture, loss, marks=[pytest.mark.slow] if is_slow(name, architecture, loss) else [])
    for name in PLACEMENTS
    for architecture in ARCHITECTURES
    for loss in LOSSES
]
Results = dict[tuple[str, Job], Trajectory]


def run_all(directory: Path, num_ranks: int, slow: bool) -> Results:
    """Trajectories of all jobs on num_ranks ranks, in the same processes."""
    run_jobs: list[tuple[str, Job]] = []
    for loss in LOSSES:
        for architecture in ARCHITECTURES:
            if num_ranks == 1:
                run_jobs.append(("basic", (architecture, loss, ())))
            for name, (size, overrides) in PLACEMENTS.items():
                if size == num_ranks and is_slow(name, architecture, loss) == slow:
                    run_jobs.append((name, (architecture, loss, overrides)))
    if not slow:
        run_jobs.append((f"in-order-{num_ranks}", ("llama", "dpo", (*IN_ORDER, *([FSDP] if num_ranks > 1 else [])))))
    arguments = ([job for _, job in run_jobs], directory)
    run = trajectories(*arguments) if num_ranks == 1 else on_ranks(num_ranks, trajectories, *arguments)[0]
    return dict(zip(run_jobs, run, strict=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    found: Results = {}
    for num_ranks in (1, 2, 4):
        found |= run_all(tmp_path_factory.mktemp("ranks"), num_ranks, slow=False)
    return found


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory) -> Results:
    found: Results = {}
    for num_ranks in (2, 4):
        found |= run_all(tmp_path_factory.mktemp("ranks"), num_ranks, slow=True)
    return found


@pytest.mark.parametrize("name, architecture, loss", CASES)
def test_all_placements_train_the_same(name: str, architecture: str, loss: str, results, request) -> None:
    found = request.getfixturevalue("slow_results") if is_slow(name, architecture, loss) else results
    losses, norms, weights = found[name, (architecture, loss, PLACEMENTS[name][1])]
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


def test_ordered_sums_are_bitwise_equal(results) -> None:
    overrides = ("llama", "dpo", (*IN_ORDER, FSDP))
    losses, norms, weights = results["in-order-1", ("llama", "dpo", IN_ORDER)]
    for num_ranks in (2, 4):
        others = results[f"in-order-{num_ranks}", overrides]
        assert torch.equal(others[1], norms)
        torch.testing.assert_close(others[0], losses, rtol=1e-12, atol=0)
        assert all(torch.equal(others[2][name], value) for name, value in weights.items())
