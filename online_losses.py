"""Losses of sampled responses, and their advantages: pure functions for LOSSES in losses.py.

An iteration of online training samples a group of responses to each prompt, and scores them. An advantage function says
how much better than expected each token is. A loss compares the policy with the one that sampled. It returns one value
per token; `mean` in LOSSES says how these become the loss of the batch.

R is the reward. k1 = log(old policy / reference) of a token, and k3 = exp(-d) - 1 + d with d = log(policy / reference),
both as in Schulman 2020, "Approximating KL divergence".
"""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TokenLosses = Tensor  # [tokens]
Beta = Annotated[float, Ge(0)]
Clip = Annotated[float, Gt(0)]


class Scored(NamedTuple):
    """Sampled responses and their rewards, in fp64. Those of one prompt are adjacent.

    Args:
        rewards: [responses].
        group_sizes: int64 [prompts], responses of each.
        lengths: int64 [responses], in tokens.
        k1: log(old policy / reference), [tokens]; 0 without a reference.
        values: of the critic where it predicts the token, [tokens]; for PPO.
        greedy_rewards: of the most likely response to each prompt, [prompts]; for ReMax.
        is_learned: bool [responses]; the others count in baselines alone. None for all.
    """

    rewards: Tensor
    group_sizes: Tensor
    lengths: Tensor
    k1: Tensor
    greedy_rewards: Tensor | None = None
    values: Tensor | None = None
    is_learned: Tensor | None = None


class SampledPairs(NamedTuple):
    """Pairs of sampled responses, [pairs] each.

    Args:
        policy_better: log-probs of the better responses under the policy; the others likewise.
        better_lengths: int64, in tokens.
    """

    policy_better: Tensor
    policy_worse: Tensor
    reference_better: Tensor
    reference_worse: Tensor
    better_lengths: Tensor
    worse_lengths: Tensor


PairLoss = Callable[[SampledPairs, float], Tensor]  # takes pairs and beta; returns losses [pairs]

# ---- Advantages: Scored -> [tokens] ----


def grpo_advantages(scored: Scored) -> Tensor:
    """(R - group mean) / (group standard deviation + 1e-6), with n - 1.

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2.
    """
    centered = _centered(scored.rewards, scored)
    variances = _group_sums(centered.square(), scored) / (scored.group_sizes - 1).clamp(min=1)
    return _of_tokens(centered / (_of_responses(variances.sqrt(), scored) + 1e-6), scored)


def dr_grpo_advantages(scored: Scored) -> Tensor:
    """R - group mean. Liu et al. 2025 (arXiv 2503.20783), section 3.2."""
    return _of_tokens(_centered(scored.rewards, scored), scored)


def rloo_advantages(scored: Scored, *, beta: Beta) -> Tensor:
    """R - beta * KL, minus the mean of the group's other responses; KL is the sum of k1. 0 in a group of one.

    Ahmadian et al. 2024 (arXiv 2402.14740), section 3.2.
    """
    rewards = scored.rewards - beta * _sum_tokens(scored.k1, scored.lengths)
    sizes = _of_responses(scored.group_sizes, scored)
    # R - (sum - R) / (n - 1) is n / (n - 1) * (R - mean).
    return _of_tokens(_centered(rewards, scored) * sizes / (sizes - 1).clamp(min=1), scored)


def reinforce_pp_advantages(scored: Scored, *, beta: Beta, baseline: Literal["batch", "group"] = "batch") -> Tensor:
    """REINFORCE++: advantages whitened over all tokens of the iteration.

    Hu 2025 (arXiv 2501.03262), equations 7 to 9.

    Args:
        baseline: "batch": R - beta * the sum of k1 from this token on. "group": R - group mean.
    """
    if baseline == "group":
        advantages = dr_grpo_advantages(scored)
    else:
        sums = scored.k1.cumsum(0)
        ends = sums[scored.lengths.cumsum(0) - 1]  # [responses]
        to_come = _of_tokens(ends, scored) - sums + scored.k1
        advantages = _of_tokens(scored.rewards, scored) - beta * to_come
    return whitened(advantages, _learned_tokens(scored))


def remax_advantages(scored: Scored, *, beta: Beta) -> Tensor:
    """R - beta * KL, minus the reward of the greedy response; KL is the sum of k1.

    Li et al. 2023 (arXiv 2310.10505), algorithm 1.
    """
    assert scored.greedy_rewards is not None
    rewards = scored.rewards - beta * _sum_tokens(scored.k1, scored.lengths)
    return _of_tokens(rewards - _of_responses(scored.greedy_rewards, scored), scored)


def ppo_advantages(
    scored: Scored, *, beta: Beta, gamma: Annotated[float, Gt(0), Le(1)], gae_lambda: Annotated[float, Ge(0), Le(1)]
) -> tuple[Tensor, Tensor]:
    """Whitened advantages of PPO, and the returns that the critic learns, [tokens] each.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2: a token's reward is -beta * k1, the last one's also has R.

    Args:
        beta: weight of the KL to the reference in the rewards.
        gamma, gae_lambda: of gae().
    """
    assert scored.values is not None
    rewards = -beta * scored.k1
    rewards[scored.lengths.cumsum(0) - 1] += scored.rewards
    advantages = gae(rewards, scored.values, scored.lengths, gamma=gamma, gae_lambda=gae_lambda)
    return whitened(advantages, _learned_tokens(scored)), advantages + scored.values


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimates, [tokens]. The value after the last token is 0.

    Schulman et al. 2015 (arXiv 1506.02438), equation 16.

    Args:
        rewards, values: of the tokens, [tokens]; a value is read before its token.
        lengths: int64 [responses], in tokens.
    """
    by_response = [pad_sequence(each.split(lengths.tolist()), batch_first=True) for each in (rewards, values)]
    padded_rewards, padded_values = by_response  # [responses, longest], 0 after the end
    found = padded_rewards - padded_values
    found[:, :-1] += gamma * padded_values[:, 1:]
    for token in reversed(range(found.shape[1] - 1)):
        found[:, token] += gamma * gae_lambda * found[:, token + 1]
    return found[torch.arange(found.shape[1]) < lengths[:, None]]


def best_of_n_advantages(scored: Scored) -> Tensor:
    """1 for the best response of each group, the first of equal ones; 0 for the others."""
    chosen = torch.zeros_like(scored.rewards)
    start = 0
    for size in scored.group_sizes.tolist():
        chosen[start + int(scored.rewards[start : start + size].argmax())] = 1
        start += size
    return _of_tokens(chosen, scored)


def best_and_worst(scored: Scored) -> Tensor:
    """1 for the best response of each group, -1 for the worst, the first of equal ones; 0 for the others."""
    signs = torch.zeros_like(scored.rewards)
    start = 0
    for size in scored.group_sizes.tolist():
        group = scored.rewards[start : start + size]
        if group.max() > group.min():
            signs[start + int(group.argmax())] = 1
            signs[start + int(group.argmin())] = -1
        start += size
    return _of_tokens(signs, scored)


def whitened(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Values with mean 0 and variance 1, over the counted ones. Equal values become 0.

    Args:
        counted: bool, like values; None for all.
    """
    counts = counted is not None and bool(counted.any())
    centered = values - (values[counted] if counts else values).mean()
    return centered * (centered[counted] if counts else centered).square().mean().clamp(min=1e-8).rsqrt()


def _learned_tokens(scored: Scored) -> Tensor | None:
    """Which tokens are of learned responses, bool [tokens]; None for all."""
    return None if scored.is_learned is None else _of_tokens(scored.is_learned, scored)


# ---- Losses: [tokens] each -> [tokens] ----


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    beta: Beta,
    clip_low: Annotated[float, Gt(0), Lt(1)],
    clip_high: Clip,
) -> TokenLosses:
    """Group Relative Policy Optimization: the clipped loss of each token + beta * k3.

    Shao et al. 2024 (arXiv 2402.03300), equations 3 and 4. Dr. GRPO and DAPO differ in advantages and mean.

    Args:
        logps: log-probs under the policy, [tokens]; of the sampling policy and of the reference likewise.
        advantages: [tokens].
        lengths: int64 [responses], in tokens.
        beta: weight of the KL to the reference.
        clip_low, clip_high: the ratio of policies counts from 1 - clip_low to 1 + clip_high.
    """
    losses = clipped_loss(logps - old_logps, advantages, clip_low, clip_high)
    return losses + beta * k3(logps, reference_logps) if beta else losses


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    entropies: Tensor | None = None,
    *,
    clip_low: Annotated[float, Gt(0), Lt(1)],
    clip_high: Clip,
    entropy_bonus: Annotated[float, Ge(0)] = 0.0,
) -> TokenLosses:
    """Proximal Policy Optimization: the clipped loss of each token - entropy_bonus * entropy. The reward has the KL.

    Schulman et al. 2017 (arXiv 1707.06347), equations 7 and 9. The critic learns by value_loss.

    Args:
        logps: and all up to lengths, the same as for grpo_loss.
        entropies: of the policy's distribution of each token, [tokens]; None without entropy_bonus.
    """
    losses = clipped_loss(logps - old_logps, advantages, clip_low, clip_high)
    return losses if entropies is None else losses - entropy_bonus * entropies


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: Clip) -> TokenLosses:
    """The critic's loss of each token: half the larger squared error of the value and of the clipped value.

    As in the code of Schulman et al. 2017: a value counts within value_clip of the one at sampling.

    Args:
        values: of the critic, [tokens]; old_values: at sampling.
        returns: to be learned, [tokens].
    """
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def next_beta(
    beta: float,
    kl: float,
    num_responses: int,
    *,
    target_kl: Annotated[float, Gt(0)] | None = None,
    kl_horizon: Annotated[int, Gt(0)] = 10_000,
) -> float:
    """The weight of the KL in the rewards after an iteration: it rises above target_kl, and falls below it.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        kl: mean of the iteration, in nats per response.
        num_responses: of the iteration. kl_horizon responses or more change beta by a fifth at most.
        target_kl: None for a fixed weight.
    """
    if target_kl is None:
        return beta
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return beta * (1 + error * min(num_responses / kl_horizon, 1))  # a large iteration would make it negative


def rloo_loss(
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    clip_low: Annotated[float, Gt(0), Lt(1)],
    clip_high: Clip,
) -> TokenLosses:
    """The clipped loss of each response, by its whole probability; spread over its tokens.

    Ahmadian et al. 2024 (arXiv 2402.14740): a response is one action. Takes the same as grpo_loss.
    """
    logratios = _sum_tokens(logps - old_logps, lengths)
    first_tokens = lengths.cumsum(0) - lengths
    losses = clipped_loss(logratios, advantages[first_tokens], clip_low, clip_high)
    return (losses / lengths).repeat_interleave(lengths, output_size=len(logps))


def reinforce_pp_loss(
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    beta: Beta,
    clip_low: Annotated[float, Gt(0), Lt(1)],
    clip_high: Clip,
    baseline: Literal["batch", "group"] = "batch",
) -> TokenLosses:
    """The clipped loss of each token; + beta * k3 with the baseline of the group. Else the reward has the KL.

    Hu 2025 (arXiv 2501.03262). Takes the same as grpo_loss.
    """
    beta = beta if baseline == "group" else 0.0
    return grpo_loss(
        logps,
        old_logps,
        reference_logps,
        advantages,
        lengths,
        beta=beta,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def online_dpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    pair_loss: PairLoss,
) -> TokenLosses:
    """A loss of pairs, of the best and the worst of the sampled responses to each prompt.

    Guo et al. 2024 (arXiv 2402.04792), algorithm 1.

    Args:
        logps: log-probs under the policy, [tokens], of two responses to each prompt; of the others likewise.
        advantages: above 0 for the tokens of the better response, below 0 for the other.
        lengths: int64 [responses], in tokens.
        pair_loss: a loss of LOSSES, by the keys pair_loss and pair_options.

    Returns:
        the loss of each pair, spread over its tokens, [tokens]. Their sum is twice it, as there are two responses.
    """
    policy, reference = (_sum_tokens(values, lengths) for values in (logps, reference_logps))
    first_tokens = (lengths.cumsum(0) - lengths).view(-1, 2)[:, 0]
    is_first = advantages[first_tokens] > 0  # [pairs]: the first response is the better one

    def better_and_worse(values: Tensor) -> tuple[Tensor, Tensor]:
        first, second = values.view(-1, 2).unbind(1)
        return first.where(is_first, second), second.where(is_first, first)

    pairs = SampledPairs(*(each for values in (policy, reference, lengths) for each in better_and_worse(values)))
    num_tokens = lengths.view(-1, 2).sum(1)
    return (2 * pair_loss(pairs, beta) / num_tokens).repeat_interleave(num_tokens, output_size=len(logps))


def xpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    beta: Annotated[float, Gt(0)],
    alpha: Annotated[float, Ge(0)],
    pair_loss: PairLoss,
) -> TokenLosses:
    """Exploratory Preference Optimization: online DPO, and a push away from responses of the reference.

    Xie et al. 2024 (arXiv 2405.21046), algorithm 1, on the responses of one iteration. Takes and returns the same as
    online_dpo_loss. The second response to each prompt is one of the reference.

    Args:
        alpha: of the policy's log-prob of that response, which the loss adds.
    """
    pairs = online_dpo_loss(logps, old_logps, reference_logps, advantages, lengths, beta=beta, pair_loss=pair_loss)
    is_of_reference = torch.arange(len(lengths), device=lengths.device) % 2 == 1
    is_of_reference = is_of_reference.repeat_interleave(lengths, output_size=len(logps))
    return pairs + (2 * alpha * logps).where(is_of_reference, 0)


def best_of_n_loss(
    logps: Tensor, old_logps: Tensor, reference_logps: Tensor, advantages: Tensor, lengths: Tensor
) -> TokenLosses:
    """The negative log-likelihood of the best response. Takes the same as grpo_loss."""
    return -logps * advantages


def clipped_loss(logratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(ratio * A, clip(ratio) * A). Schulman et al. 2017 (arXiv 1707.06347), equation 7. Any shape."""
    ratios = logratios.exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)


def k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) at each token, at least 0."""
    logratios = logps - reference_logps
    return torch.expm1(-logratios) + logratios


# ---- Another sampler than the policy ----

MAX_SAMPLER_RATIO = 2.0


def sampler_ratios(logps: Tensor, sampler_logps: Tensor, lengths: Tensor, of: Literal["tokens", "responses"]) -> Tensor:
    """min(policy / sampler, 2) of each token, or of its response, [tokens].

    Truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training". Advantages times these scale the loss of rewards, and the KL only if it is a part of the advantages.

    Args:
        logps: under the policy as the trainer computes them, [tokens].
        sampler_logps: the same by the engine of sampling.
        lengths: int64 [responses], in tokens.
    """
    logratios = logps - sampler_logps
    if of == "responses":
        logratios = _sum_tokens(logratios, lengths).repeat_interleave(lengths)
    return logratios.exp().clamp(max=MAX_SAMPLER_RATIO)


# ---- Means ----

Mean = Literal["responses", "tokens", "max_new_tokens", "sums"]


def token_weights(mean: Mean, lengths: Tensor, max_new_tokens: int) -> Tensor:
    """The weight of each token's loss in the loss of a batch, fp64 [tokens].

    Args:
        mean: over what. "tokens": all tokens of the batch. Else the mean over responses: of the mean over their tokens
            ("responses"), of the sum over these ("sums"), or of the sum over max_new_tokens ("max_new_tokens").
        lengths: int64 [responses], of all responses of the batch.
    """
    per_response = torch.ones(len(lengths), dtype=torch.float64) / len(lengths)
    if mean == "tokens":
        per_response = torch.ones(len(lengths), dtype=torch.float64) / lengths.sum()
    elif mean == "responses":
        per_response = per_response / lengths
    elif mean == "max_new_tokens":
        per_response = per_response / max_new_tokens
    return per_response.repeat_interleave(lengths)


# ---- Sums over groups and responses ----


def _group_sums(values: Tensor, scored: Scored) -> Tensor:
    """Sums of values [responses] over each group, [prompts]."""
    return torch.segment_reduce(values, "sum", lengths=scored.group_sizes)


def _centered(values: Tensor, scored: Scored) -> Tensor:
    """Values [responses] minus the mean of their group. Of equal values exactly 0, as sums of zeros are exact."""
    firsts = values[scored.group_sizes.cumsum(0) - scored.group_sizes]  # [prompts]
    shifted = values - _of_responses(firsts, scored)
    return shifted - _of_responses(_group_sums(shifted, scored) / scored.group_sizes, scored)


def _of_responses(values: Tensor, scored: Scored) -> Tensor:
    """Values [prompts] for each response, [responses]."""
    return values.repeat_interleave(scored.group_sizes)


def _of_tokens(values: Tensor, scored: Scored) -> Tensor:
    """Values [responses] for each token, [tokens]."""
    return values.repeat_interleave(scored.lengths)


def _sum_tokens(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of values [tokens] over each response, [responses]."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
