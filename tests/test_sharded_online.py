"""Online training on shards equals online training in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Job, make_trainer, on_ranks

NUM_STEPS = 6
FP64: Job = ("gpt2", "grpo", ("model.policy_dtype=float64",))


def rolled_out(job: Job, directory: Path) -> tuple[list[dict[str, float]], list[list[int]], dict[str, float]]:
    """Metrics of the first steps, the tokens of the last responses, and an evaluation."""
    trainer: Any = make_trainer(job, directory)
    steps, batches = [], trainer.train_batches()
    for _ in range(NUM_STEPS):
        batch = trainer.prepare(next(batches))
        steps.append(trainer.step(batch).values.read())
    tokens = [response.tolist() for example in batch.examples for response in example.responses]
    return steps, tokens, trainer.evaluator.measure(trainer.token_budget, lambda: False)


def rolled_out_on_each(job: Job, directory: Path) -> Any:
    rank = torch.distributed.get_rank()
    return rolled_out(job, directory / f"rank-{rank}")


@pytest.mark.alone
@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
def test_two_processes_equal_one(tmp_path: Path, trainer: str) -> None:
    architecture, loss, overrides = FP64
    expected, expected_tokens, expected_eval = rolled_out(FP64, tmp_path / "one")
    job = (architecture, loss, (*overrides, f"trainer={trainer}"))
    for steps, tokens, metrics in on_ranks(2, rolled_out_on_each, job, tmp_path):
        assert sorted(tokens) == sorted(expected_tokens)
        for found, step in zip(steps, expected, strict=True):
            assert found == pytest.approx(step, rel=1e-6, abs=1e-9)
        assert metrics == pytest.approx(expected_eval, rel=1e-6, abs=1e-9)
        # Each iteration has two passes: the first is on-policy.
        assert [step["policy/ratio_max"] == 1 for step in steps] == [True, False] * 3
    assert any(step["grad_norm"] > 0.01 for step in expected)
