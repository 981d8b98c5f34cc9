"""Mix data sets by shares: how many examples of each an epoch has, and which."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.examples import Split
from engine.settings.schema import Settings
from engine.step.prompts import Prompts, shuffled
from utils import UserError


@dataclass(frozen=True)
class Mixture:
    """The data sets in an epoch. It has as many examples as the data.

    Args:
        sizes: number of examples of each data set; they follow one another.
        counts: number of examples of each in an epoch.
    """

    sizes: Sequence[int]
    counts: Sequence[int]


class MixedPrompts:
    """The prompts of a mixture in each epoch. Equal arguments give equal epochs.

    Each data set goes on where it stopped in the epoch before. So a small one repeats, and a large one is seen in part.

    Args:
        prompts: of all data sets.
    """

    def __init__(self, mixture: Mixture, prompts: Prompts, seed: int):
        self._prompts, self._counts = prompts, mixture.counts
        of_dataset = np.searchsorted(np.cumsum(mixture.sizes), prompts.members[prompts.starts], side="right")
        self._streams = [
            _Stream(prompts.in_order(np.flatnonzero(of_dataset == number)), f"{seed}/data set {number}")
            for number in range(len(mixture.sizes))
        ]

    def epoch(self, number: int) -> Prompts:
        """The prompts of an epoch, by data set."""
        parts = [
            part
            for stream, count in zip(self._streams, self._counts, strict=True)
            for part in stream.take(number * count, (number + 1) * count)
        ]
        starts, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Prompts(starts, counts, self._prompts.members)


class _Stream:
    """The prompts of a data set, in one seeded shuffle after another. Endless."""

    def __init__(self, prompts: Prompts, seed: str):
        self._prompts, self._seed = prompts, seed
        self._size = int(prompts.counts.sum())
        self._last: tuple[int, Prompts] | None = None  # a pass, and its prompts: the next epoch may need them again

    def take(self, first: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Starts and counts of the prompts that hold examples first to end. Those at the ends may be cut."""
        for number in range(first // self._size, math.ceil(end / self._size)):
            prompts = self._pass(number)
            before, after = first - number * self._size, end - number * self._size
            ends = np.cumsum(prompts.counts)
            lower = np.clip(ends - prompts.counts, before, after)
            counts = np.clip(ends, before, after) - lower
            is_taken = counts > 0
            starts = prompts.starts + lower - (ends - prompts.counts)
            yield starts[is_taken], counts[is_taken]

    def _pass(self, number: int) -> Prompts:
        if self._last is None or self._last[0] != number:
            order = shuffled(len(self._prompts), random.Random(f"{self._seed}/{number}"))
            self._last = number, self._prompts.in_order(order[::-1])
        return self._last[1]


def choose_mixture(settings: Settings, split: Split) -> Mixture | None:
    """The mixture of a training split, with a line about it; None without weights."""
    if settings.weights is None:
        return None
    mixture = make_mixture(settings.datasets, settings.weights, split.sizes)
    print(describe_mixture(settings.datasets, mixture), flush=True)
    return mixture


def make_mixture(names: Sequence[str], weights: Sequence[float], sizes: Sequence[int]) -> Mixture:
    """The mixture of data sets by weights, whose sum is arbitrary.

    Raises:
        UserError: if a data set has no examples, or gets none in an epoch.
    """
    empty = [name for name, size in zip(names, sizes, strict=True) if size == 0]
    if empty:
        problem = f"datasets: no train example of {', '.join(empty)} is left, and weights gives it a share"
        raise UserError("DATA", problem, "correct its rows, or leave it out")
    counts = apportion(sum(sizes), weights)
    for name, weight, count in zip(names, weights, counts, strict=True):
        if count == 0:
            problem = f"weights: {weight:g} gives {name} none of the {sum(sizes):,} examples of an epoch"
            raise UserError("CONFIG", problem, "raise it, or leave the data set out")
    return Mixture(sizes, counts)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a total by weights. Each part is rounded down; the largest remainders get one more."""
    exact = [total * (weight / sum(weights)) for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def describe_mixture(names: Sequence[str], mixture: Mixture) -> str:
    """A line with the share of each data set."""
    total = sum(mixture.counts)
    parts = [
        f"{name} {count / total:.1%} ({count:,} examples, {count / size:.2f} passes over its {size:,})"
        for name, count, size in zip(names, mixture.counts, mixture.sizes, strict=True)
    ]
    return f"mixture in an epoch: {', '.join(parts)}"
