"""Preferences: prompts with their responses, and the pairs among these."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any, Literal, NotRequired, TypedDict

SplitName = Literal["train", "test"]
Pair = tuple[int, int]  # (preferred, other): indices into responses
MAX_STORED = 64  # responses


class Preference(TypedDict):
    """The responses to one prompt, with the preferences among them."""

    responses: list[str]
    pairs: list[tuple[int, int]]  # (preferred, other): indices into responses
    sft_target: str | None  # None: all responses are labelled undesirable
    labels: NotRequired[list[tuple[int, bool]]]  # (index into responses, whether it is desirable)
    demonstrations: NotRequired[list[str]]  # further responses for SFT
    previous: NotRequired[dict[str, tuple[str, str]]]  # prompt and response of the turn before a demonstration
    margins: NotRequired[dict[tuple[int, int], float]]  # of pairs: by how much the preferred one is better
    from_template: NotRequired[bool]  # written by a chat template, so its special tokens are encoded as such
    rows: NotRequired[dict[str, tuple[Mapping[str, Any], float]]]  # for rewards: columns and weight, by what differs
    weights: NotRequired[list[float]]  # of the responses, those of their rows; 1 if absent


Preferences = dict[str, Preference]  # by prompt


def add_preference(
    preferences: Preferences,
    prompt: str,
    responses: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    sft_target: str | None,
    weight: float = 1.0,
    margin: float | None = None,
) -> Preference:
    """Add responses to a prompt, known or new.

    Args:
        preferences: changed in place.
        prompt: the prompt.
        responses: appended to the prompt's responses.
        pairs: (preferred, other), as indices into the responses given here.
        sft_target: replaces an earlier target; None keeps it.
        weight: of the row, for all responses given here.
        margin: of the pairs, for reward models.
    """
    preference = preferences.setdefault(prompt, {"responses": [], "pairs": [], "sft_target": sft_target})
    start = len(preference["responses"])
    if weight != 1 or "weights" in preference:
        preference.setdefault("weights", [1.0] * start).extend([weight] * len(responses))
    preference["responses"].extend(responses)
    added = [(start + chosen, start + rejected) for chosen, rejected in pairs] if start else pairs
    preference["pairs"].extend(added)
    if margin is not None:
        preference.setdefault("margins", {}).update(dict.fromkeys(added, margin))
    if sft_target is not None:
        preference["sft_target"] = sft_target
    return preference


def pairs_by_score(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs of indices, the higher score first; equal scores make no pair."""
    both_ways = _stored_pairs(len(scores)) if len(scores) <= MAX_STORED else _all_pairs(len(scores))
    return [
        pair if scores[pair[0]] > scores[pair[1]] else opposite
        for pair, opposite in both_ways
        if scores[pair[0]] != scores[pair[1]]
    ]


def _all_pairs(count: int) -> Iterator[tuple[Pair, Pair]]:
    """All pairs of indices below count, and their opposites."""
    return (((i, j), (j, i)) for i, j in combinations(range(count), 2))


@cache
def _stored_pairs(count: int) -> list[tuple[Pair, Pair]]:
    """The same. All rows share the tuples, as long rankings have many."""
    return [*_all_pairs(count)]
