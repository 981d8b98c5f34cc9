"""Online training on shards equals online training in one process."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.run.sampler import Group
from rewards import REWARDS, BatchReward, Sample
from tests.models import tiny_reward_model
from tests.quick import slow_except
from tests.ranks import Job, make_trainer, on_ranks
from tests.tokenizer_files import byte_level

NUM_STEPS = 6
PARITY = ("rewards=[parity]", "reward_options=null")


def parity(prompt: str, response: str, row: Any) -> float | None:
    """A reward with many ties, and none for some responses."""
    return None if response.endswith("e") else float(len(response) % 2)


def job(loss: str, *overrides: str) -> Job:
    return "gpt2", loss, ("model.policy_dtype=float64", *overrides)


JOBS = {
    "grpo": job("grpo"),
    # Some responses are left out, and some groups: a rank may have none.
    "masked": job("grpo", *PARITY, "rollout.truncated=mask", "rollout.max_resamples=0"),
    "rloo": job("rloo", *PARITY, "rollout.max_resamples=1", "batch_size=2"),
    "remax": job("remax", *PARITY),
    "online_dpo": job("online_dpo", *PARITY, "rollout.num_responses=3"),
    "xpo": job("xpo", *PARITY, "rollout.num_responses=2", "loss.alpha=0.01"),
    # The reference is the policy with its adapters off.
    "adapters": job("xpo", *PARITY, "rollout.num_responses=2", "loss.alpha=0.01", "peft=lora", "lr=1e-2"),
    "best_of_n": job("best_of_n"),
    "ppo": job("ppo", "critic.lr=1e-3", "loss.value_clip=1e-3", "loss.entropy_bonus=0.1"),
}


def with_ends(sample: Callable[..., list[Group]]) -> Callable[..., list[Group]]:
    """Samples of which a third counts as truncated. No model from scratch ends its responses."""

    def sample_with_ends(*arguments: Any) -> list[Group]:
        groups = sample(*arguments)
        return [[replace(each, is_truncated=int(each.tokens[0]) % 3 == 0) for each in group] for group in groups]

    return sample_with_ends


def rolled_out(job: Job, directory: Path) -> tuple[list[dict[str, float]], list[list[int]], dict[str, float]]:
    """Metrics of the first steps, the tokens of the last responses, and an evaluation."""
    trainer: Any = make_trainer(job, directory)
    sampler: Any = trainer.source.roll_out._sampler
    sampler.sample = with_ends(sampler.sample)
    steps, batches = [], trainer.train_batches()
    for _ in range(NUM_STEPS):
        batch = trainer.prepare(next(batches))
        step = trainer.step(batch)
        facts = {name: value for name, value in step.facts.items() if name.startswith(("objective/", "rollout/"))}
        steps.append(step.values.read() | {name: facts[name] for name in facts if "per_second" not in name})
    tokens = [response.tolist() for example in batch.examples for response in example.responses]
    return steps, tokens, trainer.evaluator.measure(trainer.token_budget, lambda: False)


def all_rolled_out(jobs: dict[str, Job], directory: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    REWARDS["parity"] = parity
    return {name: rolled_out(job, directory / f"{name}-{rank}") for name, job in jobs.items()}


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Rolls out a job by its name, once."""

    @functools.cache
    def found(name: str) -> Any:
        results = all_rolled_out({name: JOBS[name]}, tmp_path_factory.mktemp("one"))
        del REWARDS["parity"]
        return results[name]

    return found


@pytest.mark.alone
@pytest.mark.parametrize(
    "trainer, names",
    [
        ("FSDPTrainer", ("masked", "ppo")),
        ("TensorParallelTrainer", ("rloo", "online_dpo")),
        pytest.param("FSDPTrainer", [*JOBS], marks=pytest.mark.slow),
        pytest.param("TensorParallelTrainer", [name for name in JOBS if name != "adapters"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(
    tmp_path: Path, trainer: str, names: Sequence[str], in_one_process: Callable[[str], Any]
) -> None:
    jobs = {
        name: (architecture, loss, (*overrides, f"trainer={trainer}"))
        for name, (architecture, loss, overrides) in JOBS.items()
        if name in names
    }
    for of_rank in on_ranks(2, all_rolled_out, jobs, tmp_path):
        for name, (steps, tokens, metrics) in of_rank.items():
            expected, expected_tokens, expected_eval = in_one_process(name)
            assert sorted(tokens) == sorted(expected_tokens), name
            for found, step in zip(steps, expected, strict=True):
                assert found == pytest.approx(step, rel=1e-6, abs=1e-9, nan_ok=True), name
            assert metrics == pytest.approx(expected_eval, rel=1e-6, abs=1e-9, nan_ok=True), name
            # Each iteration has two passes: the first is on-policy.
            ratios = [step["policy/ratio_max"] for step in steps if step["tokens"]]
            assert [ratio == 1 for ratio in ratios] == [True, False] * (len(ratios) // 2), name


@pytest.mark.alone
@pytest.mark.parametrize("name", slow_except(JOBS, "masked", "rloo", "online_dpo", "ppo"))
def test_the_jobs_leave_responses_and_groups_out(name: str, in_one_process: Callable[[str], Any]) -> None:
    steps, *_ = in_one_process(name)
    if name in ("masked", "rloo", "remax", "online_dpo", "xpo"):
        assert sum(step.get("rollout/left_out", 0) for step in steps)
    assert any(step["grad_norm"] > 0.01 for step in steps)


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
@pytest.mark.parametrize("trainer", slow_except(["FSDPTrainer", "TensorParallelTrainer"], "TensorParallelTrainer"))
def test_a_response_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str) -> None:
    """Ranks with the same prompts share the scores of the first."""
    monkeypatch.setitem(REWARDS, "recorded", Recorded)
    architecture, loss, overrides = JOBS["grpo"]
    job = (architecture, loss, (*overrides, f"trainer={trainer}", "rewards=[recorded]", "reward_options=null"))
    (first, means), (second, other_means) = on_ranks(2, scored_on_each, job, tmp_path)
    assert means == other_means and means
    assert first > 0 and (second > 0) == (trainer == "FSDPTrainer")


@pytest.mark.slow
@pytest.mark.alone
def test_a_reward_model_scores_on_each_process(tmp_path: Path) -> None:
    path = tmp_path / "reward-model"
    model = tiny_reward_model("llama", vocab_size=300)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    model.save_pretrained(path)
    byte_level(num_merges=40).save_pretrained(path)
    architecture, loss, overrides = JOBS["grpo"]
    rewards = ("rewards=[regular_expression,reward_model]", f"++reward_options.reward_model.path={path}")
    job = (architecture, loss, (*overrides, *rewards))
    expected, expected_tokens, expected_eval = rolled_out(job, tmp_path / "one")
    job = (architecture, loss, (*overrides, *rewards, "trainer=FSDPTrainer"))
    for of_rank in on_ranks(2, all_rolled_out, {"sharded": job}, tmp_path):
        steps, tokens, metrics = of_rank["sharded"]
        assert sorted(tokens) == sorted(expected_tokens)
        assert metrics == pytest.approx(expected_eval, rel=1e-3, abs=1e-4)
        assert [step["loss/train"] for step in steps] == pytest.approx([s["loss/train"] for s in expected], abs=1e-3)
    assert abs(expected_eval["rewards_eval/reward_model"]) > 0.01


def saved(job: Job, directory: Path) -> dict[str, float]:
    """Train three steps, save, and return the metrics of a fourth one: inside an iteration."""
    trainer: Any = make_trainer(job, directory)
    batches = trainer.train_batches()
    for _ in range(3):
        trainer.step(trainer.prepare(next(batches)))
    trainer.save(is_last=False, evaluation_due=False)
    trainer.log_finished_save(wait=True, together=True)
    return trainer.step(trainer.prepare(next(batches))).values.read()


def resumed(job: Job, directory: Path, checkpoint: Path) -> dict[str, float]:
    """The metrics of the step after a checkpoint."""
    trainer: Any = make_trainer(job, directory)
    trainer.resume(checkpoint)
    return trainer.step(trainer.prepare(next(trainer.train_batches(trainer.counters["examples"])))).values.read()


@pytest.mark.slow
@pytest.mark.alone
def test_a_critic_resumes_under_another_trainer(tmp_path: Path) -> None:
    """From two processes into one, and back."""
    architecture, loss, overrides = JOBS["ppo"]
    on_two: Job = (architecture, loss, (*overrides, "trainer=FSDPTrainer"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    expected = saved(JOBS["ppo"], tmp_path / "one")
    assert expected["val/clipfrac"] > 0  # the buffer holds the values of the rollout
    for metrics in on_ranks(2, saved, on_two, tmp_path / "two"):
        assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    names = {path.name for path in (tmp_path / "two" / "step-15").glob("critic*")}
    assert {f"critic-0000{rank}-of-00002.safetensors" for rank in (1, 2)} <= names
    assert resumed(JOBS["ppo"], tmp_path / "one-again", tmp_path / "two" / "step-15") == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )
    for metrics in on_ranks(2, resumed, on_two, tmp_path / "two-again", tmp_path / "one" / "step-15"):
        assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
