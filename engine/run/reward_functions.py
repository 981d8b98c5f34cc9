"""The rewards of a run: functions of rewards.py, weighted, summed and clipped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from engine.data.examples import PromptRow
from engine.settings.schema import Settings
from rewards import REWARDS
from utils import UserError, clipped, printable


def build_rewards(settings: Settings) -> "RewardFunctions":
    """The reward functions of the settings; without any, those with the name of the only data set.

    Raises:
        UserError: CONFIG without any.
    """
    names = settings.rewards or [name for name in settings.datasets if settings.datasets == [name] and name in REWARDS]
    if not names:
        problem = f"rewards: null is the ground truth of the data set, and {','.join(settings.datasets)} has none"
        raise UserError("CONFIG", problem, f"name some of {', '.join(REWARDS)}, or add your own to rewards.py")
    return RewardFunctions(
        names,
        weights=settings.reward_weights,
        clip=settings.reward_clip,
        options=settings.reward_options or {},
        on_bad_reward=settings.on_bad_reward,
    )


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
    """Scores responses by the chosen functions.

    Args:
        names: keys of REWARDS.
        weights: of the sum; None for 1 each.
        clip: the largest absolute value of the sum; None for any.
        options: keyword arguments of the functions, by name.
        on_bad_reward: of a function that raises, or returns no finite number. "raise": end the run. "drop": leave the
            response out, as for None.

    Attributes:
        num_dropped: rewards dropped so far.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        clip: float | None = None,
        options: Mapping[str, Mapping[str, Any]],
        on_bad_reward: Literal["raise", "drop"],
    ):
        self.names = [*names]
        self._functions = {name: partial(REWARDS[name], **options.get(name, {})) for name in names}
        self._weights = [1.0] * len(names) if weights is None else [*weights]
        self._clip, self._on_bad_reward = clip, on_bad_reward
        self.num_dropped = 0

    def __call__(self, row: PromptRow, response: str) -> Score:
        """The reward of a response to the prompt of row."""
        parts = {name: self._reward(name, row, response) for name in self.names}
        values = [value for value in parts.values() if value is not None]
        if len(values) < len(parts):
            return Score(None, parts)
        total = sum(weight * value for weight, value in zip(self._weights, values, strict=True))
        if self._clip is not None:
            total = min(max(total, -self._clip), self._clip)
        return Score(total, parts)

    def _reward(self, name: str, row: PromptRow, response: str) -> float | None:
        try:
            value = self._functions[name](row.text, response, row.columns)
            if value is None:
                return None
            number = float(value)
            if not math.isfinite(number):
                raise ValueError(f"it returned {number}")
            return number
        except Exception as error:  # of a user's function: any
            if self._on_bad_reward == "drop":
                self.num_dropped += 1
                return None
            reason = f"the row has no column {error}" if isinstance(error, KeyError) else f"{error}"
            prompt = clipped(printable(row.text)[-160:], 160)
            raise UserError(
                "DATA",
                f"rewards: {name} failed with {type(error).__name__} ({clipped(reason, 200)}) for the prompt"
                f" ...{prompt!r}",
                "correct the function or the row; on_bad_reward=drop leaves such responses out",
            ) from error
