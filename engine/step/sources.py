"""Batch sources: the examples of each batch, in order."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.data.examples import Example, fingerprint
from engine.step.layout import fed_tokens
from engine.step.mixing import MixedPrompts, Mixture
from engine.step.prompts import Prompts, shuffled


class Source(Protocol):
    """Where the batches of a run come from.

    Attributes:
        num_examples, num_updates: of the whole run.
        may_prefetch: a batch may be made before the previous step ends. True for stored examples, false for rollouts:
            they depend on the policy.
        fingerprint: a hash of all examples of the source. Checkpoints keep it, and a resumed run must match it.
    """

    may_prefetch: bool

    @property
    def num_examples(self) -> int: ...

    @property
    def num_updates(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def batches(self, start: int = 0) -> Iterator[list[Example]]:
        """The batches of the run after its first start examples."""
        ...

    def new_batches(self) -> Iterator[list[Example]]:
        """The batches of the run with an example that no batch before them has."""
        ...

    def take_metrics(self, log_samples: Callable[..., None]) -> dict[str, float]:
        """Metrics of the responses sampled since the last call.

        Args:
            log_samples: takes rows, and is_shown.
        """
        ...

    def epochs(self, num_examples: int) -> dict[str, float]:
        """Metrics of how often each data set has been seen after num_examples; empty if it is not counted."""
        ...

    def resample(self, num_examples: int) -> None:
        """Sample responses with batches left again, as the policy has gone back. All ranks call this together."""
        ...

    def ends_iteration(self, num_examples: int) -> bool:
        """Whether the batch that makes it num_examples is the last of sampled responses."""
        ...

    def state(self, num_examples: int) -> Callable[[Path], None] | None:
        """A function: writes what a checkpoint after num_examples must keep, into a directory. None for nothing."""
        ...

    def restore(self, checkpoint: Path) -> None:
        """Read what state() has written, if anything."""
        ...


class FixedSource:
    """The part that sources share whose batches do not depend on the policy, but follow from the data and the seed.

    Args:
        data: all examples of an epoch.
        n_epochs, n_examples: the run ends at the first limit reached; one of them may be None.
    """

    may_prefetch = True

    def __init__(self, data: Sequence[Example], batch_size: int, n_epochs: int | None, n_examples: int | None):
        self.num_examples = num_planned(len(data), n_epochs, n_examples)
        self.num_updates = math.ceil(self.num_examples / batch_size)
        self._batch_size = batch_size

    def take_metrics(self, log_samples: Callable[..., None]) -> dict[str, float]:
        return {}

    def resample(self, num_examples: int) -> None:
        """Nothing: no example depends on the policy."""

    def ends_iteration(self, num_examples: int) -> bool:
        return False

    def state(self, num_examples: int) -> Callable[[Path], None] | None:
        return None

    def restore(self, checkpoint: Path) -> None:
        """Nothing: the order follows from the seed and the number of examples."""


class StoredExamples(FixedSource):
    """Stored examples in a seeded order. Equal arguments give equal batches.

    Args:
        n_epochs, n_examples: the run ends at the first limit reached; one of them may be None.
        length_grouping, mixture: see plan_batches.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        n_epochs: int | None,
        n_examples: int | None,
        length_grouping: bool = False,
        mixture: Mixture | None = None,
    ):
        super().__init__(examples, batch_size, n_epochs, n_examples)
        self.examples, self._seed = examples, seed
        self._n_epochs, self._n_examples = n_epochs, n_examples
        self._length_grouping, self._mixture = length_grouping, mixture

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.examples)

    def batches(self, start: int = 0) -> Iterator[list[Example]]:
        for batch in self._plan(start):
            yield [self.examples[index] for index in batch]

    def new_batches(self) -> Iterator[list[Example]]:
        is_new, num_new = np.ones(len(self.examples), bool), len(self.examples)
        for batch in self._plan():
            if num_new == 0:  # the rest of the plan may be long
                return
            found = {index for index in batch if is_new[index]}
            is_new[[*found]] = False
            num_new -= len(found)
            if found:
                yield [self.examples[index] for index in batch]

    def epochs(self, num_examples: int) -> dict[str, float]:
        return {}

    def _plan(self, start: int = 0) -> Iterator[list[int]]:
        return plan_batches(
            self.examples,
            self._batch_size,
            seed=self._seed,
            n_epochs=self._n_epochs,
            n_examples=self._n_examples,
            length_grouping=self._length_grouping,
            mixture=self._mixture,
            start=start,
        )


def choose_eval_examples(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The first count examples of a shuffled test split, at most."""
    plan = plan_batches(examples, max(1, len(examples)), seed=seed, n_epochs=1, n_examples=None)
    return [examples[index] for indices in plan for index in indices][:count]


def plan_batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    seed: int,
    n_epochs: int | None,
    n_examples: int | None,
    length_grouping: bool = False,
    mixture: Mixture | None = None,
    start: int = 0,
) -> Iterator[list[int]]:
    """Plan the example indices of each batch. Equal arguments give equal batches.

    - Each epoch shuffles the prompts anew. The examples of one prompt stay together.
    - Batches run on across epochs.
    - The plan ends after n_epochs or n_examples, whichever comes first. The last batch may be short.

    Args:
        length_grouping: put prompts of similar lengths into the same batch, the batches in random order. A prompt
            split at the end of a batch may continue in any other.
        mixture: the data sets in each epoch; None to have each example once.
        start: examples of the plan to leave out. Epochs before it cost nothing.
    """
    num_examples = num_planned(len(examples), n_epochs, n_examples)
    if num_examples <= start:
        return
    data = Prompts.of(examples)
    mixed = MixedPrompts(mixture, data, seed) if mixture else None
    lengths = fed_tokens(examples) if length_grouping else None
    begun = np.empty(0, np.int64)  # of a batch that goes on in the next epoch
    for number in count(start // len(examples)):
        first, end = number * len(examples), min((number + 1) * len(examples), num_examples)
        prompts, rng = _epoch(data, mixed, seed, number)
        order = prompts.indices()
        if lengths is not None:
            order = _grouped_by_length(prompts, lengths, batch_size, first % batch_size, rng)
        order = np.concatenate([begun, order[max(start - first, 0) : end - first]])
        num_whole = len(order) if end == num_examples else len(order) // batch_size * batch_size
        for place in range(0, num_whole, batch_size):
            yield order[place : place + batch_size].tolist()
        begun = order[num_whole:]
        if end == num_examples:
            return


def _epoch(prompts: Prompts, mixture: MixedPrompts | None, seed: int, number: int) -> tuple[Prompts, random.Random]:
    """All prompts in the order of an epoch, and its random numbers. No epoch needs the one before."""
    if mixture is not None:
        prompts = mixture.epoch(number)
    rng = random.Random(f"{seed}/{number}")
    return prompts.in_order(shuffled(len(prompts), rng)), rng


# Batches sorted by length together. More of them make lengths more alike, and the order less random.
GROUPED_BATCHES = 50


def _grouped_by_length(
    prompts: Prompts, lengths: np.ndarray, batch_size: int, num_begun: int, rng: random.Random
) -> np.ndarray:
    """Order the examples of prompts so that batches hold similar lengths.

    Args:
        lengths: of all examples.
        num_begun: examples in the first batch already, from the epoch before.
    """
    num_first = 0  # prompts that complete the batch already begun
    if num_begun:
        num_missing = batch_size - num_begun
        num_first = min(int(np.searchsorted(np.cumsum(prompts.counts), num_missing)) + 1, len(prompts.counts))
    remaining = prompts.in_order(slice(num_first, None))
    order = remaining.indices()
    if len(order):
        longest = np.maximum.reduceat(lengths[order], np.cumsum(remaining.counts) - remaining.counts)
        window = GROUPED_BATCHES * batch_size
        starts = range(0, len(longest), window)
        sorted_windows = [start + np.argsort(longest[start : start + window], kind="stable") for start in starts]
        order = remaining.in_order(np.concatenate(sorted_windows)).indices()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    short = [batches.pop()] if len(order) % batch_size else []  # last, as it would shift all batches after it
    rng.shuffle(batches)
    return np.concatenate([prompts.in_order(slice(num_first)).indices(), *batches, *short])


def num_planned(num_examples: int, n_epochs: int | None, n_examples: int | None) -> int:
    """The number of examples of a run.

    One of n_epochs and n_examples may be None.
    """
    limits = [n_examples] if n_examples is not None else []
    if n_epochs is not None:
        limits.append(n_epochs * num_examples)
    return min(limits)
