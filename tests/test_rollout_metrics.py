"""Metrics of an iteration of online training: of which responses, and of which ranks."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.examples import Example, PromptRow
from engine.models.sampling_engines import Sampled
from engine.run.reward_functions import Score
from engine.run.rollout_metrics import cost_metrics, learned_metrics, sampling_metrics
from engine.run.sampler import Costs, Response, Sampler
from online_losses import Scored
from tests.configs import make_settings


def response(reward: float | None, length: int = 1, *, is_of_reference: bool = False) -> Response:
    tokens = np.arange(length, dtype=np.int32)
    return Response(tokens, f"{reward} {length}", False, reward, Score(reward, {"length": reward}), is_of_reference)


def test_metrics_of_the_policy_leave_out_responses_of_the_reference() -> None:
    """XPO samples both."""
    groups = [[response(1.0), response(0.0, 9, is_of_reference=True)], [response(0.5, 3), response(None, 3)]]
    metrics = sampling_metrics(groups)
    assert metrics["objective/scores"] == metrics["rewards_train/length"] == 0.75
    assert metrics["rollout/length_max"] == 3
    assert metrics["rollout/zero_std_groups"] == 0.5  # groups compare all

    kept = [groups[0], groups[1][:1]]
    scored = Scored(
        torch.tensor([1.0, 0.0, 0.5]), torch.tensor([2, 1]), torch.tensor([1, 2, 1]), torch.tensor([0.3, 7, 7, 0.1])
    )
    logps: Any = [([np.array([-1.0]), np.array([-8.0, -8.0])], None), ([np.array([-3.0])], None)]
    metrics = learned_metrics(make_settings("loss=xpo", "loss.beta=0.5"), 0.5, kept, scored, logps, 0.75)
    assert metrics["objective/entropy"] == 2
    assert metrics["objective/kl"] == pytest.approx(0.2)
    assert metrics["objective/rlhf_reward"] == pytest.approx(0.75 - 0.5 * 0.2)


def test_without_a_response_of_the_policy_there_is_no_kl() -> None:
    kept = [[response(1.0, is_of_reference=True)]]
    scored = Scored(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([1]), torch.tensor([0.3]))
    metrics = learned_metrics(make_settings("loss=xpo"), 0.1, kept, scored, [([np.array([-1.0])], None)], None)
    assert [*metrics] == ["objective/kl_coef"]


def test_seconds_are_of_the_slowest_rank() -> None:
    metrics = cost_metrics(
        Costs(num_tokens=60, num_bad_rewards=2), [{"generate": 1.0, "reward": 5.0}, {"generate": 3.0}]
    )
    assert metrics["time/generate"] == 3 and metrics["time/reward"] == 5
    assert metrics["rollout/tokens_per_second"] == 20
    assert metrics["rollout/bad_rewards"] == 2


def test_tokens_and_bad_rewards_are_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks: each has one of two prompts. The other rank samples the same here."""
    rewards: Any = SimpleNamespace(num_dropped=7)  # before
    places = {"rank": 0, "num_ranks": 2, "data_rank": 0, "num_data_ranks": 2}
    placement: Any = SimpleNamespace(**places, gather_from_data_ranks=lambda value: [value, value])
    sampler = Sampler(make_settings("loss=grpo"), SimpleNamespace(eos_token_id=0), placement, rewards)
    monkeypatch.setattr(
        sampler,
        "_sample_tokens",
        lambda model, prompts, seeds, number: Sampled([[np.zeros(1)] * number] * len(prompts), None),
    )

    def score(*arguments: Any) -> list[list[Response]]:
        rewards.num_dropped += 1
        return [[response(None, 4), response(1.0, 2)]]

    monkeypatch.setattr(sampler, "_score", score)
    prompt = Example(np.array([1], dtype=np.int32), (), 0, row=PromptRow("", {}))
    groups = sampler.sample(None, [prompt, replace(prompt, prompt_index=1)], [(0, 0), (0, 1)], 2)
    assert len(groups) == 2
    assert sampler.costs.num_bad_rewards == 2
    assert sampler.costs.num_tokens == 12
