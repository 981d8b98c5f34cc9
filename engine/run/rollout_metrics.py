"""Metrics of an iteration of online training. Each function gives those of one subject."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from engine.run.sampler import Costs, Group, has_equal_rewards, reward_metrics
from engine.settings.schema import Settings
from online_losses import Scored, k3

Logps = tuple[list[np.ndarray], list[np.ndarray] | None]  # of an example's responses: under policy and reference


def sampling_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the policy that samples, over all its responses.

    Args:
        groups: of each prompt, as first sampled. Those sampled again for their rewards would be a selection.
    """
    of_policy = [[response for response in group if not response.is_of_reference] for group in groups]
    responses = [response for group in of_policy for response in group]
    lengths = [len(response.tokens) for response in responses]
    metrics = {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncated": float(np.mean([response.is_truncated for response in responses])),
        **reward_metrics(responses, "rewards_train"),
    }
    if any(len(group) > 1 for group in groups):  # a single response equals itself
        metrics["rollout/zero_std_groups"] = float(np.mean([has_equal_rewards(group) for group in groups]))
        metrics["rollout/distinct"] = float(np.mean([len({each.text for each in g}) / len(g) for g in of_policy]))
    rewards = [response.reward for response in responses if response.reward is not None]
    if rewards:
        metrics["objective/scores"] = float(np.mean(rewards))
    return metrics


def learned_metrics(
    settings: Settings,
    beta: float,
    groups: Sequence[Group],
    scored: Scored | None,
    logps: Sequence[Logps],
    scores: float | None,
) -> dict[str, float]:
    """Metrics of the policy's responses that are learned.

    Args:
        beta: the weight of the KL in this iteration.
        groups: of each prompt, without responses left out.
        scored: what the advantages came from; None without responses.
        logps: of the responses.
        scores: the mean reward of all responses; None without one.
    """
    metrics = {"objective/kl_coef": beta}
    is_of_policy = [not response.is_of_reference for group in groups for response in group]
    if scored is None or not any(is_of_policy):
        return metrics

    def mean_of_sums(of_responses: Iterable[np.ndarray | Tensor]) -> float:
        return sum(float(values.sum()) for values in compress(of_responses, is_of_policy)) / sum(is_of_policy)

    metrics["objective/entropy"] = -mean_of_sums(values for policy, _ in logps for values in policy)
    if "reference" in settings.loss.needs:
        kl = mean_of_sums(scored.k1.split(scored.lengths.tolist()))
        metrics["objective/kl"] = kl
        metrics["objective/non_score_reward"] = -beta * kl
        if scores is not None:
            metrics["objective/rlhf_reward"] = scores - beta * kl
    return metrics


def mismatch_metrics(kept: Sequence[Group], logps: Sequence[Logps]) -> dict[str, float]:
    """How far another engine of sampling is from the policy: KL(sampler || policy) of a token, by k3."""
    pairs = [
        (response.logps, of_policy)
        for group, (policy, _) in zip(kept, logps, strict=True)
        for response, of_policy in zip(group, policy, strict=True)
        if response.logps is not None
    ]
    if not pairs:
        return {}
    sampler, policy = (torch.from_numpy(np.concatenate(each).astype(np.float64)) for each in zip(*pairs, strict=True))
    return {"rollout/mismatch_k3": k3(sampler, policy).mean().item()}


def cost_metrics(costs: Costs, seconds_by_rank: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Speed of sampling, and seconds of each part of an iteration: of its slowest rank.

    Args:
        costs: of all samples of the iteration.
        seconds_by_rank: of each part.
    """
    parts = [*dict.fromkeys(name for seconds in seconds_by_rank for name in seconds)]
    slowest = {name: max(seconds.get(name, 0.0) for seconds in seconds_by_rank) for name in parts}
    return {
        "rollout/bad_rewards": float(costs.num_bad_rewards),
        "rollout/tokens_per_second": costs.num_tokens / max(slowest["generate"], 1e-9),
        **{f"time/{name}": value for name, value in slowest.items()},
    }
