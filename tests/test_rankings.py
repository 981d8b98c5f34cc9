"""Preferences become rankings: one example per prompt, with all its pairs."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.preferences import Preferences, add_preference, pairs_by_score
from engine.data.rankings import (
    Comparisons,
    Reasons,
    compare_by_rank,
    count_ties,
    find_order,
    join_equal,
    read_comparisons,
)
from tests.configs import make_settings

Row = tuple[list[str], list[tuple[int, int]]]


def compared(
    rows: Sequence[Row], margins: Sequence[float | None] = (), weights: Sequence[float] = ()
) -> tuple[list[str], Comparisons, Counter[str]]:
    """The different responses of rows of one prompt, their comparisons, and dropped pairs."""
    preferences: Preferences = {}
    for index, (responses, pairs) in enumerate(rows):
        margin, weight = (margins or [None] * len(rows))[index], (weights or [1.0] * len(rows))[index]
        add_preference(preferences, "p", responses, pairs, None, weight, margin)
    texts, dropped = preferences["p"]["responses"], Counter[str]()
    is_empty = [not text for text in texts]
    comparisons = read_comparisons(preferences["p"])
    kept, comparisons = join_equal(texts, is_empty, comparisons, dropped, Reasons("empty", "equal"))
    return [texts[index] for index in kept], comparisons, dropped


def named(texts: Sequence[str], comparisons: Comparisons) -> list[str]:
    return [f"{texts[better]} > {texts[worse]}" for better, worse in comparisons.pairs]


def ranks(comparisons: Comparisons) -> list[int] | None:
    order = find_order(comparisons)
    return None if order is None else order.tolist()


def row(*best_first: str) -> Row:
    return list(best_first), pairs_by_score([-index for index in range(len(best_first))])


def test_a_row_is_an_order_of_its_responses() -> None:
    texts, comparisons, _ = compared([(["a", "b", "c", "d"], pairs_by_score([2, 7, 1, 5]))])
    assert texts == ["a", "b", "c", "d"] and ranks(comparisons) == [2, 0, 3, 1]
    assert sorted(named(texts, comparisons)) == ["a > c", "b > a", "b > c", "b > d", "d > a", "d > c"]
    assert comparisons.margins.tolist() == [0] * 6 and comparisons.weights.tolist() == [1] * 6


def test_equal_scores_are_ties() -> None:
    comparisons = compared([(["a", "b", "c", "d"], pairs_by_score([1, 3, 1, 0]))])[1]
    assert ranks(comparisons) == [1, 0, 1, 2] and count_ties(comparisons) == 2
    assert compared([(["a", "b"], pairs_by_score([1, 1]))])[0] == []
    # A response with ties alone is in no pair.
    assert ranks(compare_by_rank((0, 0, 2))) == [0, 0, 1] and count_ties(compare_by_rank((0, 0, 2))) == 2


def test_rows_of_a_prompt_are_one_ranking_with_all_their_pairs() -> None:
    rows = [row("a", "b"), row("c", "d"), row("b", "e")]
    texts, comparisons, _ = compared(rows)
    assert texts == ["a", "b", "c", "d", "e"] and named(texts, comparisons) == ["a > b", "c > d", "b > e"]
    assert ranks(comparisons) is None and count_ties(comparisons) == 0
    assert ranks(compared([row("a", "b"), row("b", "c"), row("a", "c")])[1]) == [0, 1, 2]
    assert ranks(compared([row("a", "b"), row("b", "c")])[1]) is None
    # b and c were never compared: they are no tie.
    assert ranks(compared([row("a", "b"), row("a", "c")])[1]) is None
    assert ranks(compared([(["a", "b", "c"], [(0, 1), (0, 2)])])[1]) == [0, 1, 1]


def test_repeats_and_opposites_stay_pairs() -> None:
    texts, comparisons, _ = compared([row("a", "b"), row("a", "b"), row("b", "a"), row("b", "c")])
    assert named(texts, comparisons) == ["a > b", "a > b", "b > a", "b > c"]
    assert comparisons.count_repeats() == (1, 1) and ranks(comparisons) is None
    cycle = compared([row("a", "b"), row("b", "c"), row("c", "a")])[1]
    assert cycle.count_repeats() == (0, 0) and ranks(cycle) is None
    repeated = compared([row("a", "b"), row("a", "b")])[1]
    assert repeated.count_repeats() == (1, 0) and ranks(repeated) == [0, 1]
    # With two margins, no order has both.
    assert ranks(compared([row("a", "b")] * 2, [0.5, 1.0])[1]) is None


def test_a_response_may_be_repeated_in_its_row() -> None:
    texts, comparisons, dropped = compared([row("a", "b", "a")])
    assert (texts, named(texts, comparisons)) == (["a", "b"], ["a > b", "b > a"]) and dropped == {"equal": 1}
    texts, comparisons, dropped = compared([(["a", "b", "a"], pairs_by_score([3, 1, 3]))])
    assert (texts, named(texts, comparisons)) == (["a", "b"], ["a > b", "a > b"]) and not dropped
    assert compared([row("a", "a")])[0] == []
    texts, comparisons, dropped = compared([row("a", "", "b")])
    assert (texts, named(texts, comparisons)) == (["a", "b"], ["a > b"]) and dropped == {"empty": 2}


def test_margins_and_weights_are_those_of_rows() -> None:
    _, comparisons, _ = compared([row("a", "b", "c"), row("c", "d")], [0.5, None], [1.0, 3.0])
    assert comparisons.margins.tolist() == [0.5, 0.5, 0.5, 0]
    assert comparisons.weights.tolist() == [1, 1, 1, 3]


def test_long_rankings_are_quick() -> None:
    """200 prompts of 64 responses have 403,200 pairs. Work in Python on each would take several seconds."""
    texts, scores = [f"r{index}" for index in range(64)], [float(index * 37 % 64) for index in range(64)]
    pairs_by_score(scores)
    start = time.process_time()
    for _ in range(200):
        _, comparisons, _ = compared([(texts, pairs_by_score(scores))])
        assert comparisons.count_repeats() == (0, 0) and find_order(comparisons) is not None
    assert time.process_time() - start < 2
    assert ranks(comparisons) == [63 - int(score) for score in scores]
    assert comparisons.pairs.dtype == np.uint8


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
    """(texts, ranks, margins) of each example."""
    return [
        (
            [tokenizer.decode(response[:-1]) for response in example.responses],
            ranks(example.comparisons),
            {*example.comparisons.margins.tolist()},
        )
        for example in split.examples
    ]


def test_rows_of_every_form_are_rankings(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "Is it good?"}]
    turns = [[*message, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    forms: list[dict[str, Any]] = [
        {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No.", "margin": 2},
        {"chosen": "\n\nHuman: Is it good?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Is it good?\n\nAssistant: No."},
        {"prompt": "Is it good?", "responses": [" Yes.", " No.", " The film."], "margin": 1.5},
        {"chosen": turns[0], "rejected": turns[1], "margin": 0.5},
    ]
    found = []
    for index, row in enumerate(forms):
        directory = tmp_path / str(index)
        directory.mkdir()
        split, tokenizer, line = load(directory, [row], "chat_template=hh")
        found += shown(split, tokenizer)
        assert f"1 rankings of {3 if index == 2 else 1} pairs" in line
    assert found == [
        ([" Yes.", " No."], [0, 1], {2.0}),
        ([" Yes.", " No."], [0, 1], {0.0}),
        ([" Yes.", " No.", " The film."], [0, 1, 2], {1.5}),
        ([" Yes.", " No."], [0, 1], {0.5}),
    ]


def test_ties_and_truncated_responses_are_counted(tmp_path: Path) -> None:
    long = " " + "The film was good. " * 40
    rows = [{"prompt": "Is it good?", "responses": [" Yes.", " No.", " A film.", long], "scores": [3, 1, 1, 0]}]
    split, tokenizer, line = load(tmp_path, rows, "max_length=64", "max_prompt_length=32")
    (example,) = split.examples
    assert ranks(example.comparisons) == [0, 1, 1, 2]
    assert [response[-1] == tokenizer.eos_token_id for response in example.responses] == [True, True, True, False]
    assert "tied with another response to their prompt: 2 responses" in line
    assert "truncated, so scored before their end: 1 responses" in line


def test_an_order_leaves_tied_responses_out(tmp_path: Path) -> None:
    texts = [" Yes.", " No.", " A film.", " It was."]
    rows = [
        {"prompt": "Is it good?", "responses": texts, "scores": [3, 1, 1, 0]},
        {"prompt": "Is it bad?", "responses": texts, "scores": [1, 0, 0, 0]},
    ]
    split, tokenizer, line = load(tmp_path, rows, "loss.ranking=plackett_luce")
    (example,) = split.examples
    assert [tokenizer.decode(response[:-1]) for response in example.responses] == [" Yes.", " It was."]
    assert ranks(example.comparisons) == [0, 1]
    assert "2 tied response" in line and "1 prompt without two untied responses (loss.ranking=pairs" in line


def test_useless_pairs_leave_a_ranking_of_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": "Is it good?", "responses": [" Yes.", " ", " No.", " A film."]}]
    split, tokenizer, _ = load(tmp_path, rows)
    assert shown(split, tokenizer) == [([" Yes.", " No.", " A film."], [0, 1, 2], {0.0})]
    assert split.counts["dropped"] == {"empty response": 3}


def test_responses_equal_as_tokens_are_one(tmp_path: Path) -> None:
    start = " " + "The film was good. " * 40
    rows: list[dict[str, Any]] = [
        {"prompt": "Is it good?", "responses": [" Yes.", start + "x", start + "y"]},
        {"prompt": "Is it bad?", "chosen": start + "x", "rejected": start + "y"},
    ]
    limits = ("max_length=64", "max_prompt_length=32")
    split, _, line = load(tmp_path, rows[:1], *limits)
    assert [(len(example.responses), ranks(example.comparisons)) for example in split.examples] == [(2, [0, 1])]
    assert "dropped: 1 chosen equal to rejected as tokens" in line
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(Exception, match="chosen equal to rejected as tokens"):
        load(other, rows[1:], *limits)


def test_pairs_of_a_prompt_are_one_example_and_counted(tmp_path: Path) -> None:
    prompt = "Is it good?"
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": " Yes.", "rejected": " No.", "weight": 2},
        {"prompt": prompt, "chosen": " Good.", "rejected": " Bad.", "margin": 0.5},
        {"prompt": prompt, "chosen": " No.", "rejected": " Yes."},
        {"prompt": prompt, "chosen": " Yes.", "rejected": " No."},
    ]
    split, tokenizer, line = load(tmp_path, rows)
    ((texts, order, margins),), (example,) = shown(split, tokenizer), split.examples
    assert texts == [" Yes.", " No.", " Good.", " Bad."] and order is None and margins == {0.0, 0.5}
    assert named(texts, example.comparisons) == [" Yes. >  No.", " Good. >  Bad.", " No. >  Yes.", " Yes. >  No."]
    assert example.weight == pytest.approx(5 / 4) and example.comparisons.weights.tolist() == [2, 1, 1, 1]
    assert "4 rows, 1 prompts, 1 rankings of 4 pairs" in line
    assert "kept, though they repeat a pair: 1 pairs" in line
    assert "kept, though each has its opposite (A over B and B over A): 1 pairs" in line


def test_a_prompt_without_a_pair_is_dropped_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Is it bad?", "responses": [" Yes.", " No."], "scores": [1, 1]},
        {"prompt": "Is it long?", "responses": [" Yes."]},
        {"prompt": "Is it good?", "responses": [" Yes.", " Yes."]},
        {"prompt": "Is it new?", "responses": [" Yes.", " No."]},
    ]
    split, tokenizer, line = load(tmp_path, rows)
    assert shown(split, tokenizer) == [([" Yes.", " No."], [0, 1], {0.0})]
    assert "1 prompts, 1 rankings of 1 pairs" in line
    assert "dropped: 2 prompt without a pair, 1 chosen equal to rejected" in line


def test_plackett_luce_drops_and_counts_prompts_without_an_order(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."},
        {"prompt": "Is it good?", "chosen": " Good.", "rejected": " Bad."},
        {"prompt": "Is it bad?", "chosen": " Yes.", "rejected": " No."},
    ]
    split, tokenizer, line = load(tmp_path, rows, "loss.ranking=plackett_luce")
    assert shown(split, tokenizer) == [([" Yes.", " No."], [0, 1], {0.0})]
    assert "dropped: 1 prompt without one order of its responses (loss.ranking=pairs learns its pairs)" in line
    assert len(load(tmp_path, rows)[0].examples) == 2
    with pytest.raises(Exception, match=r"no row of the train split .*loss.ranking=pairs learns its pairs"):
        load(tmp_path, rows[:2], "loss.ranking=plackett_luce")


def test_a_margin_must_be_a_number(tmp_path: Path) -> None:
    pair = {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."}
    with pytest.raises(Exception, match="field 'margin' is text, not a number"):
        load(tmp_path, [{**pair, "margin": "much"}])
    with pytest.raises(Exception, match=r"field 'margin' is 1e.39, beyond the range of fp32"):
        load(tmp_path, [{**pair, "margin": 1e39}])
    ranked = {"prompt": "Is it good?", "responses": [" Yes.", " No.", " Bad."], "margin": [1, 2]}
    with pytest.raises(Exception, match="field 'margin' is a list, not a number"):
        load(tmp_path, [ranked])
    split, *_ = load(
        tmp_path, [{**pair, "margin": "1.5"}, {**pair, "margin": None}, {**pair, "margin": ""}]
    )  # as in CSV
    assert split.examples[0].comparisons.margins.tolist() == [1.5, 0, 0]
