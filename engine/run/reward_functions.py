"""The rewards of a run, weighted, summed and clipped."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from engine.rewards.judge import JudgeReward
from engine.rewards.python_tests import PythonTestsReward
from engine.rewards.reward_model import RewardModelReward
from engine.rewards.samples import PromptSample
from engine.rewards.time_limit import time_limit
from engine.settings.schema import Settings
from rewards import REWARDS, BatchReward, EngineReward, GroundTruth, Judge, PythonTests, RewardModel, Sample
from utils import UserError, clipped, printable

# Scores of samples, in their order. An exception in place of a score is of this sample.
Scoring = Callable[[Sequence[Sample]], Iterable[float | Exception | None]]


def build_rewards(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    ground_truth: Callable[[str], float] | None,
    chat_form: Callable[[Sequence[str]], str | None],
) -> "RewardFunctions":
    """The rewards of the settings; without any, the ground truth.

    Args:
        tokenizer: of the policy.
        device: of reward models.
        ground_truth: the reward of the data set, if it has one.
        chat_form: names of data sets -> their common chat template.

    Raises:
        UserError: CONFIG for rewards that cannot be had.
    """
    names = settings.rewards or ["ground_truth"]
    options = settings.reward_options or {}

    def engine_reward(chosen: EngineReward) -> Scoring:
        match chosen:
            case PythonTests():
                return PythonTestsReward(chosen)
            case RewardModel():
                return RewardModelReward(chosen, settings, tokenizer, device, chat_form)
            case Judge():
                assert settings.cache_dir is not None and settings.local_run_dir is not None  # the run has named them
                cache, transcript = Path(settings.cache_dir) / "judge", Path(settings.local_run_dir) / "judge.jsonl"
                return JudgeReward(chosen, cache, transcript)
        assert isinstance(chosen, GroundTruth) and ground_truth is not None  # check_rewards() has seen to it
        known = ground_truth
        return OneByOne(lambda prompt, response, row: known(response), settings.reward_timeout)

    return RewardFunctions(
        {name: build_scoring(name, options.get(name, {}), settings.reward_timeout, engine_reward) for name in names},
        weights=settings.reward_weights,
        clip=settings.reward_clip,
        on_bad_reward=settings.on_bad_reward,
    )


def build_scoring(
    name: str, options: Mapping[str, Any], timeout: float | None, engine_reward: Callable[[EngineReward], Scoring]
) -> Scoring:
    """The scoring of a key of REWARDS.

    Args:
        timeout: seconds for a response; None for any.
        engine_reward: makes a reward of the engine from its options.
    """
    reward = REWARDS[name]
    if not isinstance(reward, type):
        return OneByOne(partial(reward, **options), timeout)
    if issubclass(reward, BatchReward):
        return AllAtOnce(reward(**options), timeout)
    chosen: type[Any] = reward  # its options are checked: see online_rules.py
    return engine_reward(chosen(**options))


@dataclass(frozen=True)
class OneByOne:
    """The scoring of a function of one response.

    Args:
        timeout: seconds for a response; None for any.
    """

    function: Callable[..., float | None]
    timeout: float | None

    def __call__(self, samples: Sequence[Sample]) -> Iterator[float | Exception | None]:
        for sample in samples:
            try:
                with time_limit(self.timeout):
                    found: float | Exception | None = self.function(sample.prompt, sample.response, sample.row)
            except Exception as error:  # of a user's function: any
                found = error
            yield found


@dataclass(frozen=True)
class AllAtOnce:
    """The scoring of a user's BatchReward. It gets the time of all its responses."""

    reward: BatchReward
    timeout: float | None

    def __call__(self, samples: Sequence[Sample]) -> list[float | Exception | None]:
        with time_limit(self.timeout and self.timeout * len(samples)):
            found = [*self.reward(samples)]
        if len(found) > len(samples):  # nobody knows whose they are
            raise ValueError(f"it returned {len(found):,} rewards for {len(samples):,} responses")
        return found


@dataclass(frozen=True)
class Score:
    """The reward of a response.

    Args:
        total: the weighted sum, clipped; None leaves the response out.
        parts: the reward of each function.
    """

    total: float | None
    parts: dict[str, float | None]


class RewardFunctions:
    """Scores responses by the chosen rewards.

    Args:
        scorings: of each reward, by its name.
        weights: of the sum; None for 1 each.
        clip: the largest absolute value of the sum; None for any.
        on_bad_reward: of a reward that raises, or is no finite number. "raise": end the run. "drop": leave the response
            out, as for None.

    Attributes:
        num_dropped: rewards dropped so far.
    """

    def __init__(
        self,
        scorings: Mapping[str, Scoring],
        *,
        weights: Sequence[float] | None = None,
        clip: float | None = None,
        on_bad_reward: Literal["raise", "drop"],
    ):
        self.names = [*scorings]
        self._scorings = scorings
        self._weights = [1.0] * len(scorings) if weights is None else [*weights]
        self._clip, self._on_bad_reward = clip, on_bad_reward
        self.num_dropped = 0

    @property
    def num_bytes(self) -> int:
        """Of reward models, on the device of training."""
        return sum(getattr(scoring, "num_bytes", 0) for scoring in self._scorings.values())

    def __call__(self, samples: Sequence[PromptSample]) -> list[Score]:
        """The reward of each sample.

        Raises:
            UserError: DATA for a bad reward, with on_bad_reward="raise".
        """
        if not samples:
            return []
        columns = [self._rewards(name, samples) for name in self.names]
        return [self._score(dict(zip(self.names, values, strict=True))) for values in zip(*columns, strict=True)]

    def _score(self, parts: dict[str, float | None]) -> Score:
        values = [value for value in parts.values() if value is not None]
        if len(values) < len(parts):
            return Score(None, parts)
        total = sum(weight * value for weight, value in zip(self._weights, values, strict=True))
        if self._clip is not None:
            total = min(max(total, -self._clip), self._clip)
        return Score(total, parts)

    def _rewards(self, name: str, samples: Sequence[PromptSample]) -> list[float | None]:
        """The reward of each sample by one function."""
        values: list[float | None] = []
        try:
            for sample, value in zip(samples, self._scorings[name](samples), strict=True):
                values.append(self._number(name, sample, value))
        except UserError:
            raise
        except Exception as error:  # of a user's BatchReward: any
            num_left = len(samples) - len(values)
            self._drop(name, samples[len(values)], error, num_left)
            values += [None] * num_left
        return values

    def _number(self, name: str, sample: PromptSample, value: float | Exception | None) -> float | None:
        if value is None:
            return None
        try:
            if isinstance(value, Exception):
                raise value
            number = float(value)
            if not math.isfinite(number):
                raise ValueError(f"it returned {number}")
            return number
        except UserError:
            raise
        except Exception as error:
            self._drop(name, sample, error)
            return None

    def _drop(self, name: str, sample: PromptSample, error: Exception, num_responses: int = 1) -> None:
        """Count bad rewards, or end the run."""
        if self._on_bad_reward == "drop":
            self.num_dropped += num_responses
            return
        prompt = clipped(printable(sample.prompt)[-160:], 160)
        others = f" and {num_responses - 1} other responses" if num_responses > 1 else ""
        raise UserError(
            "DATA",
            f"rewards: {name} failed with {type(error).__name__} ({clipped(str(error), 200)}) for the prompt"
            f" ...{prompt!r}{others}",
            "correct the function or the row; on_bad_reward=drop leaves such responses out",
        ) from error
