"""The prompts of a data set, each with its examples, as arrays of indices."""

import random
from array import array
from collections.abc import Sequence

import numpy as np

from engine.data.example_table import prompt_indices
from engine.data.examples import Example


class Prompts:
    """Prompts in an order, each with its examples.

    Args:
        starts, counts: of each prompt, int64 [prompts]: its part of members.
        members: indices of examples.
    """

    def __init__(self, starts: np.ndarray, counts: np.ndarray, members: np.ndarray):
        self.starts, self.counts, self.members = starts, counts, members

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Prompts":
        """In the order of their first examples."""
        _, first, inverse = np.unique(prompt_indices(examples), return_index=True, return_inverse=True)
        ranks = np.empty(len(first), np.int64)
        ranks[np.argsort(first)] = np.arange(len(first))
        ranks = ranks[inverse]
        counts = np.bincount(ranks, minlength=len(first))
        return cls(np.cumsum(counts) - counts, counts, np.argsort(ranks, kind="stable"))

    def __len__(self) -> int:
        return len(self.counts)

    def in_order(self, order: np.ndarray | slice) -> "Prompts":
        """The prompts of these numbers."""
        return Prompts(self.starts[order], self.counts[order], self.members)

    def indices(self) -> np.ndarray:
        """The examples of all prompts in turn."""
        ends = np.cumsum(self.counts)
        if not len(ends):
            return np.empty(0, np.int64)
        places = np.arange(ends[-1]) - np.repeat(ends - self.counts, self.counts)
        return self.members[np.repeat(self.starts, self.counts) + places]


def shuffled(number: int, rng: random.Random) -> np.ndarray:
    """The numbers below number in random order, int64."""
    order = array("q", range(number))
    rng.shuffle(order)
    return np.array(order)
