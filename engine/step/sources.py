"""Batch sources: the examples of each batch, in order."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from engine.data.examples import Example, fingerprint
from engine.step.layout import num_fed_tokens
from engine.step.mixing import Mixture


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


class StoredExamples:
    """Stored examples in a seeded order. Equal arguments give equal batches.

    Args:
        n_epochs, n_examples: the run ends at the first limit reached; one of them may be None.
        length_grouping, mixture: see plan_batches.
    """

    may_prefetch = True

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
        self.examples = examples
        self._batch_size, self._seed = batch_size, seed
        self._n_epochs, self._n_examples = n_epochs, n_examples
        self._length_grouping, self._mixture = length_grouping, mixture

    @property
    def num_examples(self) -> int:
        return num_planned(len(self.examples), self._n_epochs, self._n_examples)

    @property
    def num_updates(self) -> int:
        return math.ceil(self.num_examples / self._batch_size)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.examples)

    def batches(self, start: int = 0) -> Iterator[list[Example]]:
        indices = islice(chain.from_iterable(self._plan()), start, None)
        while batch := [self.examples[index] for index in islice(indices, self._batch_size)]:
            yield batch

    def new_batches(self) -> Iterator[list[Example]]:
        is_new, num_new = [True] * len(self.examples), len(self.examples)
        for batch in self._plan():
            if num_new == 0:  # the rest of the plan may be long
                return
            found = {index for index in batch if is_new[index]}
            for index in found:
                is_new[index] = False
            num_new -= len(found)
            if found:
                yield [self.examples[index] for index in batch]

    def take_metrics(self, log_samples: Callable[..., None]) -> dict[str, float]:
        return {}

    def resample(self, num_examples: int) -> None:
        """Nothing: stored responses do not depend on the policy."""

    def ends_iteration(self, num_examples: int) -> bool:
        return False

    def state(self, num_examples: int) -> Callable[[Path], None] | None:
        return None

    def restore(self, checkpoint: Path) -> None:
        """Nothing: the batches follow from the examples and the seed."""

    def _plan(self) -> Iterator[list[int]]:
        return plan_batches(
            self.examples,
            self._batch_size,
            seed=self._seed,
            n_epochs=self._n_epochs,
            n_examples=self._n_examples,
            length_grouping=self._length_grouping,
            mixture=self._mixture,
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
) -> Iterator[list[int]]:
    """Plan the example indices of each batch. Equal arguments give equal batches.

    - Each epoch shuffles the prompts anew. The examples of one prompt stay together.
    - Batches run on across epochs.
    - The plan ends after n_epochs or n_examples, whichever comes first. The last batch may be short.

    Args:
        length_grouping: put prompts of similar lengths into the same batch, the batches in random order. A prompt
            split at the end of a batch may continue in any other.
        mixture: the data sets in each epoch; None to have each example once.
    """
    by_prompt: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        by_prompt.setdefault(example.prompt_index, []).append(index)
    prompts = list(by_prompt.values())
    num_left = num_planned(len(examples), n_epochs, n_examples)
    mixed = mixture.epochs(prompts, seed) if mixture else None
    batch: list[int] = []
    epoch = 0
    while num_left > 0:
        rng = random.Random(f"{seed}/{epoch}")
        if mixed is not None:
            prompts = next(mixed)
        rng.shuffle(prompts)
        order = [index for prompt in prompts for index in prompt]
        if length_grouping:
            order = _grouped_by_length(prompts, examples, batch_size, len(batch), rng)
        epoch += 1
        for index in order:
            batch.append(index)
            num_left -= 1
            if len(batch) == batch_size or num_left == 0:
                yield batch
                batch = []
            if num_left == 0:
                break


# Batches sorted by length together. More of them make lengths more alike, and the order less random.
GROUPED_BATCHES = 50


def _grouped_by_length(
    prompts: Sequence[Sequence[int]], examples: Sequence[Example], batch_size: int, num_begun: int, rng: random.Random
) -> list[int]:
    """Order the examples of prompts so that batches hold similar lengths.

    Args:
        num_begun: examples in the first batch already, from the epoch before.
    """

    def longest(prompt: Sequence[int]) -> int:
        return max(num_fed_tokens(examples[index]) for index in prompt)

    remaining = list(prompts)
    first: list[int] = []  # completes the batch already begun
    while num_begun and remaining and len(first) < batch_size - num_begun:
        first += remaining.pop(0)
    window = GROUPED_BATCHES * batch_size
    starts = range(0, len(remaining), window)
    sorted_windows = (sorted(remaining[start : start + window], key=longest) for start in starts)
    order = [index for sorted_window in sorted_windows for prompt in sorted_window for index in prompt]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    short = batches.pop() if len(order) % batch_size else []  # last, as it would shift all batches after it
    rng.shuffle(batches)
    return [*first, *(index for batch in batches for index in batch), *short]


def num_planned(num_examples: int, n_epochs: int | None, n_examples: int | None) -> int:
    """The number of examples of a run.

    One of n_epochs and n_examples may be None.
    """
    limits = [n_examples] if n_examples is not None else []
    if n_epochs is not None:
        limits.append(n_epochs * num_examples)
    return min(limits)
