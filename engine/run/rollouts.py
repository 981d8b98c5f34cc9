"""Roll out: sample responses to prompts, score them, and compute what their losses need."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example, Rollout
from engine.models.adapters import adapter_of
from engine.models.group_sampling import Sampling, sample_groups, seeded_uniforms
from engine.models.precision import run_in_dtype
from engine.placement.placement import Placement
from engine.run.reward_functions import RewardFunctions, Score
from engine.settings.keys import keyword_names
from engine.settings.schema import Settings
from engine.step.layout import in_group_order
from engine.step.microbatches import MicrobatchRunner
from losses import LOSSES
from online_losses import Scored

TRAINING, GREEDY, EVALUATION = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Args:
        tokens: int32 [response tokens].
        text: without special tokens.
        is_truncated: it has no end-of-text token.
        reward: None leaves it out.
        score: of the reward functions.
    """

    tokens: np.ndarray
    text: str
    is_truncated: bool
    reward: float | None
    score: Score


Group = list[Response]  # of one prompt


class Sampler:
    """Samples responses of a model on all ranks, and scores them."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        placement: Placement,
        rewards: RewardFunctions,
    ):
        self._settings, self._tokenizer, self._placement, self._rewards = settings, tokenizer, placement, rewards
        self.seconds = {"generate": 0.0, "reward": 0.0}

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[Example], seeds: Sequence[Sequence[int]], num_samples: int
    ) -> list[Group]:
        """Responses to each prompt. Ranks share the work; all call this together.

        Args:
            seeds: of each prompt, a stream first. The stream GREEDY takes the most likely tokens.
        """
        placement = self._placement
        local = slice(placement.data_rank, None, placement.num_data_ranks)
        with self.timed("generate"):
            tokens = self._sample_tokens(model, prompts[local], seeds[local], num_samples)
        with self.timed("reward"):
            groups = [self._score(*pair) for pair in zip(prompts[local], tokens, strict=True)]
            by_rank = placement.gather_from_data_ranks(groups)
        num_ranks = placement.num_data_ranks
        return [by_rank[index % num_ranks][index // num_ranks] for index in range(len(prompts))]

    def _sample_tokens(
        self, model: PreTrainedModel, prompts: Sequence[Example], seeds: Sequence[Sequence[int]], num_samples: int
    ) -> list[list[np.ndarray]]:
        settings, tokenizer, placement = self._settings, self._tokenizer, self._placement
        is_greedy = any(seed[0] == GREEDY for seed in seeds)
        sampling = Sampling(
            num_samples,
            settings.max_new_tokens,
            settings.max_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            temperature=0 if is_greedy else settings.rollout.temperature,
            max_rows=settings.rollout.max_rows,
        )
        # As in evaluations: full models sample in their own dtype.
        dtype = placement.compute_dtype if adapter_of(model) else None
        with run_in_dtype(model, dtype), placement.gathered(model):
            return sample_groups(
                model,
                [prompt.prompt for prompt in prompts],
                lambda prompt, sample: seeded_uniforms(
                    [settings.seed, *seeds[prompt], sample], settings.max_new_tokens
                ),
                sampling,
            )

    def _score(self, prompt: Example, responses: Sequence[np.ndarray]) -> Group:
        texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [self._response(prompt, *pair) for pair in zip(responses, texts, strict=True)]

    def _response(self, prompt: Example, tokens: np.ndarray, text: str) -> Response:
        assert prompt.row is not None
        score = self._rewards(prompt.row, text)
        is_truncated = int(tokens[-1]) != self._tokenizer.eos_token_id
        reward, penalty = score.total, self._settings.rollout.missing_eos_penalty
        if reward is not None and is_truncated and penalty:
            reward -= penalty
        return Response(tokens, text, is_truncated, reward, score)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a with block."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


class Rollouts:
    """Makes the iterations of online training.

    Args:
        split_batch: a batch -> its microbatches, as in training.

    Attributes:
        facts: metrics of the last iteration, until a step takes them.
        rows: responses of its first prompt, for samples.jsonl.
    """

    def __init__(
        self,
        settings: Settings,
        sampler: Sampler,
        placement: Placement,
        runner: MicrobatchRunner,
        split_batch: Callable[[Sequence[Example]], list[list[Example]]],
    ):
        self._settings, self._sampler, self._placement = settings, sampler, placement
        self._runner, self._split_batch = runner, split_batch
        self._loss = LOSSES[settings.loss.name]
        self.facts: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def make(self, first_prompt: int, prompts: Sequence[Example]) -> list[Example]:
        """The prompts with sampled responses. All ranks call this together.

        Args:
            first_prompt: the number of prompts of the run before these.
        """
        sampler = self._sampler
        sampler.seconds = {}
        groups = self._sample(first_prompt, prompts)
        greedy = self._greedy(first_prompt, prompts)
        kept = self._kept(groups, greedy)
        examples = [
            replace(prompt, responses=tuple(response.tokens for response in group))
            for prompt, group in zip(prompts, kept, strict=True)
        ]
        with sampler.timed("logps"):
            logps = self._logps(examples)
        examples, scored = self._with_advantages(examples, kept, logps, greedy)
        self.facts = self._metrics(groups, kept, scored, logps)
        self.rows = [
            {
                "examples": first_prompt * self._settings.rollout.epochs,
                "prompt": prompts[0].row.text if prompts[0].row else "",
                "response": response.text,
                "reward": response.reward,
                **{f"reward/{name}": value for name, value in response.score.parts.items()},
            }
            for response in groups[0]
        ]
        learned = [self._without_unlearned(*pair) for pair in zip(examples, kept, strict=True)]
        return self._with_new_logps(examples, learned) if self._settings.rollout.truncated == "mask" else learned

    def _sample(self, first_prompt: int, prompts: Sequence[Example]) -> list[Group]:
        """Responses to each prompt. Groups of equal rewards are sampled again, if so set."""
        rollout, policy = self._settings.rollout, self._runner.policy
        groups: list[Group] = [[] for _ in prompts]
        places, self._num_resampled = list(range(len(prompts))), 0
        for attempt in range((rollout.max_resamples or 0) + 1):
            seeds = [(TRAINING, first_prompt + place, attempt) for place in places]
            found = self._sampler.sample(policy, [prompts[place] for place in places], seeds, rollout.num_responses)
            for place, group in zip(places, found, strict=True):
                groups[place] = group
            self._num_resampled += len(places) if attempt else 0
            places = [place for place in places if has_equal_rewards(groups[place])]
            if not places:
                break
        return groups

    def _greedy(self, first_prompt: int, prompts: Sequence[Example]) -> list[Response] | None:
        """The most likely response to each prompt, if the loss compares with it."""
        if not self._loss.has_greedy_baseline:
            return None
        seeds = [(GREEDY, first_prompt + place) for place in range(len(prompts))]
        return [group[0] for group in self._sampler.sample(self._runner.policy, prompts, seeds, 1)]

    def _kept(self, groups: Sequence[Group], greedy: Sequence[Response] | None) -> list[Group]:
        """The responses that count: with a reward, and not of a group left out or without a baseline."""
        leaves_out = self._settings.rollout.max_resamples is not None
        if greedy is not None:
            groups = [group if best.reward is not None else [] for group, best in zip(groups, greedy, strict=True)]
        return [
            []
            if leaves_out and has_equal_rewards(group)
            else [response for response in group if response.reward is not None]
            for group in groups
        ]

    def _logps(self, examples: Sequence[Example]) -> list[tuple[list[np.ndarray], list[np.ndarray] | None]]:
        """Log-probs of each example's responses, under the policy and the reference, as the first pass computes them.

        Each batch is split as in training, and each rank runs its microbatches of training. So the bits are the same.
        """
        runner, placement, batch_size = self._runner, self._placement, self._settings.batch_size
        found: dict[int, tuple[list[np.ndarray], list[np.ndarray] | None]] = {}

        def to_numpy(values: list[Tensor] | None) -> list[np.ndarray] | None:
            return None if values is None else [each.numpy() for each in values]

        with runner.in_mixed_precision():
            for start in range(0, len(examples), batch_size):
                parts = self._split_batch(examples[start : start + batch_size])
                local = [
                    [(to_numpy(policy), to_numpy(reference)) for policy, reference in runner.sample_logps(part)]
                    for part in placement.rank_slice(parts)
                ]
                by_rank = placement.gather_from_data_ranks(local)
                for number, part in enumerate(parts):
                    of_part = by_rank[number % placement.num_data_ranks][number // placement.num_data_ranks]
                    order = in_group_order([example for example in part if example.responses])
                    for example, (policy, reference) in zip(order, of_part, strict=True):
                        assert policy is not None
                        found[id(example)] = policy, reference
        return [found.get(id(example), ([], None)) for example in examples]

    def _with_advantages(
        self,
        examples: Sequence[Example],
        kept: Sequence[Group],
        logps: Sequence[tuple[list[np.ndarray], list[np.ndarray] | None]],
        greedy: Sequence[Response] | None,
    ) -> tuple[list[Example], Scored | None]:
        """The examples with the numbers of their tokens, and what the advantages came from; None without responses."""
        places = [place for place, group in enumerate(kept) if group]
        if not places:
            return list(examples), None
        old = [torch.from_numpy(values).double() for place in places for values in logps[place][0]]
        lengths = torch.tensor([len(values) for values in old])
        k1 = torch.zeros(int(lengths.sum()), dtype=torch.float64)
        if logps[places[0]][1] is not None:
            reference = [torch.from_numpy(values).double() for place in places for values in logps[place][1] or []]
            k1 = torch.cat(old) - torch.cat(reference)
        rewards = [response.reward for place in places for response in kept[place]]
        greedy_rewards = [greedy[place].reward for place in places] if greedy else None
        scored = Scored(
            rewards=torch.tensor(rewards, dtype=torch.float64),
            group_sizes=torch.tensor([len(kept[place]) for place in places]),
            lengths=lengths,
            k1=k1,
            greedy_rewards=None if greedy_rewards is None else torch.tensor(greedy_rewards, dtype=torch.float64),
        )
        advantages = self._loss.advantages
        assert advantages is not None
        keywords = self._settings.loss.keywords
        values = advantages(scored, **{name: keywords[name] for name in keyword_names(advantages)})
        by_response = iter(values.split(lengths.tolist()))
        found = list(examples)
        for place in places:
            policy, of_reference = logps[place]
            rollout = Rollout(
                weights=(),
                old_logps=tuple(policy),
                reference_logps=None if of_reference is None else tuple(of_reference),
                advantages=tuple(next(by_response).numpy() for _ in kept[place]),
            )
            found[place] = replace(examples[place], rollout=rollout)
        return found, scored

    def _without_unlearned(self, example: Example, group: Group) -> Example:
        """An example without the responses that count in the baseline alone."""
        rollout, masks = example.rollout, self._settings.rollout.truncated == "mask"
        if rollout is None:
            return example
        numbers = [
            number
            for number, response in enumerate(group)
            if not (masks and response.is_truncated)
            and not (self._loss.learns_some and not rollout.advantages[number].any())
        ]

        def of_numbers(values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            return tuple(values[number] for number in numbers)

        reference_logps = None if rollout.reference_logps is None else of_numbers(rollout.reference_logps)
        learned = Rollout((), of_numbers(rollout.old_logps), reference_logps, of_numbers(rollout.advantages))
        return replace(example, responses=of_numbers(example.responses), rollout=learned if numbers else None)

    def _with_new_logps(self, before: Sequence[Example], after: Sequence[Example]) -> list[Example]:
        """Examples with log-probs as training computes them, after some responses have left their microbatches."""
        if all(len(old.responses) == len(new.responses) for old, new in zip(before, after, strict=True)):
            return list(after)
        found = []
        with self._sampler.timed("logps"):
            logps = self._logps(after)
        for example, (policy, reference) in zip(after, logps, strict=True):
            rollout = example.rollout
            if rollout is not None:
                of_reference = None if reference is None else tuple(reference)
                rollout = replace(rollout, old_logps=tuple(policy), reference_logps=of_reference)
            found.append(replace(example, rollout=rollout))
        return found

    def _metrics(
        self,
        groups: Sequence[Group],
        kept: Sequence[Group],
        scored: Scored | None,
        logps: Sequence[tuple[list[np.ndarray], list[np.ndarray] | None]],
    ) -> dict[str, float]:
        """Metrics of an iteration, over all its responses."""
        responses = [response for group in groups for response in group]
        lengths = [len(response.tokens) for response in responses]
        seconds = self._sampler.seconds
        beta = self._settings.loss.keywords.get("beta", 0.0)
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
        if self._settings.rollout.max_resamples is not None:
            metrics["rollout/resampled_groups"] = float(self._num_resampled)
        if scored is not None:
            score = scored.rewards.mean().item()
            log_probs = sum(float(values.sum()) for policy, _ in logps for values in policy)
            metrics["objective/scores"] = score
            metrics["objective/entropy"] = -log_probs / len(scored.rewards)
            if "reference" in self._settings.loss.needs:
                kl = scored.k1.sum().item() / len(scored.rewards)
                metrics["objective/kl"] = kl
                metrics["objective/non_score_reward"] = -beta * kl
                metrics["objective/rlhf_reward"] = score - beta * kl
        return metrics


def has_equal_rewards(group: Group) -> bool:
    """Whether a group compares nothing: equal rewards, or at most one."""
    return len({response.reward for response in group if response.reward is not None}) < 2


def reward_metrics(responses: Sequence[Response], prefix: str) -> dict[str, float]:
    """The mean of each reward function over responses, where it gives one."""
    parts: Mapping[str, list[float]] = {name: [] for name in responses[0].score.parts}
    for response in responses:
        for name, value in response.score.parts.items():
            if value is not None:
                parts[name].append(value)
    return {f"{prefix}/{name}": float(np.mean(values)) for name, values in parts.items() if values}
