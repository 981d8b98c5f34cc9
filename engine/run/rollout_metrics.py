"""Metrics of an iteration of online training. Each function gives those of one subject."""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.run.sampler import Costs, Group, has_equal_rewards, reward_metrics
from engine.settings.schema import Settings
from online_losses import Scored

Logps = tuple[list[np.ndarray], list[np.ndarray] | None]  # of an example's responses: under policy and reference


def sampling_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the policy that samples, over all its responses.

    Args:
        groups: of each prompt, as first sampled. Those sampled again for their rewards would be a selection.
    """
    responses = [response for group in groups for response in group]
    lengths = [len(response.tokens) for response in responses]
    metrics = {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncated": float(np.mean([response.is_truncated for response in responses])),
        "rollout/zero_std_groups": float(np.mean([has_equal_rewards(group) for group in groups])),
        "rollout/distinct": float(np.mean([len({response.text for response in g}) / len(g) for g in groups])),
        **reward_metrics(responses, "rewards_train"),
    }
    rewards = [response.reward for response in responses if response.reward is not None]
    if rewards:
        metrics["objective/scores"] = float(np.mean(rewards))
    return metrics


def learned_metrics(
    settings: Settings, scored: Scored | None, logps: Sequence[Logps], scores: float | None
) -> dict[str, float]:
    """Metrics of the responses that are learned.

    Args:
        scored: what the advantages came from; None without responses.
        logps: of the responses.
        scores: the mean reward of all responses; None without one.
    """
    beta = settings.loss.keywords.get("beta", 0.0)
    metrics = {"objective/kl_coef": float(beta)}
    if scored is None:
        return metrics
    log_probs = sum(float(values.sum()) for policy, _ in logps for values in policy)
    metrics["objective/entropy"] = -log_probs / len(scored.rewards)
    if "reference" in settings.loss.needs:
        kl = scored.k1.sum().item() / len(scored.rewards)
        metrics["objective/kl"] = kl
        metrics["objective/non_score_reward"] = -beta * kl
        if scores is not None:
            metrics["objective/rlhf_reward"] = scores - beta * kl
    return metrics


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
