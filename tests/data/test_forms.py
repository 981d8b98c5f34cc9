"""Every form of row, and every way a row can be malformed."""

import pytest

from engine.data.forms import PROMPTS_DIFFER, detect_form
from engine.data.preferences import pairs_by_score
from engine.data.rows import Row, RowCounts
from tests.data.samples import CHAT, PAIR, assistant, load, load_rows, user
from utils import UserError


def test_strings(tmp_path, tokenizer):
    rows = [PAIR, {**PAIR, "chosen": "c"}, {**PAIR, "prompt": "q"}]
    assert load_rows(tmp_path, rows, tokenizer) == {
        "p": {"responses": ["a", "b", "c", "b"], "pairs": [(0, 1), (2, 3)], "sft_target": "c"},
        "q": {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"},
    }


def test_transcripts(tmp_path, tokenizer):
    start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:"
    rows = [{"chosen": start + " good", "rejected": start + " bad"}, {"chosen": start, "rejected": "\n\nAssistant: x"}]
    counts = RowCounts()
    preferences = load_rows(tmp_path, rows, tokenizer, counts=counts)
    assert preferences == {start: {"responses": [" good", " bad"], "pairs": [(0, 1)], "sft_target": " good"}}
    assert (counts.rows, counts.dropped) == (2, {PROMPTS_DIFFER: 1})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        {"conversations": [user("hi")], "chosen": assistant("a"), "rejected": assistant("b"), "system": ""},
        {"prompt": [user("hi")], "chosen": "a", "rejected": "b"},
        {"prompt": [user("hi")], "chosen": assistant("a"), "rejected": assistant("b")},
        {"prompt": "hi", "chosen": assistant("a"), "rejected": "b"},
        {"prompt": user("hi"), "chosen": [assistant("a")], "rejected": "b"},
        {
            "prompt": [user([{"type": "text", "text": "h"}, {"text": "i"}])],
            "chosen": assistant([{"text": "a"}]),
            "rejected": "b",
        },
    ],
)
def test_messages_and_sharegpt(tmp_path, tokenizer, row):
    expected = {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a", "from_template": True}
    prompt = "<s><|user|>user\nhi<eos>\n<|user|>assistant\n"
    assert load_rows(tmp_path, [row], tokenizer) == {prompt: expected}

    expected = {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a"}
    assert load_rows(tmp_path, [row], tokenizer, chat_template="hh") == {"\n\nHuman: hi\n\nAssistant:": expected}


@pytest.mark.parametrize("names", [("human", "gpt"), ("Human", "bot"), ("User", "Assistant"), ("USER", "model")])
@pytest.mark.parametrize(("column", "keys"), [("messages", ("role", "content")), ("conversations", ("from", "value"))])
def test_the_usual_names_of_roles_in_any_case(tmp_path, tokenizer, names, column, keys):
    turns = [dict(zip(keys, turn, strict=True)) for turn in zip(("System", *names), ("s", "hi", "a"), strict=True)]
    ((prompt, preference),) = load_rows(tmp_path, [{column: turns}], tokenizer).items()
    assert prompt == "<s><|user|>system\ns<eos>\n<|user|>user\nhi<eos>\n<|user|>assistant\n"
    assert preference["sft_target"] == "a"


def test_strings_through_the_chat_template(tmp_path, tokenizer):
    ((prompt, preference),) = load_rows(tmp_path, [PAIR], tokenizer, form="messages").items()
    assert (prompt, preference["responses"]) == ("<s><|user|>user\np<eos>\n<|user|>assistant\n", ["a", "b"])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("hi"), assistant("a")]},
        {"messages": [{"role": "system", "content": "s"}, user("hi"), assistant("a")]},
        {"prompt": [user("hi")], "completion": "a"},
        {"prompt": [user("hi")], "chosen": assistant("a"), "rejected": "b"},
        {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
    ],
)
def test_the_system_column_of_messages(tmp_path, tokenizer, row):
    ((prompt, preference),) = load_rows(tmp_path, [{**row, "system": "s"}], tokenizer).items()
    assert prompt == "<s><|user|>system\ns<eos>\n<|user|>user\nhi<eos>\n<|user|>assistant\n"
    assert preference["sft_target"] == "a"


def test_sharegpt_system_column(tmp_path, tokenizer):
    rows = [{"conversations": [user("hi")], "system": "Be kind.", "chosen": "a", "rejected": "b"}]
    assert list(load_rows(tmp_path, rows, tokenizer, chat_template="hh")) == ["Be kind.\n\nHuman: hi\n\nAssistant:"]


def test_messages_whose_prompts_differ_are_dropped(tmp_path, tokenizer):
    turns = [user("hi"), assistant("x"), user("so"), assistant("a")]
    rows = [{"chosen": turns, "rejected": [user("hi"), assistant("b")]}, {"chosen": turns, "rejected": turns}]
    counts = RowCounts()
    assert len(load_rows(tmp_path, rows, tokenizer, counts=counts)) == 1
    assert (counts.rows, counts.dropped) == (2, {PROMPTS_DIFFER: 1})


def test_ranked(tmp_path, tokenizer):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"]},
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2.5, 1]},
        {"prompt": "r", "responses": ["a"], "scores": [0]},
    ]
    assert load_rows(tmp_path, rows, tokenizer) == {
        "p": {"responses": ["a", "b", "c"], "pairs": [(0, 1), (0, 2), (1, 2)], "sft_target": "a"},
        "q": {"responses": ["a", "b", "c"], "pairs": [(1, 0), (1, 2)], "sft_target": "b"},
        "r": {"responses": ["a"], "pairs": [], "sft_target": "a"},
    }


def test_pairs_by_score_leave_out_ties():
    assert pairs_by_score([3, 3, 5]) == [(2, 0), (2, 1)]


def test_format_overrides_the_columns(tmp_path, tokenizer):
    text = "\n\nHuman: p\n\nAssistant:"
    rows = [{"prompt": text, "chosen": text + " a", "rejected": text + " b"}]
    assert detect_form(Row(rows[0], "")) == "strings"
    assert load_rows(tmp_path, rows, tokenizer, form="transcripts")[text]["responses"] == [" a", " b"]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2"),
        ({"instruction": "Add.", "input": "", "output": "3", "text": "Below is"}, "Add."),
        ({"instruction": "Add.", "output": "3"}, "Add."),
        ({"instruction": "Add.", "context": "1 2", "response": "3", "category": "math"}, "Add.\n\n1 2"),
        ({"instruction": "Add.", "context": None, "response": "3"}, "Add."),
        ({"messages": [user("Add."), assistant("3")]}, "Add."),
        ({"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]}, "Add."),
    ],
)
def test_instructions_and_dialogues(tmp_path, tokenizer, row, question):
    expected = {"responses": ["3"], "pairs": [], "sft_target": "3", "demonstrations": ["3"], "from_template": True}
    prompt = f"<s><|user|>user\n{question}<eos>\n<|user|>assistant\n"
    assert load_rows(tmp_path, [row], tokenizer) == {prompt: expected}
    expected = {"responses": [" 3"], "pairs": [], "sft_target": " 3", "demonstrations": [" 3"]}
    assert load_rows(tmp_path, [row], tokenizer, chat_template="hh") == {
        f"\n\nHuman: {question}\n\nAssistant:": expected
    }


def test_prompt_and_completion_of_text(tmp_path, tokenizer):
    expected = {"responses": ["c"], "pairs": [], "sft_target": "c", "demonstrations": ["c"]}
    assert load_rows(tmp_path, [{"prompt": "p", "completion": "c"}], tokenizer) == {"p": expected}
    with pytest.raises(UserError, match="rows of format=completion have one response and no preference"):
        load_rows(tmp_path, [{"prompt": "p", "completion": "c"}], tokenizer, batch="pairs")


def test_unpaired(tmp_path, tokenizer):
    rows = [
        {"prompt": "p", "completion": "a", "label": False},
        {"prompt": "p", "completion": "b", "label": True},
        {"prompt": "q", "completion": "c", "label": False},
    ]
    assert load_rows(tmp_path, rows, tokenizer, batch="unpaired") == {
        "p": {
            "responses": ["a", "b"], "pairs": [], "sft_target": "b",
            "labels": [(0, False), (1, True)], "demonstrations": ["b"],
        },
        "q": {"responses": ["c"], "pairs": [], "sft_target": None, "labels": [(0, False)]},
    }  # fmt: skip
    assert load_rows(tmp_path, rows, tokenizer, batch="sft") == load_rows(tmp_path, rows, tokenizer, batch="unpaired")
    with pytest.raises(UserError, match="rows of format=unpaired have one response with a label, and no pair"):
        load_rows(tmp_path, rows, tokenizer, batch="pairs")
    assert load_rows(tmp_path, rows[2:], tokenizer, form="completion")["q"]["sft_target"] == "c"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("hi", assistant("a")),
        ([user("hi")], "a"),
        (user("hi"), [assistant("a")]),
        (None, [user("hi"), assistant("a")]),
        ([user("hi")], [assistant("a")]),
    ],
)
def test_unpaired_messages(tmp_path, tokenizer, prompt, completion):
    row = {"completion": completion, "label": True} | ({} if prompt is None else {"prompt": prompt})
    expected = {"responses": ["a"], "pairs": [], "sft_target": "a", "from_template": True}
    expected |= {"labels": [(0, True)], "demonstrations": ["a"]}
    form = "messages" if prompt is None else None
    assert load_rows(tmp_path, [row], tokenizer, form=form, batch="unpaired") == {
        "<s><|user|>user\nhi<eos>\n<|user|>assistant\n": expected
    }


def test_unpaired_text_through_the_chat_template(tmp_path, tokenizer):
    row = {"prompt": "hi", "completion": "a", "label": True}
    ((prompt, preference),) = load_rows(tmp_path, [row], tokenizer, form="messages", batch="unpaired").items()
    assert (prompt, preference["labels"]) == ("<s><|user|>user\nhi<eos>\n<|user|>assistant\n", [(0, True)])


def test_the_label_of_several_messages_is_that_of_the_last(tmp_path, tokenizer):
    completion = [assistant("a"), user("more"), assistant("b")]
    row = {"prompt": [user("hi")], "completion": completion, "label": False}
    ((prompt, preference),) = load_rows(tmp_path, [row], tokenizer, chat_template="hh", batch="unpaired").items()
    assert prompt == "\n\nHuman: hi\n\nAssistant: a\n\nHuman: more\n\nAssistant:"
    assert (preference["responses"], preference["labels"]) == ([" b"], [(0, False)])


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "TRUE", "1", False, 0, 0.0, "false", "False", "0"])
def test_labels(tmp_path, tokenizer, label):
    row = {"prompt": "p", "completion": "a", "label": label}
    (preference,) = load_rows(tmp_path, [row], tokenizer, batch="unpaired").values()
    assert preference["labels"] == [(0, str(label).lower() in ("true", "1", "1.0"))]


@pytest.mark.parametrize("label", ["yes", "", None, 2, -1, 0.5, [], {}, [True], float("nan"), "x" * 1000])
def test_other_labels_are_refused(tmp_path, tokenizer, label):
    with pytest.raises(UserError, match=r"line 1: field 'label' is .*, not true or false") as caught:
        load_rows(tmp_path, [{"prompt": "p", "completion": "a", "label": label}], tokenizer, batch="unpaired")
    assert "fix: give true or false; format=completion leaves the label out" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "completion": 3}, "field 'completion' is a number, not text or messages"),
        ({"prompt": "p", "completion": [user("a")]}, "field 'completion' does not end with an assistant message"),
        ({"prompt": [assistant("p")], "completion": "a"}, "field 'prompt' ends with an assistant message"),
        ({"completion": [assistant("a")]}, "has no message before its last, and there is no field 'prompt'"),
        ({"prompt": "p"}, "field 'completion' is missing"),
    ],
)
def test_malformed_unpaired_rows(tmp_path, tokenizer, row, problem):
    form = "messages" if "prompt" not in row else "unpaired"
    with pytest.raises(UserError, match=problem):
        load_rows(tmp_path, [row | {"label": True}], tokenizer, form=form, batch="unpaired")


def test_a_labelled_csv(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\np,a,True\np,b,False\n")
    (preference,) = load(path, tokenizer, batch="unpaired").values()
    assert preference["labels"] == [(0, True), (1, False)]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("hi", assistant("a")),
        ("hi", [assistant("a")]),
        (user("hi"), "a"),
        ([user("hi")], "a"),
        ([user("hi")], [assistant("a")]),
    ],
)
def test_prompt_and_completion_of_messages(tmp_path, tokenizer, prompt, completion):
    rows = [{"prompt": prompt, "completion": completion}]
    ((text, preference),) = load_rows(tmp_path, rows, tokenizer, chat_template="hh").items()
    assert (text, preference["demonstrations"]) == ("\n\nHuman: hi\n\nAssistant:", [" a"])


def test_only_the_completion_is_learned(tmp_path, tokenizer):
    row = {"prompt": TURNS[:3], "completion": [assistant("b"), user("and?"), assistant("c")]}
    preferences = load_rows(tmp_path, [row], tokenizer, chat_template="hh")
    assert [preference["sft_target"] for preference in preferences.values()] == [" b", " c"]


ONE = "\n\nHuman: hi\n\nAssistant:"


TWO = f"{ONE} yes?\n\nHuman: so\n\nAssistant:"


TURNS = [user("hi"), assistant("yes?"), user("so"), assistant("a")]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("sft_turns", "learned", "num_open"), [("all", {ONE: [" yes?"], TWO: [" a"]}, 0), ("last", {TWO: [" a"]}, 1)]
)
def test_learned_responses_of_a_dialogue(tmp_path, tokenizer, column, sft_turns, learned, num_open):
    counts = RowCounts()
    open_ended = [*TURNS[:2], user("so what")]
    rows = [{column: TURNS}, {column: TURNS[1:2]}, {column: TURNS[:1]}, {column: [user("no"), *open_ended]}]
    preferences = load_rows(tmp_path, rows, tokenizer, chat_template="hh", sft_turns=sft_turns, counts=counts)
    if sft_turns == "all":
        learned = learned | {f"\n\nHuman: no{ONE}": [" yes?"]}
    assert {prompt: preference["responses"] for prompt, preference in preferences.items()} == learned
    assert counts.dropped == {
        "dialogue that does not end with an assistant message": 1 + num_open,
        "dialogue without a user message": 1,
    }
    assert counts.rows == 4  # each row once


def test_a_response_needs_a_user_message_before_it(tmp_path, tokenizer):
    """A greeting is not learned. Of two responses in a row the first is learned, as it alone follows a user message."""
    turns = [assistant("welcome"), *TURNS[:2], assistant("yes!"), user("so"), assistant("a")]
    preferences = load_rows(tmp_path, [{"messages": turns}], tokenizer, chat_template="hh")
    assert [preference["sft_target"] for preference in preferences.values()] == [" yes?", " a"]
    with pytest.raises(UserError, match="field 'messages' ends with an assistant message; the response"):
        load_rows(tmp_path, [{"messages": turns[:4]}], tokenizer, chat_template="hh")


def test_a_dialogue_too_long_for_memory_is_refused(tmp_path, tokenizer):
    """Prompts grow with the square of the length: each response has all messages before it."""
    rows = [{"conversations": [user("x" * 40_000), assistant("a")] * 30}]
    with pytest.raises(
        UserError, match="field 'conversations' has 30 responses, and their prompts have over 16,000,000"
    ) as error:
        load_rows(tmp_path, rows, tokenizer, chat_template="hh")
    assert "fix: divide the dialogue, or set sft_turns=last; on_bad_row=drop" in str(error.value)
    assert len(load_rows(tmp_path, rows, tokenizer, chat_template="hh", sft_turns="last")) == 1
    many = [{"conversations": [user("a"), assistant("b")] * 150_000}]  # refused at once
    with pytest.raises(UserError, match="has 150000 responses"):
        load_rows(tmp_path, many, tokenizer, chat_template="hh")


SHAREGPT = {"conversations": [user("hi")], "chosen": "a", "rejected": "b"}


RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("good", "change", "problem"),
    [
        (PAIR, {"chosen": 3}, "field 'chosen' is a number, not text"),
        (PAIR, {"chosen": None}, "field 'chosen' is null, not text"),
        (PAIR, {"rejected": ["b"]}, "field 'rejected' is a list, not text"),
        (PAIR, {"prompt": True}, "field 'prompt' is a boolean, not text"),
        (PAIR, {"prompt": "a\0b"}, "field 'prompt' contains a NUL byte"),
        (PAIR, {"prompt": "\ud800"}, "field 'prompt' contains invalid characters (half a surrogate pair)"),
        (CHAT, {"chosen": None}, "field 'chosen' is null, not text or messages"),
        (CHAT, {"chosen": []}, "field 'chosen' is an empty list"),
        (CHAT, {"chosen": ["a"]}, "field 'chosen[0]' is text, not an object"),
        (CHAT, {"chosen": [{"role": "assistant"}]}, "field 'chosen[0].content' is missing"),
        (CHAT, {"prompt": [user("hi"), {"role": "user", "content": 5}]}, "field 'prompt[1].content' is a number"),
        (CHAT, {"rejected": [user("b")]}, "field 'rejected' does not end with an assistant message"),
        (CHAT, {"prompt": [assistant("x")]}, "field 'prompt' ends with an assistant message; the response"),
        (
            CHAT,
            {"chosen": [user("ho"), assistant("a")]},
            "field 'chosen' has messages before its last that do not match",
        ),
        (SHAREGPT, {"conversations": [{"from": "x", "value": "hi"}]}, "field 'conversations[0].from' is 'x', not one"),
        (CHAT, {"prompt": [{"role": "usr", "content": "hi"}]}, "field 'prompt[0].role' is 'usr', not one of human, "),
        (
            CHAT,
            {"prompt": [user([{"type": "image"}])]},
            "field 'prompt[0].content[0]' is of the type 'image', and only",
        ),
        (CHAT, {"prompt": [user([])]}, "field 'prompt[0].content' is an empty list"),
        (CHAT, {"prompt": [user(["hi"])]}, "field 'prompt[0].content[0]' is text, not an object"),
        (CHAT, {"prompt": [user([{"type": "text"}])]}, "field 'prompt[0].content[0].text' is missing"),
        (SHAREGPT, {"chosen": user("a")}, "field 'chosen' is not an assistant message"),
        (SHAREGPT, {"rejected": 3}, "field 'rejected' is a number, not text or messages"),
        (SHAREGPT, {"rejected": [user("a"), assistant("b")]}, "field 'rejected' is not an assistant message"),
        (RANKED, {"responses": []}, "field 'responses' is an empty list"),
        (RANKED, {"responses": ["a", 2]}, "field 'responses[1]' is a number, not text"),
        (RANKED, {"scores": [1]}, "field 'scores' has 1 values for 2 responses"),
        (RANKED, {"scores": [1, "2"]}, "field 'scores[1]' is text, not a number"),
        (RANKED, {"scores": [1, float("nan")]}, "field 'scores[1]' is NaN"),
    ],
)
def test_malformed_rows_are_named(tmp_path, tokenizer, good, change, problem):
    with pytest.raises(UserError) as error:
        load_rows(tmp_path, [good, {**good, **change}], tokenizer)
    assert str(error.value).startswith(f"error[DATA] {tmp_path}/rows.jsonl line 2: {problem}")
    assert "; fix: " in str(error.value)


def test_missing_fields_and_columns_are_named(tmp_path, tokenizer):
    missing = {"prompt": "p", "chosen": "a"}
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: field 'rejected' is missing; fix: "):
        load_rows(tmp_path, [PAIR, missing], tokenizer)
    with pytest.raises(UserError, match=r"line 1: the columns prompt, chosen are of no known form; the nearest "):
        load_rows(tmp_path, [missing], tokenizer)
    with pytest.raises(UserError, match="line 1: field 'chosen' has no message before its last"):
        load_rows(tmp_path, [{"chosen": [assistant("a")], "rejected": [assistant("b")]}], tokenizer)
    with pytest.raises(UserError, match=r"line 1: field 'chosen' has no '\\n\\nAssistant:' turn"):
        load_rows(tmp_path, [{"chosen": "a", "rejected": "b"}], tokenizer)


@pytest.mark.parametrize(
    ("columns", "nearest"),
    [
        (["prompt", "chosen"], "strings, without rejected"),
        (["Prompt", "Chosen", "Rejected"], "strings, without prompt and chosen and rejected"),
        (["conversation"], "sharegpt, without conversations"),
        (["prompt", "response"], "ranked, without responses"),
        (["instructions", "output"], "alpaca, without instruction"),
        (["prompts", "choosen", "rejected"], "strings, without prompt and chosen"),
        (["choosen", "rejected", "source"], "transcripts, without chosen"),
        (["question", "answer"], None),
    ],
)
def test_the_nearest_form_of_unknown_columns(columns, nearest):
    with pytest.raises(UserError) as error:
        detect_form(Row(dict.fromkeys(columns, "x"), "f.jsonl line 1"))
    hint = f"; the nearest is {nearest}" if nearest else ""
    assert f"are of no known form{hint}; fix: rename them" in str(error.value)
    assert "strings (prompt, chosen, rejected), " in str(error.value) and "dolly (instruction, response)" in str(
        error.value
    )


def test_columns_near_no_form():
    with pytest.raises(UserError, match="the columns x, y are of no known form; fix: "):
        detect_form(Row({"x": 1, "y": 2}, ""))
