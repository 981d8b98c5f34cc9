"""Preferences become rankings: whole ones with ties, pairs otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.preferences import pairs_by_score
from engine.data.rankings import ComparedPair, Ranking, rankings_of
from tests.configs import make_settings

TEXTS = ["a", "b", "c", "d"]


def rankings(
    responses: list[str],
    pairs: list[tuple[int, int]],
    margins: dict[Any, float] | None = None,
    weights: dict[Any, float] | None = None,
) -> list[Ranking]:
    compared = [
        ComparedPair(
            (responses[i], responses[j]), (i, j), (weights or {}).get((i, j), 1.0), (margins or {}).get((i, j), 0.0)
        )
        for i, j in pairs
    ]
    return list(rankings_of(compared))


def test_a_whole_ranking_is_one_example_best_first() -> None:
    assert rankings(TEXTS, pairs_by_score([2, 7, 1, 5])) == [Ranking(("b", "d", "a", "c"), (0, 1, 2, 3))]


def test_equal_scores_are_ties() -> None:
    assert rankings(TEXTS, pairs_by_score([1, 3, 1, 0])) == [Ranking(("b", "a", "c", "d"), (0, 1, 1, 2))]
    assert rankings(TEXTS[:2], pairs_by_score([1, 1])) == []


def test_pairs_of_other_texts_are_rankings_of_two() -> None:
    two = [Ranking(("a", "b"), (0, 1)), Ranking(("c", "d"), (0, 1))]
    assert rankings(TEXTS, [(0, 1), (2, 3)]) == two


def test_pairs_of_several_rows_join_where_every_pair_was_compared() -> None:
    responses = ["a", "b", "b", "c", "a", "c"]
    assert rankings(responses, [(0, 1), (2, 3), (4, 5)]) == [Ranking(("a", "b", "c"), (0, 1, 2))]
    chain = [Ranking(("a", "b"), (0, 1)), Ranking(("b", "c"), (0, 1))]
    assert rankings(responses[:4], [(0, 1), (2, 3)]) == chain
    # b and c were never compared: they are no tie.
    apart = [Ranking(("a", "b"), (0, 1)), Ranking(("a", "c"), (0, 1))]
    assert rankings(["a", "b", "a", "c"], [(0, 1), (2, 3)]) == apart


def test_repeats_contradictions_and_margins_stay_pairs() -> None:
    repeated = [Ranking(("a", "b"), (0, 1))] * 2
    assert rankings(["a", "b", "a", "b"], [(0, 1), (2, 3)]) == repeated
    opposite = [Ranking(("a", "b"), (0, 1)), Ranking(("b", "a"), (0, 1))]
    assert rankings(["a", "b", "b", "a"], [(0, 1), (2, 3)]) == opposite
    with_margin = rankings(["a", "b", "b", "c", "a", "c"], [(0, 1), (2, 3), (4, 5)], {(2, 3): 0.5})
    assert with_margin == [
        Ranking(("a", "b"), (0, 1)),
        Ranking(("b", "c"), (0, 1), margin=0.5),
        Ranking(("a", "c"), (0, 1)),
    ]


def test_rows_of_one_weight_are_one_ranking() -> None:
    responses, pairs = ["a", "b", "b", "c", "a", "c"], [(0, 1), (2, 3), (4, 5)]
    assert rankings(responses, pairs, weights=dict.fromkeys(pairs, 2.0)) == [Ranking(("a", "b", "c"), (0, 1, 2), 2.0)]
    assert rankings(responses, pairs, weights={pairs[0]: 2.0}) == [
        Ranking(("a", "b"), (0, 1), 2.0),
        Ranking(("b", "c"), (0, 1)),
        Ranking(("a", "c"), (0, 1)),
    ]


# ---- From files ----


def load(tmp_path: Path, rows: list[dict[str, Any]], *overrides: str) -> tuple[Any, Any, str]:
    """The training split of rows, the tokenizer, and the printed counts."""
    from engine.models.tokenizers import load_tokenizer
    from preference_datasets import format_counts, load_split

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = make_settings(
        "loss=reward", f"datasets={path}", f"cache_dir={tmp_path / 'cache'}", "test_fraction=0", *overrides
    )
    tokenizer = load_tokenizer(settings.model)
    split = load_split(settings, tokenizer, "train", "ranked")
    return split, tokenizer, format_counts(split.counts)


def shown(split: Any, tokenizer: Any) -> list[Any]:
    """(texts, ranks, margin) of each example."""
    return [
        ([tokenizer.decode(response[:-1]) for response in example.responses], example.ranks, example.margin)
        for example in split.examples
    ]


def test_rows_of_every_form_are_rankings(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "Is it good?"}]
    turns = [[*message, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    forms: list[dict[str, Any]] = [
        {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No.", "margin": 2},
        {"chosen": "\n\nHuman: Is it good?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Is it good?\n\nAssistant: No."},
        {"prompt": "Is it good?", "responses": [" Yes.", " No.", " The film."]},
        {"chosen": turns[0], "rejected": turns[1], "margin": 0.5},
    ]
    found = []
    for index, row in enumerate(forms):
        directory = tmp_path / str(index)
        directory.mkdir()
        split, tokenizer, line = load(directory, [row], "chat_template=hh")
        found += shown(split, tokenizer)
        assert "1 rankings" in line
    assert found == [
        ([" Yes.", " No."], (0, 1), 2.0),
        ([" Yes.", " No."], (0, 1), 0.0),
        ([" Yes.", " No.", " The film."], (0, 1, 2), 0.0),
        ([" Yes.", " No."], (0, 1), 0.5),
    ]


def test_ties_and_truncated_responses_are_counted(tmp_path: Path) -> None:
    long = " " + "The film was good. " * 40
    rows = [{"prompt": "Is it good?", "responses": [" Yes.", " No.", " A film.", long], "scores": [3, 1, 1, 0]}]
    split, tokenizer, line = load(tmp_path, rows, "max_length=64", "max_prompt_length=32")
    (example,) = split.examples
    assert example.ranks == (0, 1, 1, 2)
    assert [response[-1] == tokenizer.eos_token_id for response in example.responses] == [True, True, True, False]
    assert "tied with another response to their prompt: 2 responses" in line
    assert "truncated, so scored before their end: 1 responses" in line


def test_useless_pairs_leave_a_ranking_of_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": "Is it good?", "responses": [" Yes.", " ", " No.", " A film."]}]
    split, tokenizer, _ = load(tmp_path, rows)
    assert shown(split, tokenizer) == [([" Yes.", " No.", " A film."], (0, 1, 2), 0.0)]
    assert split.counts["dropped"] == {"empty response": 3}


def test_responses_equal_as_tokens_are_one(tmp_path: Path) -> None:
    start = " " + "The film was good. " * 40
    rows: list[dict[str, Any]] = [
        {"prompt": "Is it good?", "responses": [" Yes.", start + "x", start + "y"]},
        {"prompt": "Is it bad?", "chosen": start + "x", "rejected": start + "y"},
    ]
    split, _, _ = load(tmp_path, rows[:1], "max_length=64", "max_prompt_length=32")
    assert [(len(example.responses), example.ranks) for example in split.examples] == [(2, (0, 1))]
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(Exception, match="chosen equal to rejected as tokens"):
        load(other, rows[1:], "max_length=64", "max_prompt_length=32")


def test_a_margin_must_be_a_number(tmp_path: Path) -> None:
    rows = [{"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No.", "margin": "much"}]
    with pytest.raises(Exception, match="field 'margin' is text, not a number"):
        load(tmp_path, rows)
