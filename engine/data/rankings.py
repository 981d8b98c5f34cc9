"""Rankings: the preferences of a prompt as ordered responses."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class ComparedPair(NamedTuple):
    """Two different responses to a prompt.

    Args:
        responses: (preferred, other).
        indices: of the responses, among those of all rows.
        weight: of the loss.
        margin: by which the scores should differ.
    """

    responses: tuple[str, str]
    indices: tuple[int, int]
    weight: float = 1.0
    margin: float = 0.0


class Ranking(NamedTuple):
    """Different responses to a prompt, best first.

    Args:
        ranks: of the responses, 0 for the best; equal ones are ties.
    """

    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    weight: float = 1.0
    margin: float = 0.0


def rankings_of(pairs: Sequence[ComparedPair]) -> Iterator[Ranking]:
    """The rankings of a prompt, in the order of their first pairs.

    Connected pairs are one ranking if they are all its pairs, each once, of one weight and without a margin. Other
    pairs are rankings of two. Responses of one row without a pair are ties. Of several rows they were never compared,
    and make no ranking.
    """
    for connected in _connected(pairs):
        compared = [pair.responses for pair in connected]
        wins = Counter(preferred for preferred, _ in compared)
        texts = sorted(dict.fromkeys(text for pair in compared for text in pair), key=lambda text: -wins[text])
        levels = sorted({wins[text] for text in texts}, reverse=True)
        expected = {(first, second) for first in texts for second in texts if wins[first] > wins[second]}
        is_whole = len(compared) == len(expected) and {*compared} == expected
        is_of_one_row = len({index for pair in connected for index in pair.indices}) == len(texts)
        is_uniform = len({pair.weight for pair in connected}) == 1 and not any(pair.margin for pair in connected)
        if is_whole and is_uniform and (is_of_one_row or len(levels) == len(texts)):
            ranks = tuple(levels.index(wins[text]) for text in texts)
            yield Ranking(tuple(texts), ranks, connected[0].weight)
        else:
            yield from (Ranking(pair.responses, (0, 1), pair.weight, pair.margin) for pair in connected)


def _connected(pairs: Sequence[ComparedPair]) -> list[list[ComparedPair]]:
    """Groups of pairs that share a text, or are connected by others."""
    parents: dict[str, str] = {}

    def root(text: str) -> str:
        parents.setdefault(text, text)
        while parents[text] != text:
            parents[text] = text = parents[parents[text]]
        return text

    for pair in pairs:
        preferred, other = pair.responses
        parents[root(other)] = root(preferred)
    groups: dict[str, list[ComparedPair]] = {}
    for pair in pairs:
        groups.setdefault(root(pair.responses[0]), []).append(pair)
    return list(groups.values())
