"""Rankings: the responses to a prompt, and the pairs compared among them."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from engine.data.preferences import Preference


class Comparisons(NamedTuple):
    """The compared pairs of a prompt's responses. A pair may be repeated, or have its opposite.

    Args:
        pairs: unsigned [pairs, 2], the better and the worse response as indices.
        margins: fp32 [pairs], by which the scores should differ.
        weights: fp32 [pairs], in the mean over the pairs.
        is_of_one_row: responses of one row without a pair are ties. Of several rows they were never compared.
    """

    pairs: np.ndarray
    margins: np.ndarray
    weights: np.ndarray
    is_of_one_row: bool = True

    @property
    def num_responses(self) -> int:
        """Every response is in a pair."""
        return int(self.pairs.max()) + 1

    def better_than(self) -> np.ndarray:
        """Whether response i is better than response j in a pair, bool [responses, responses]."""
        is_better = np.zeros((self.num_responses, self.num_responses), dtype=bool)
        is_better[self.pairs[:, 0], self.pairs[:, 1]] = True
        return is_better

    def count_repeats(self) -> tuple[int, int]:
        """Numbers of repeated pairs, and of those with their opposite."""
        if len(self.pairs) == 1:
            return 0, 0
        is_better = self.better_than()
        return len(self.pairs) - int(is_better.sum()), int((is_better & is_better.T).sum()) // 2


def compare_by_rank(ranks: Sequence[int], margin: float = 0.0) -> Comparisons:
    """All pairs of responses with unlike ranks, the lower is better."""
    order = np.array(ranks)
    pairs = np.argwhere(order[:, None] < order[None, :])
    return _comparisons(pairs, np.full(len(pairs), margin), np.ones(len(pairs)), is_of_one_row=True)


def read_comparisons(preference: Preference) -> Comparisons:
    """The pairs of a prompt, as indices into its responses."""
    pairs = np.fromiter(chain.from_iterable(preference["pairs"]), dtype=np.int64).reshape(-1, 2)
    margins, weights = np.zeros(len(pairs)), np.ones(len(pairs))
    if "margins" in preference:
        margins = np.array([preference["margins"].get(pair, 0.0) for pair in preference["pairs"]])
    if "weights" in preference:
        weights = np.array(preference["weights"])[pairs[:, 0]]
    return _comparisons(pairs, margins, weights, _are_of_one_row(pairs))


def _are_of_one_row(pairs: np.ndarray) -> bool:
    """Whether all pairs are of the same row. Rows have consecutive responses, and pairs connect those of a row."""
    firsts, lasts = pairs.min(axis=1), pairs.max(axis=1)
    order = firsts.argsort()
    reached = np.maximum.accumulate(lasts[order])
    return bool((firsts[order][1:] <= reached[:-1]).all())


def _comparisons(pairs: np.ndarray, margins: np.ndarray, weights: np.ndarray, is_of_one_row: bool) -> Comparisons:
    smallest = np.min_scalar_type(pairs.max(initial=0))  # long rankings have many pairs
    return Comparisons(pairs.astype(smallest), margins.astype(np.float32), weights.astype(np.float32), is_of_one_row)


class Reasons(NamedTuple):
    """Why pairs are dropped."""

    empty: str
    equal: str


def join_equal(
    keys: Sequence[Hashable],
    is_empty: Sequence[bool],
    comparisons: Comparisons,
    dropped: Counter[str],
    reasons: Reasons,
) -> tuple[list[int], Comparisons]:
    """Join equal responses, and drop pairs of equal or empty ones.

    Args:
        keys: of the responses; equal ones have equal keys.
        is_empty: whether a response is.
        dropped: gets the numbers of dropped pairs.

    Returns:
        indices of the responses that are in a pair, in their order, and their comparisons; both may be empty.
    """
    first: dict[Hashable, int] = {}
    numbers = np.array([first.setdefault(key, index) for index, key in enumerate(keys)])
    pairs = numbers[comparisons.pairs]
    is_of_empty = np.array(is_empty)[pairs].any(axis=1)
    is_equal = (pairs[:, 0] == pairs[:, 1]) & ~is_of_empty
    for reason, is_dropped in ((reasons.empty, is_of_empty), (reasons.equal, is_equal)):
        if is_dropped.any():
            dropped[reason] += int(is_dropped.sum())
    is_kept = ~(is_of_empty | is_equal)
    _, margins, weights, is_of_one_row = comparisons
    pairs, margins, weights = pairs[is_kept], margins[is_kept], weights[is_kept]
    is_compared = np.zeros(len(keys), dtype=bool)
    is_compared[pairs] = True
    renumbered = (np.cumsum(is_compared) - 1)[pairs]
    return np.flatnonzero(is_compared).tolist(), _comparisons(renumbered, margins, weights, is_of_one_row)


def find_order(comparisons: Comparisons) -> np.ndarray | None:
    """Ranks of the responses, 0 for the best, if the pairs are those of one order; else None.

    An order has a pair for any two responses of unlike ranks, and one margin for each. Equal ranks are ties, of one row
    alone.
    """
    pairs, margins, _, is_of_one_row = comparisons
    is_better = comparisons.better_than()
    num_better = is_better.sum(axis=0)
    levels, ranks = np.unique(num_better, return_inverse=True)
    margin_of = np.zeros(is_better.shape, dtype=margins.dtype)
    margin_of[pairs[:, 0], pairs[:, 1]] = margins
    is_order = (
        np.array_equal(is_better, num_better[:, None] < num_better[None, :])
        and (is_of_one_row or len(levels) == len(ranks))
        and np.array_equal(margin_of[pairs[:, 0], pairs[:, 1]], margins)
    )
    return ranks if is_order else None


def without_ties(comparisons: Comparisons, ranks: np.ndarray) -> tuple[list[int], Comparisons]:
    """Leave out the tied responses of an order.

    Args:
        ranks: of the responses.

    Returns:
        indices of the other responses, in their order, and their comparisons; without two of them, none.
    """
    is_kept = np.bincount(ranks)[ranks] == 1
    pairs, margins, weights, is_of_one_row = comparisons
    has_both = is_kept[pairs].all(axis=1)
    renumbered = (np.cumsum(is_kept) - 1)[pairs[has_both]]
    kept = np.flatnonzero(is_kept).tolist() if has_both.any() else []
    return kept, _comparisons(renumbered, margins[has_both], weights[has_both], is_of_one_row)


def count_ties(comparisons: Comparisons) -> int:
    """Number of responses with a tie, in an order."""
    if len(comparisons.pairs) == 1:
        return 0
    ranks = find_order(comparisons)
    if ranks is None:
        return 0
    sizes = np.bincount(ranks)
    return int(sizes[sizes > 1].sum())
