"""The counts of a split that a run prints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.example_table import labels_of, of_all_turns, prompt_indices
from engine.data.rankings import count_ties
from engine.data.rows import RowCounts

if TYPE_CHECKING:
    from engine.data.examples import Example


def count_split(
    examples: "Sequence[Example]",
    kind: str,
    counts: RowCounts,
    truncation: Mapping[str, int],
    repeats: tuple[int, int],
    eos_token_id: int,
) -> dict[str, Any]:
    """Split.counts.

    Args:
        kind: the name of the examples.
        truncation: truncated examples, and max_length.
        repeats: duplicates and contradictions, beside those inside of rankings.
    """
    indices = of_all_turns("prompt_index", examples, prompt_indices(examples))
    found: dict[str, Any] = {
        "rows": counts.rows,
        "prompts": len(np.unique(indices)),
        kind: len(indices),
        "dropped": dict(counts.dropped),
    }
    if len(indices) > len(examples):
        found["joined"] = len(examples)
    if kind == "examples":
        found["desirable"] = labels_of(examples).count(True)
    rankings: list[Example] = [] if kind != "rankings" else [*examples]
    return found | dict(truncation) | _optional_counts(rankings, counts, repeats, eos_token_id)


def _optional_counts(
    rankings: "Sequence[Example]", counts: RowCounts, repeats: tuple[int, int], eos_token_id: int
) -> dict[str, Any]:
    """The parts of Split.counts that are only there if above 0, or if there is one."""
    ranked = [(example, example.comparisons) for example in rankings if example.comparisons is not None]
    inside = [comparisons.count_repeats() for _, comparisons in ranked]
    optional = {
        "duplicates": repeats[0] + sum(duplicates for duplicates, _ in inside),
        "contradictions": repeats[1] + sum(contradictions for _, contradictions in inside),
        "compared_pairs": sum(len(comparisons.pairs) for _, comparisons in ranked),
        "ties": sum(count_ties(comparisons) for _, comparisons in ranked),
        "truncated_responses": sum(
            int(response[-1]) != eos_token_id for example, _ in ranked for response in example.responses
        ),
        "first_bad_row": counts.first_bad_row,
    }
    return {name: value for name, value in optional.items() if value}
