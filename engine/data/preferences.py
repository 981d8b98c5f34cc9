"""Preferences: prompts with their responses, and the pairs among these."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NotRequired, TypedDict

SplitName = Literal["train", "test"]


class Preference(TypedDict):
    """The responses to one prompt, with the preferences among them."""

    responses: list[str]
    pairs: list[tuple[int, int]]  # (preferred, other): indices into responses
    sft_target: str | None  # None: all responses are labelled undesirable
    labels: NotRequired[list[tuple[int, bool]]]  # (index into responses, whether it is desirable)
    demonstrations: NotRequired[list[str]]  # further responses for SFT
    margins: NotRequired[dict[tuple[int, int], float]]  # of pairs: by how much the preferred one is better
    from_template: NotRequired[bool]  # written by a chat template, so its special tokens are encoded as such
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
    added = [(start + chosen, start + rejected) for chosen, rejected in pairs]
    preference["pairs"].extend(added)
    if margin is not None:
        preference.setdefault("margins", {}).update(dict.fromkeys(added, margin))
    if sft_target is not None:
        preference["sft_target"] = sft_target
    return preference


def pairs_by_score(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs of indices, the higher score first; equal scores make no pair."""
    return [
        (i, j) if scores[i] > scores[j] else (j, i)
        for i, j in combinations(range(len(scores)), 2)
        if scores[i] != scores[j]
    ]
