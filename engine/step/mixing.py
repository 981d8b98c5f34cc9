"""Mix data sets by shares: how many examples of each an epoch has, and which."""

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.data.examples import Split
from engine.settings.schema import Settings
from utils import UserError

Prompt = list[int]  # indices of its examples


@dataclass(frozen=True)
class Mixture:
    """The data sets in an epoch. It has as many examples as the data.

    Args:
        sizes: number of examples of each data set; they follow one another.
        counts: number of examples of each in an epoch.
    """

    sizes: Sequence[int]
    counts: Sequence[int]

    def epochs(self, prompts: Sequence[Prompt], seed: int) -> Iterator[list[Prompt]]:
        """The prompts of each epoch, by data set. Endless; equal arguments give equal epochs.

        Each data set goes on where it stopped in the epoch before. So a small one repeats, and a large one is seen in
        part.
        """
        ends = list(accumulate(self.sizes))
        by_dataset: list[list[Prompt]] = [[] for _ in ends]
        for prompt in prompts:
            by_dataset[bisect_right(ends, prompt[0])].append(prompt)
        streams = [_Stream(part, f"{seed}/data set {number}") for number, part in enumerate(by_dataset)]
        while True:
            taken = [stream.take(count) for stream, count in zip(streams, self.counts, strict=True)]
            yield [prompt for part in taken for prompt in part]


class _Stream:
    """The prompts of a data set, in one seeded shuffle after another."""

    def __init__(self, prompts: Sequence[Prompt], seed: str):
        self._prompts, self._seed = prompts, seed
        self._num_passes = 0
        self._left: list[Prompt] = []

    def take(self, count: int) -> list[Prompt]:
        """The next count examples, by prompt. The last prompt continues in the next call, if it has more."""
        taken: list[Prompt] = []
        while count > 0:
            if not self._left:
                self._left = list(self._prompts)
                random.Random(f"{self._seed}/{self._num_passes}").shuffle(self._left)
                self._num_passes += 1
            prompt = self._left.pop()
            if len(prompt) > count:
                self._left.append(prompt[count:])
            taken.append(prompt[:count])
            count -= len(taken[-1])
        return taken


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
