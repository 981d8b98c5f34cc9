"""The source of pretraining: windows of token streams, in an order that follows from the seed and their number."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from engine.data.examples import Example
from engine.data.windows import Windows, with_token_weights
from engine.step.mixing import apportion
from engine.step.sources import FixedSource

LONGEST_BLEND = 1_000_000  # windows after which a blend repeats


class TokenWindows(FixedSource):
    """Windows in a seeded order. Window n of the run is a function of the seed and n, for any number of ranks.

    Without weights an epoch has each window of all streams once. With weights the streams take turns, and each has
    epochs of its own.

    Args:
        weights: the share of each stream in the batches, of any sum; None for each window once an epoch.
        n_epochs, n_examples: the run ends at the first limit reached; one of them may be None.
        data_hash: of the streams.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        batch_size: int,
        seed: int,
        n_epochs: int | None,
        n_examples: int | None,
        weights: Sequence[float] | None = None,
        data_hash: str = "",
    ):
        super().__init__(windows, batch_size, n_epochs, n_examples)
        self._windows, self._seed = windows, seed
        self._blend = None if weights is None else Blend(weights)
        self.fingerprint = data_hash

    def index(self, number: int) -> int:
        """The index of window `number` of the run, counted from 0."""
        first, size, place, stream = 0, len(self._windows), number, "all"
        if self._blend is not None:
            chosen, place = self._blend.turn(number)
            first, size, stream = self._windows.first_of(chosen), self._windows.sizes[chosen], str(chosen)
        epoch, place = divmod(place, size)
        return first + permuted(place, size, f"{self._seed}/{stream}/{epoch}")

    def batches(self, start: int = 0) -> Iterator[list[Example]]:
        for first in range(start, self.num_examples, self._batch_size):
            numbers = range(first, min(first + self._batch_size, self.num_examples))
            yield with_token_weights([self._windows[self.index(number)] for number in numbers])

    def new_batches(self) -> Iterator[list[Example]]:
        return iter(())  # no reference reads them

    def epochs(self, num_examples: int) -> dict[str, float]:
        names = [stream.name for stream in self._windows.streams]
        if self._blend is None:
            return {f"epochs/{name}": num_examples / len(self._windows) for name in names}
        counts = self._blend.counts(num_examples)
        return {
            f"epochs/{name}": count / size for name, count, size in zip(names, counts, self._windows.sizes, strict=True)
        }


class Blend:
    """Turns of streams by weight: after n turns, each stream has had its share of n, but for less than one turn.

    The algorithm of Tijdeman 1980 (The chairman assignment problem): of the streams that are due, the one with the
    earliest deadline. The turns repeat once they come out even. Weights that never do so within LONGEST_BLEND turns are
    rounded to parts of it.
    """

    def __init__(self, weights: Sequence[float]):
        total = sum(Fraction(str(weight)) for weight in weights)
        shares = [Fraction(str(weight)) / total for weight in weights]
        self._length = math.lcm(*(share.denominator for share in shares))
        self._counts = [int(share * self._length) for share in shares]  # of each stream in all turns
        if self._length > LONGEST_BLEND:
            self._length, self._counts = LONGEST_BLEND, apportion(LONGEST_BLEND, weights)
        self._streams, self._ranks = self._plan()

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each turn, and how many turns it had before."""
        length, counts = self._length, self._counts
        had = [0] * len(counts)
        scale = 2 * max(1, len(counts) - 1)
        streams, ranks = np.zeros(length, np.int16), np.zeros(length, np.int64)
        for turn in range(length):
            due = [i for i, count in enumerate(counts) if scale * (count * (turn + 1) - had[i] * length) >= length]
            stream = min(due, key=lambda i: (scale * (had[i] + 1) - 1) / counts[i])
            streams[turn], ranks[turn] = stream, had[stream]
            had[stream] += 1
        return streams, ranks

    def turn(self, number: int) -> tuple[int, int]:
        """The stream of a turn, and how many turns it had before."""
        rounds, place = divmod(number, self._length)
        stream = int(self._streams[place])
        return stream, rounds * self._counts[stream] + int(self._ranks[place])

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` turns each stream had."""
        rounds, rest = divmod(number, self._length)
        begun = np.bincount(self._streams[:rest], minlength=len(self._counts))
        return [rounds * count + int(more) for count, more in zip(self._counts, begun, strict=True)]


def permuted(place: int, size: int, key: str) -> int:
    """Where a keyed permutation of range(size) puts `place`.

    A Feistel network over the next power of four, applied until the result is below size (cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=32).digest(), np.uint64).tolist()
    while True:
        left, right = place >> half, place & mask
        for each in keys:
            left, right = right, left ^ (_mixed(right ^ each) & mask)
        place = left << half | right
        if place < size:
            return place


def _mixed(value: int) -> int:
    """The finalizer of splitmix64: every bit of the value changes every bit of the result."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
