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


def rows_of(preferences) -> dict[str, list[tuple[Any, float]]]:
    """By prompt: the answer and the weight of each row."""
    return {
        prompt: [(columns.get("answer"), weight) for columns, weight in preference["rows"].values()]
        for prompt, preference in preferences.items()
    }


ASSISTANT = {"role": "assistant", "content": "R"}
FIRST, SECOND = "\n\nHuman: one\n\nAssistant:", "\n\nHuman: one\n\nAssistant: R\n\nHuman: two\n\nAssistant:"


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("dialogue", "prompt"),
    [
        ([user("one")], FIRST),
        ([user("one"), ASSISTANT], FIRST),
        ([user("one"), ASSISTANT, user("two")], SECOND),
        ([user("one"), ASSISTANT, user("two"), ASSISTANT], SECOND),
    ],
)
def test_the_columns_of_a_dialogue_are_of_its_last_question(tmp_path, tokenizer, column, dialogue, prompt):
    rows = [{column: dialogue, "answer": "of the last"}]
    preferences = load_rows(tmp_path, rows, tokenizer, batch="rollout", chat_template="hh", sft_turns="all")
    assert rows_of(preferences) == {prompt: [("of the last", 1.0)]}
    assert not preferences[prompt]["pairs"]


def test_dialogues_with_and_without_a_last_response_share_a_file(tmp_path, tokenizer):
    counts = RowCounts()
    rows = [{"messages": [user(f"q{i}")] + [ASSISTANT] * (i % 2), "answer": str(i)} for i in range(4)]
    preferences = load_rows(tmp_path, rows, tokenizer, batch="rollout", chat_template="hh", counts=counts)
    assert [answer for each in rows_of(preferences).values() for answer, _ in each] == ["0", "1", "2", "3"]
    assert not counts.dropped


def test_equal_prompts_with_other_columns_count_each(tmp_path, tokenizer):
    rows = [
        {"prompt": "Solve it:", "answer": "1"},
        {"prompt": "Solve it:", "answer": "2", "weight": 3},
        {"prompt": "Solve it:", "answer": "1"},
        {"prompt": "Another:", "answer": "1"},
    ]
    split = prompts_of(tmp_path, tokenizer, rows)
    found = [(example.row.text, example.row.columns["answer"], example.weight) for example in split.examples]
    assert found == [("Solve it:", "1", 1.0), ("Solve it:", "2", 3.0), ("Another:", "1", 1.0)]
    assert [example.prompt_index for example in split.examples] == [0, 0, 1]
    assert split.counts["rows"] == 4 and split.counts["prompts"] == 3


def test_stored_responses_make_no_further_prompts(tmp_path, tokenizer):
    rows = [{"prompt": "p", "chosen": f"good {i}", "rejected": "bad", "answer": "1"} for i in range(3)]
    assert len(prompts_of(tmp_path, tokenizer, rows).examples) == 1


def test_the_form_of_prompts_is_among_the_known_ones(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"nearest is prompts, without prompt; fix: .*prompts \(prompt\)"):
        load_rows(tmp_path, [{"promt": "x", "answer": "1"}], tokenizer, batch="rollout")


def test_a_template_that_leaves_out_the_tools_of_a_prompt_is_refused(tmp_path, tokenizer):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    rows = [{"messages": [user("one")], "tools": tools}]
    with pytest.raises(UserError, match="the chat template leaves out the tool"):
        load_rows(tmp_path, rows, tokenizer, batch="rollout", chat_template="chatml")


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
