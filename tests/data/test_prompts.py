"""Prompts without responses, for online training."""

from typing import Any

import pytest

from engine.data.examples import PromptRow, fingerprint, tokenize
from engine.data.rows import RowCounts
from tests.data.samples import CHAT, PAIR, load_rows, user
from utils import UserError


def prompts_of(tmp_path, tokenizer, rows, **settings):
    counts = RowCounts()
    preferences = load_rows(tmp_path, rows, tokenizer, batch="rollout", counts=counts, **settings)
    return tokenize(
        [(preferences, "keep_end")],
        tokenizer,
        "rollout",
        counts,
        max_length=40,
        max_prompt_length=8,
        cache_dir=tmp_path / "cache",
    )


def test_prompts_keep_their_columns(tmp_path, tokenizer):
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}", "answer": str(i), "weight": 0.5} for i in range(3)]
    split = prompts_of(tmp_path, tokenizer, rows)
    assert [example.responses for example in split.examples] == [()] * 3
    assert [example.row for example in split.examples] == [PromptRow(row["prompt"], row) for row in rows]
    assert [example.weight for example in split.examples] == [0.5] * 3
    assert split.counts["prompts"] == 3
    others = prompts_of(tmp_path, tokenizer, [{**row, "answer": "9"} for row in rows])
    assert fingerprint(others.examples) != fingerprint(split.examples)


def test_prompts_as_messages(tmp_path, tokenizer):
    for rows in ([{"prompt": [user("Hi")]}], [{"messages": [user("Hi")]}]):
        preferences = load_rows(tmp_path, rows, tokenizer, batch="rollout", form="prompts", chat_template="hh")
        assert list(preferences) == ["\n\nHuman: Hi\n\nAssistant:"]


def test_rows_of_pairs_give_prompts(tmp_path, tokenizer):
    split = prompts_of(tmp_path, tokenizer, [{**PAIR, "prompt": "p"}, {**PAIR, "prompt": "p"}, {**PAIR, "prompt": "q"}])
    assert [example.row.text for example in split.examples] == ["p", "q"]


def test_a_long_prompt_is_truncated(tmp_path, tokenizer):
    (example,) = prompts_of(tmp_path, tokenizer, [{"prompt": "0123456789"}]).examples
    assert len(example.prompt) == 8
    assert example.row.text == "0123456789"


def test_other_losses_need_responses(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"rows of format=prompts have no responses; fix: .*loss=grpo"):
        load_rows(tmp_path, [{"prompt": "p"}], tokenizer, form="prompts")
    with pytest.raises(UserError, match="are of no known form"):
        load_rows(tmp_path, [{"prompt": "p"}], tokenizer)


def test_a_prompt_ends_with_the_user(tmp_path, tokenizer):
    with pytest.raises(UserError, match="ends with an assistant message"):
        load_rows(
            tmp_path,
            [{"messages": CHAT["prompt"] + CHAT["chosen"]}],
            tokenizer,
            form="prompts",
            batch="rollout",
            chat_template="hh",
        )
