"""Reward and KL of policies on the embedded films, and of the exact optimum. For frontier.py."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from engine.data.examples import Example
from engine.data.films import film_reward, is_well_formed
from engine.export.saved_models import load_saved
from engine.models.group_sampling import Sampling, sample_groups, seeded_uniforms
from engine.step.heads import response_logps
from engine.step.layout import lay_out

SEED = 7  # of all measurements: the same random numbers for each policy
MAX_NEW_TOKENS = 64
OPTIMUM_BETAS = (4, 2, 1.4, 1, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
Curve = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
BEST_OF = (2, 4, 8, 16, 32, 64)


class Meter:
    """Samples responses of policies to the same prompts, and compares them with the reference.

    Args:
        num_responses: to each prompt.

    Attributes:
        samples: of the last measurement: the first response to each prompt, with its reward.
    """

    def __init__(self, reference: Path, prompts: Sequence[str], num_responses: int):
        transformers.logging.disable_progress_bar()
        saved = load_saved(str(reference / "LATEST"), dtype=torch.float32)
        self._reference, self._tokenizer = saved.model, saved.tokenizer
        self._texts, self._num_responses = prompts, num_responses
        self._prompts = [np.array(self._tokenizer.encode(text), dtype=np.int32) for text in prompts]
        self.samples: list[dict[str, Any]] = []

    def measure(self, checkpoint: Path) -> dict[str, float]:
        """Mean reward, KL(policy || reference) in nats per response, and share of well-formed responses.

        Standard errors are over prompts.
        """
        policy = load_saved(str(checkpoint), dtype=torch.float32).model
        groups, texts = self._sample(policy)
        rewards = np.array([[film_reward(text) for text in group] for group in texts])
        kl = self._kl(policy, groups)
        self.samples = [
            {"prompt": prompt, "response": group[0], "reward": reward}
            for prompt, group, reward in zip(self._texts, texts, rewards[:, 0].tolist(), strict=True)
        ]
        return {
            "reward": float(rewards.mean()),
            "reward_error": standard_error(rewards.mean(1)),
            "kl": float(kl.mean()),
            "kl_error": standard_error(kl.mean(1)),
            "well_formed": float(np.mean([is_well_formed(text) for group in texts for text in group])),
            "tokens": float(np.mean([len(response) for group in groups for response in group])),
        }

    def rewards_of_reference(self) -> np.ndarray:
        """Rewards of the reference's responses, [prompts, responses]."""
        _, texts = self._sample(self._reference)
        return np.array([[film_reward(text) for text in group] for group in texts])

    def _sample(self, model: Any) -> tuple[list[list[np.ndarray]], list[list[str]]]:
        tokenizer = self._tokenizer
        sampling = Sampling(
            self._num_responses,
            MAX_NEW_TOKENS,
            max_length=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            max_rows=256,
        )
        groups = sample_groups(
            model,
            self._prompts,
            lambda prompt, sample: seeded_uniforms([SEED, prompt, sample], MAX_NEW_TOKENS),
            sampling,
        )
        return groups, [tokenizer.batch_decode(group, skip_special_tokens=True) for group in groups]

    @torch.no_grad()
    def _kl(self, policy: Any, groups: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """log(policy / reference) of each response, [prompts, responses]: in the mean KL(policy || reference)."""
        examples = [
            Example(prompt, (response,), index)
            for index, (prompt, group) in enumerate(zip(self._prompts, groups, strict=True))
            for response in group
        ]
        found = []
        for start in range(0, len(examples), 64):
            batch = lay_out(examples[start : start + 64], "padded", self._tokenizer.eos_token_id)
            ratios = response_logps(policy, batch) - response_logps(self._reference, batch)
            found.append(ratios[batch.chosen])  # equal responses stand once in the batch
        return torch.cat(found).double().numpy().reshape(len(groups), -1)


def optimum(rewards: np.ndarray) -> dict[str, Any]:
    """The best reward at each KL, and the best of n, from rewards of the reference's responses [prompts, responses].

    - exact: for each beta the policy reference * exp(R / beta) / Z maximises E[R] - beta KL. Its rewards are those of
      the reference's responses, weighted by exp(R / beta). Z is the mean weight, and KL = E[R] / beta - log Z.
    - best_of_n: of n responses of the reference the best one, the first of equal ones. Its probability of a reward is
      F^n - F_below^n, with F the reference's share up to this reward; within a reward it is the reference.

    The bias is the difference to the mean of both halves of the responses. It falls as 1 / responses.
    """
    first, second = np.array_split(rewards, 2, axis=1)
    found: dict[str, Any] = {"prompts": len(rewards), "reference_reward": float(rewards.mean())}
    curves: Sequence[tuple[str, Curve, Sequence[float]]]
    curves = (("exact", tilted, OPTIMUM_BETAS), ("best_of_n", best_of, BEST_OF))
    for name, curve, strengths in curves:
        found[name] = []
        for strength in strengths:
            reward, kl = curve(rewards, strength)
            halves = [curve(half, strength) for half in (first, second)]
            found[name].append(
                {
                    "strength": strength,
                    "reward": float(reward.mean()),
                    "reward_error": standard_error(reward),
                    "reward_bias": float(np.mean([half[0].mean() for half in halves]) - reward.mean()),
                    "kl": float(kl.mean()),
                    "kl_error": standard_error(kl),
                    "kl_bias": float(np.mean([half[1].mean() for half in halves]) - kl.mean()),
                }
            )
    return found


def tilted(rewards: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Reward and KL of reference * exp(R / beta) / Z, [prompts] each."""
    weights = np.exp((rewards - rewards.max(1, keepdims=True)) / beta)
    reward = (weights * rewards).sum(1) / weights.sum(1)
    log_z = np.log(weights.mean(1)) + rewards.max(1) / beta
    return reward, reward / beta - log_z


def best_of(rewards: np.ndarray, n: float) -> tuple[np.ndarray, np.ndarray]:
    """Reward and KL of the best of n responses, [prompts] each."""
    found = []
    for row in rewards:
        levels, counts = np.unique(row, return_counts=True)
        shares = counts / counts.sum()
        up_to = shares.cumsum()
        chosen = up_to**n - np.concatenate([[0], up_to[:-1]]) ** n
        terms = np.where(chosen > 0, chosen * np.log(np.maximum(chosen, 1e-300) / shares), 0)
        found.append(((chosen * levels).sum(), terms.sum()))
    reward, kl = np.array(found).T
    return reward, kl


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values, [prompts]; 0 for one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
