"""Parameters and optimizer state of a rank shrink with the world size."""

from pathlib import Path

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves

from engine.models.shards import local_shard
from tests.ranks import Job, make_trainer, on_ranks

pytestmark = pytest.mark.alone

# Wide enough to make two costs negligible: norms, unsplit under tensor parallelism, and uneven shards.
WIDE = tuple(
    f"model.architecture.{key}={value}"
    for key, value in {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}.items()
)
TRAINERS = ("FSDPTrainer", "TensorParallelTrainer")


def state_bytes(jobs: list[Job], directory: Path) -> list[int]:
    """Local bytes of parameters and optimizer state after one step of each job."""
    found = []
    for job in jobs:
        trainer = make_trainer(job, directory)
        trainer.step(trainer.prepare(next(trainer.train_batches())))
        state = tree_leaves([[*trainer.policy.parameters()], [*trainer.optimizer.state.values()]])
        found.append(sum(local_shard(value).nbytes for value in state if isinstance(value, Tensor)))
    return found


def jobs(*trainers: str) -> list[Job]:
    return [("llama", "sft", (*WIDE, f"trainer={trainer}")) for trainer in trainers]


@pytest.fixture(scope="module")
def on_one(tmp_path_factory) -> int:
    return state_bytes(jobs("BasicTrainer"), tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_state_is_split_equally(num_ranks: int, on_one: int, tmp_path: Path) -> None:
    for of_rank in on_ranks(num_ranks, state_bytes, jobs(*TRAINERS), tmp_path):
        for trainer, held in zip(TRAINERS, of_rank, strict=True):
            assert held == pytest.approx(on_one / num_ranks, rel=0.1), trainer
