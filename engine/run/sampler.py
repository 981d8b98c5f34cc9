"""Sample responses to prompts on all ranks, and score them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.models.adapters import adapter_of
from engine.models.group_sampling import Sampling
from engine.models.precision import run_in_dtype
from engine.models.sampling_engines import Loop, Sampled, build_engine
from engine.placement.placement import Placement
from engine.rewards.samples import PromptSample, samples_of
from engine.run.reward_functions import RewardFunctions, Score
from engine.settings.schema import Settings

TRAINING, GREEDY, EVALUATION, REFERENCE = range(4)  # streams of random numbers


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Args:
        tokens: int32 [response tokens].
        text: without special tokens.
        is_truncated: it has no end-of-text token.
        reward: None leaves it out.
        score: of the reward functions.
        is_of_reference: the reference sampled it, not the policy.
        logps: as the engine of sampling has them, fp64 [response tokens]; None if it runs the policy itself.
    """

    tokens: np.ndarray
    text: str
    is_truncated: bool
    reward: float | None
    score: Score
    is_of_reference: bool = False
    logps: np.ndarray | None = None


Group = list[Response]  # of one prompt


@dataclass
class Costs:
    """What an iteration costs.

    Args:
        seconds: of each part, on this rank.
        num_tokens: sampled on all ranks.
        num_bad_rewards: dropped by on_bad_reward, on all ranks.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_bad_rewards: int = 0


class Sampler:
    """Samples responses of a model on all ranks, and scores them.

    Attributes:
        costs: grow with each sample, until the caller replaces them.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        placement: Placement,
        rewards: RewardFunctions,
    ):
        self._settings, self._tokenizer, self._placement, self.rewards = settings, tokenizer, placement, rewards
        self._engine, self._loop = build_engine(settings), Loop()
        self.costs = Costs()

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
            sampled = self._sample_tokens(model, prompts[local], seeds[local], num_samples)
        num_dropped = self.rewards.num_dropped
        with self.timed("reward"):
            # Ranks with the same prompts take the scores of the first: a judge is asked once.
            is_first = placement.rank % (placement.num_ranks // placement.num_data_ranks) == 0
            groups = self._score(prompts[local], sampled.tokens) if is_first else []
            if sampled.logps is not None and is_first:
                groups = [
                    [replace(response, logps=logps) for response, logps in zip(*pair, strict=True)]
                    for pair in zip(groups, sampled.logps, strict=True)
                ]
        by_rank = placement.gather_from_data_ranks((groups, self.rewards.num_dropped - num_dropped))
        num_ranks, costs = placement.num_data_ranks, self.costs
        costs.num_bad_rewards += sum(num_bad for _, num_bad in by_rank)
        found = [by_rank[index % num_ranks][0][index // num_ranks] for index in range(len(prompts))]
        costs.num_tokens += sum(len(response.tokens) for group in found for response in group)
        return found

    def _sample_tokens(
        self, model: PreTrainedModel, prompts: Sequence[Example], seeds: Sequence[Sequence[int]], num_samples: int
    ) -> Sampled:
        settings, tokenizer, placement = self._settings, self._tokenizer, self._placement
        is_greedy, is_training = (any(seed[0] == stream for seed in seeds) for stream in (GREEDY, TRAINING))
        sampling = Sampling(
            num_samples,
            settings.max_new_tokens,
            settings.max_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            temperature=0 if is_greedy else settings.rollout.temperature,
            top_p=settings.rollout.top_p if is_training else 1.0,
            max_rows=settings.rollout.max_rows,
        )
        # Evaluations and baselines have the same random numbers with each engine.
        engine = self._engine if all(seed[0] == TRAINING for seed in seeds) else self._loop
        # Responses to learn are of the model that training runs. Evaluations run full models in the weights' own dtype.
        is_learned = all(seed[0] in (TRAINING, REFERENCE) for seed in seeds)
        dtype = placement.compute_dtype if is_learned or adapter_of(model) else None
        with run_in_dtype(model, dtype), placement.gathered(model):
            return engine.sample(
                model,
                [prompt.prompt for prompt in prompts],
                [[settings.seed, *seed] for seed in seeds],
                sampling,
            )

    def _score(self, prompts: Sequence[Example], responses: Sequence[Sequence[np.ndarray]]) -> list[Group]:
        """The scored responses to each prompt. Rewards get all of them at once."""
        drafts: list[list[tuple[np.ndarray, str, bool]]] = []
        samples: list[PromptSample] = []
        for prompt, group in zip(prompts, responses, strict=True):
            assert prompt.row is not None
            texts = self._tokenizer.batch_decode(group, skip_special_tokens=True)
            are_truncated = [int(tokens[-1]) != self._tokenizer.eos_token_id for tokens in group]
            drafts.append([*zip(group, texts, are_truncated, strict=True)])
            samples += samples_of(prompt.row, [*zip(texts, are_truncated, strict=True)])
        scores = iter(self.rewards(samples))
        return [[self._response(*draft, next(scores)) for draft in group] for group in drafts]

    def _response(self, tokens: np.ndarray, text: str, is_truncated: bool, score: Score) -> Response:
        settings, reward = self._settings.rollout, score.total
        if reward is not None and is_truncated and settings.missing_eos_penalty:
            reward -= settings.missing_eos_penalty
        if reward is not None and settings.overlong_buffer:
            penalty = overlong_penalty(len(tokens), self._settings.max_new_tokens, settings.overlong_buffer)
            reward -= settings.overlong_penalty * penalty
        return Response(tokens, text, is_truncated, reward, score)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a with block."""
        start = time.monotonic()
        yield
        self.costs.seconds[name] = self.costs.seconds.get(name, 0.0) + time.monotonic() - start


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """The soft penalty of a long response, 0 to 1: it rises over the last tokens before the longest response.

    DAPO, Yu et al. 2025 (arXiv 2503.14476), equation 13, with the opposite sign.

    Args:
        length, longest: in tokens.
        buffer: the tokens over which it rises.
    """
    return min(max(length - (longest - buffer), 0) / buffer, 1.0)


def has_equal_rewards(group: Group) -> bool:
    """Whether a group compares nothing: equal rewards, or at most one."""
    return len({response.reward for response in group if response.reward is not None}) < 2


def reward_metrics(responses: Sequence[Response], prefix: str) -> dict[str, float]:
    """The mean of each reward function over responses, where it gives one, and how often it gives none."""
    parts: Mapping[str, list[float]] = {name: [] for name in responses[0].score.parts}
    for response in responses:
        for name, value in response.score.parts.items():
            if value is not None:
                parts[name].append(value)
    metrics = {f"{prefix}/{name}": float(np.mean(values)) for name, values in parts.items() if values}
    numbers = {name: len(responses) - len(values) for name, values in parts.items()}
    return metrics | {f"{prefix}/{name}/none": float(number) for name, number in numbers.items() if number}
