"""Online training on shards equals online training in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import REWARDS, BatchReward, Sample
from tests.models import tiny_reward_model
from tests.ranks import Job, make_trainer, on_ranks
from tests.tokenizer_files import byte_level

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


class Recorded(BatchReward):
    """Counts the responses it scores on this rank."""

    num_scored = 0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        Recorded.num_scored += len(samples)
        return [float(len(sample.response)) for sample in samples]


def scored_on_each(job: Job, directory: Path) -> tuple[int, list[float]]:
    """The number of responses that a rank scores, and the mean rewards of some iterations."""
    REWARDS["recorded"] = Recorded
    trainer: Any = make_trainer(job, directory / f"rank-{torch.distributed.get_rank()}")
    batches, means = trainer.train_batches(), []
    for _ in range(NUM_STEPS):
        step = trainer.step(trainer.prepare(next(batches)))
        means += [step.facts["objective/scores"]] if "objective/scores" in step.facts else []
    return Recorded.num_scored, means


@pytest.mark.alone
@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
def test_a_response_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str) -> None:
    """Ranks with the same prompts share the scores of the first."""
    monkeypatch.setitem(REWARDS, "recorded", Recorded)
    architecture, loss, overrides = FP64
    job = (architecture, loss, (*overrides, f"trainer={trainer}", "rewards=[recorded]", "reward_options=null"))
    (first, means), (second, other_means) = on_ranks(2, scored_on_each, job, tmp_path)
    assert means == other_means and means
    assert first > 0 and (second > 0) == (trainer == "FSDPTrainer")


@pytest.mark.alone
def test_a_reward_model_scores_on_each_process(tmp_path: Path) -> None:
    path = tmp_path / "reward-model"
    model = tiny_reward_model("llama", vocab_size=300)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    model.save_pretrained(path)
    byte_level(num_merges=40).save_pretrained(path)
    architecture, loss, overrides = FP64
    rewards = ("rewards=[regular_expression,reward_model]", f"++reward_options.reward_model.path={path}")
    job = (architecture, loss, (*overrides, *rewards))
    expected, expected_tokens, expected_eval = rolled_out(job, tmp_path / "one")
    job = (architecture, loss, (*overrides, *rewards, "trainer=FSDPTrainer"))
    for steps, tokens, metrics in on_ranks(2, rolled_out_on_each, job, tmp_path):
        assert sorted(tokens) == sorted(expected_tokens)
        assert metrics == pytest.approx(expected_eval, rel=1e-3, abs=1e-4)
        assert [step["loss/train"] for step in steps] == pytest.approx([s["loss/train"] for s in expected], abs=1e-3)
    assert abs(expected_eval["rewards_eval/reward_model"]) > 0.01
