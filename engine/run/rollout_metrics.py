"""Metrics of an iteration of online training."""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.run.sampler import Group, has_equal_rewards, reward_metrics
from engine.settings.schema import Settings
from online_losses import Scored

Logps = tuple[list[np.ndarray], list[np.ndarray] | None]  # of an example's responses: under policy and reference


def iteration_metrics(
    settings: Settings,
    groups: Sequence[Group],
    kept: Sequence[Group],
    scored: Scored | None,
    logps: Sequence[Logps],
    *,
    seconds: Mapping[str, float],
    num_resampled: int,
) -> dict[str, float]:
    """Metrics of an iteration, over all its responses.

    Args:
        groups: of each prompt.
        kept: the responses of each group that are learned.
        scored: what the advantages of these came from.
        logps: of these.
        seconds: of each part of the iteration.
        num_resampled: groups sampled again.
    """
    responses = [response for group in groups for response in group]
    lengths = [len(response.tokens) for response in responses]
    beta = settings.loss.keywords.get("beta", 0.0)
    metrics = {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncated": float(np.mean([response.is_truncated for response in responses])),
        "rollout/zero_std_groups": float(np.mean([has_equal_rewards(group) for group in groups])),
        "rollout/distinct": float(np.mean([len({response.text for response in g}) / len(g) for g in groups])),
        "rollout/left_out": float(len(responses) - sum(map(len, kept))),
        "rollout/tokens_per_second": sum(lengths) / max(seconds["generate"], 1e-9),
        **{f"time/{name}": value for name, value in seconds.items()},
        "objective/kl_coef": float(beta),
        **reward_metrics(responses, "rewards_train"),
    }
    if settings.rollout.max_resamples is not None:
        metrics["rollout/resampled_groups"] = float(num_resampled)
    if scored is not None:
        score = scored.rewards.mean().item()
        log_probs = sum(float(values.sum()) for policy, _ in logps for values in policy)
        metrics["objective/scores"] = score
        metrics["objective/entropy"] = -log_probs / len(scored.rewards)
        if "reference" in settings.loss.needs:
            kl = scored.k1.sum().item() / len(scored.rewards)
            metrics["objective/kl"] = kl
            metrics["objective/non_score_reward"] = -beta * kl
            metrics["objective/rlhf_reward"] = score - beta * kl
    return metrics
