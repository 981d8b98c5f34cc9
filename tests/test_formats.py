"""Every form of the user's own files, every way that a row can be wrong, and the split of what has no test file."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.chat_templates import JINJA
from engine.formats import MARK, PROMPTS_DIFFER, Chat, Row, Tally, detect_form, load_file, pairs_by_score, read_rows
from tests.test_tokenization import byte_tokenizer
from utils import UserError

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' + m['role'] + '\\n' + m['content'].strip() + eos_token + '\\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(chat_template=CHATML)


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def load(path: Path, tokenizer, split="train", tally=None, test_fraction=0.0, **options):
    return load_file(path, split, tally or Tally(), tokenizer, test_fraction=test_fraction, **options)


def load_rows(tmp_path: Path, rows: list, tokenizer, **options):
    return load(write(tmp_path / "rows.jsonl", rows), tokenizer, **options)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}

# ---- Forms ----


def test_strings(tmp_path, tokenizer):
    rows = [PAIR, {**PAIR, "chosen": "c"}, {**PAIR, "prompt": "q"}]
    assert load_rows(tmp_path, rows, tokenizer) == {
        "p": {"responses": ["a", "b", "c", "b"], "pairs": [(0, 1), (2, 3)], "sft_target": "c"},
        "q": {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"},
    }


def test_transcripts(tmp_path, tokenizer):
    start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:"
    rows = [{"chosen": start + " good", "rejected": start + " bad"}, {"chosen": start, "rejected": "\n\nAssistant: x"}]
    tally = Tally()
    preferences = load_rows(tmp_path, rows, tokenizer, tally=tally)
    assert preferences == {start: {"responses": [" good", " bad"], "pairs": [(0, 1)], "sft_target": " good"}}
    assert (tally.rows, tally.dropped) == (2, {PROMPTS_DIFFER: 1})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        {"conversations": [user("hi")], "chosen": assistant("a"), "rejected": assistant("b"), "system": ""},
    ],
)
def test_messages_and_sharegpt(tmp_path, tokenizer, row):
    expected = {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a", "template": True}
    prompt = "<s><|user|>user\nhi<eos>\n<|user|>assistant\n"
    assert load_rows(tmp_path, [row], tokenizer) == {prompt: expected}

    expected = {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a"}
    assert load_rows(tmp_path, [row], tokenizer, chat_template="hh") == {"\n\nHuman: hi\n\nAssistant:": expected}


def test_hh_template_of_many_turns(tmp_path, tokenizer):
    prompt = [{"role": "system", "content": "Be kind."}, user("hi"), assistant("yes?"), user("so")]
    rows = [{"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    text = "Be kind.\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:"
    assert list(load_rows(tmp_path, rows, tokenizer, chat_template="hh")) == [text]


def test_sharegpt_system_column(tmp_path, tokenizer):
    rows = [{"conversations": [user("hi")], "system": "Be kind.", "chosen": "a", "rejected": "b"}]
    assert list(load_rows(tmp_path, rows, tokenizer, chat_template="hh")) == ["Be kind.\n\nHuman: hi\n\nAssistant:"]


def test_a_jinja_file_is_a_template(tmp_path, tokenizer):
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    rows = [{"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    preferences = load_rows(tmp_path, rows, byte_tokenizer(), chat_template=str(jinja))
    expected = {"responses": ["[a]", "[b]"], "pairs": [(0, 1)], "sft_target": "[a]", "template": True}
    assert preferences == {"[hi]": expected}


def test_literal_special_tokens_in_messages_are_marked(tmp_path, tokenizer):
    rows = [{"prompt": "say <|user|>", "chosen": [assistant("<<eos>")], "rejected": [assistant("<eo")]}]
    ((prompt, preference),) = load_rows(tmp_path, rows, tokenizer).items()
    assert prompt == f"<s><|user|>user\nsay <{MARK}|user|><eos>\n<|user|>assistant\n"
    assert preference["responses"] == [f"<<{MARK}eos>", "<eo"]


def test_overlapping_special_tokens_are_all_marked():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["ab", "bc"]})
    assert Chat(tokenizer).mark("xabcab") == f"xa{MARK}b{MARK}ca{MARK}b"


def test_an_empty_answer_stays_empty(tmp_path, tokenizer):
    rows = [{"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant(" ")]}]
    for template in (None, "hh"):
        ((_, preference),) = load_rows(tmp_path, rows, tokenizer, chat_template=template).items()
        assert preference["responses"][1] == ""


def test_messages_whose_prompts_differ_are_dropped(tmp_path, tokenizer):
    turns = [user("hi"), assistant("x"), user("so"), assistant("a")]
    rows = [{"chosen": turns, "rejected": [user("hi"), assistant("b")]}, {"chosen": turns, "rejected": turns}]
    tally = Tally()
    assert len(load_rows(tmp_path, rows, tokenizer, tally=tally)) == 1
    assert (tally.rows, tally.dropped) == (2, {PROMPTS_DIFFER: 1})


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


# ---- Instructions and dialogues ----

LLAMA2_PROMPT = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] yes? <eos><s>[INST] so [/INST]"


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
    expected = {"responses": ["3"], "pairs": [], "sft_target": "3", "demonstrations": ["3"], "template": True}
    prompt = f"<s><|user|>user\n{question}<eos>\n<|user|>assistant\n"
    assert load_rows(tmp_path, [row], tokenizer) == {prompt: expected}
    expected = {"responses": [" 3"], "pairs": [], "sft_target": " 3", "demonstrations": [" 3"]}
    assert load_rows(tmp_path, [row], tokenizer, chat_template="hh") == {
        f"\n\nHuman: {question}\n\nAssistant:": expected
    }


ONE = "\n\nHuman: hi\n\nAssistant:"
TWO = f"{ONE} yes?\n\nHuman: so\n\nAssistant:"
TURNS = [user("hi"), assistant("yes?"), user("so"), assistant("a")]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("sft_turns", "learned", "num_open"), [("all", {ONE: [" yes?"], TWO: [" a"]}, 0), ("last", {TWO: [" a"]}, 1)]
)
def test_the_answers_of_a_dialogue_that_are_learned(tmp_path, tokenizer, column, sft_turns, learned, num_open):
    tally = Tally()
    open_ended = [*TURNS[:2], user("so what")]
    rows = [{column: TURNS}, {column: TURNS[1:2]}, {column: TURNS[:1]}, {column: [user("no"), *open_ended]}]
    preferences = load_rows(tmp_path, rows, tokenizer, chat_template="hh", sft_turns=sft_turns, tally=tally)
    if sft_turns == "all":
        learned = learned | {f"\n\nHuman: no{ONE}": [" yes?"]}
    assert {prompt: preference["responses"] for prompt, preference in preferences.items()} == learned
    assert tally.dropped == {
        "dialogue that does not end in a message of the assistant": 1 + num_open,
        "dialogue without a message of the user": 1,
    }
    assert tally.rows == 4  # each once


def test_an_answer_needs_a_message_to_answer(tmp_path, tokenizer):
    """A greeting is none; and of two answers in a row, the template shows where the first ends, not the second."""
    turns = [assistant("welcome"), *TURNS[:2], assistant("yes!"), user("so"), assistant("a")]
    preferences = load_rows(tmp_path, [{"messages": turns}], tokenizer, chat_template="hh")
    assert [preference["sft_target"] for preference in preferences.values()] == [" yes?", " a"]
    with pytest.raises(UserError, match="field 'messages' ends in a message of the assistant, where the answer"):
        load_rows(tmp_path, [{"messages": turns[:4]}], tokenizer, chat_template="hh")


def test_a_dialogue_whose_prompts_would_fill_the_memory_is_refused(tmp_path, tokenizer):
    """As each answer has all before it as its prompt, they grow with the square of its length."""
    rows = [{"conversations": [user("x" * 40_000), assistant("a")] * 30}]
    with pytest.raises(
        UserError, match="field 'conversations' has 30 answers, whose prompts are over 16,000,000"
    ) as told:
        load_rows(tmp_path, rows, tokenizer, chat_template="hh")
    assert "fix: divide the dialogue, or set sft_turns=last; on_bad_row=drop" in str(told.value)
    assert len(load_rows(tmp_path, rows, tokenizer, chat_template="hh", sft_turns="last")) == 1
    many = [{"conversations": [user("a"), assistant("b")] * 150_000}]  # refused at once
    with pytest.raises(UserError, match="has 150000 answers"):
        load_rows(tmp_path, many, tokenizer, chat_template="hh")


def test_the_answers_of_a_dialogue_are_held_out_together(tmp_path, tokenizer):
    rows = [{"messages": [user(f"q{i}"), assistant("a"), user("and?"), assistant(f"b{i}")]} for i in range(20)]
    rows.append({"messages": [*rows[0]["messages"][:3], assistant("c")]})  # begins as the first does
    start = rows[1]["messages"][:3]  # as does one with a preference, which is known by all of its prompt
    rows.insert(0, {"messages": start, "chosen": [*start, assistant("c")], "rejected": [*start, assistant("d")]})
    splits = [
        load_rows(tmp_path, rows, tokenizer, split=split, test_fraction=0.25, chat_template="hh")
        for split in ("train", "test")
    ]
    assert list(map(len, splits)) == [30, 10]
    for preferences in splits:
        questions = [re.findall(r"q\d+", prompt)[0] for prompt in preferences]
        assert all(questions.count(question) == 2 for question in questions)


def test_the_llama2_template_by_name(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, user("hi "), assistant("yes?"), user("so"), assistant("a")]
    plain = byte_tokenizer()  # has no template of its own
    *_, (prompt, preference) = load_rows(tmp_path, [{"messages": turns}], plain, chat_template="llama2").items()
    assert (prompt, preference["sft_target"], preference["template"]) == (LLAMA2_PROMPT, " a ", True)
    with pytest.raises(UserError, match="the chat template refuses it: after one system message at most, user and"):
        load_rows(tmp_path, [{"messages": turns[1:3] + turns}], plain, chat_template="llama2")


def test_hh_as_jinja_is_the_form_that_training_writes(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, user("hi"), assistant("yes?"), user("so"), assistant("a")]
    plain = byte_tokenizer()
    *_, (prompt, _) = load_rows(tmp_path, [{"messages": turns}], plain, chat_template="hh").items()
    assert prompt.startswith("Be kind.\n\nHuman: hi")
    rendered = plain.apply_chat_template(
        turns[:-1], chat_template=JINJA["hh"], tokenize=False, add_generation_prompt=True
    )
    assert rendered == prompt


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "i", "output": "o"},
        {"messages": [user("hi"), assistant("a")]},
        {"conversations": [user("hi"), assistant("a")]},
    ],
)
def test_rows_without_a_preference_are_for_sft_only(tmp_path, tokenizer, row):
    with pytest.raises(UserError, match="one answer, which is preferred to no other; fix: train on them with loss=sft"):
        load_rows(tmp_path, [row], tokenizer, needs_pairs=True)


def test_a_chat_template_is_needed(tmp_path):
    with pytest.raises(UserError, match="the tokenizer has no template; fix: set chat_template=hh or llama2"):
        load_rows(tmp_path, [{"instruction": "i", "output": "o"}], byte_tokenizer())


# ---- Files ----


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_lines(tmp_path, name):
    rows = list(read_rows(write(tmp_path / name, [PAIR, PAIR])))
    assert [row.values for row in rows] == [PAIR, PAIR]
    assert [row.origin for row in rows] == [f"{tmp_path}/{name} line 1", f"{tmp_path}/{name} line 2"]


def test_a_json_list(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("\ufeff\n" + json.dumps([PAIR, PAIR], indent=1))
    assert [(row.values, row.origin) for row in read_rows(path)] == [(PAIR, f"{path} row 0"), (PAIR, f"{path} row 1")]


def test_parquet(tmp_path, tokenizer):
    path = tmp_path / "x.parquet"
    row = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert [(row.values, row.origin) for row in read_rows(path)] == [(row, f"{path} row 0")]
    assert len(load(path, tokenizer)) == 1


def test_empty_lines_and_unusual_line_ends(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\r\n{"a": 2}')
    assert [row.origin for row in read_rows(path)] == [f"{path} line 1", f"{path} line 3"]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": }\n', "x.jsonl line 2 is not JSON: Expecting value, column 7; fix: "),
        ("x.json", b'[\n{"a": 1},\n{"a" 1}]', "x.json line 3 is not JSON: Expecting ':' delimiter, column 6; fix: "),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl line 2 is not UTF-8; fix: "),
        ("x.json", b'[\n{"a": "\xff"}]', "x.json line 2 is not UTF-8; fix: "),
        ("x.jsonl", b'{"a": 1}\n3\n', "x.jsonl line 2 is not an object; fix: "),
        ("x.json", b'[{"a": 1}, "b"]', "x.json row 1 is not an object; fix: "),
        ("x.jsonl", b"[" * 100_000 + b"\n", "x.jsonl line 1 is not usable JSON: "),
        ("x.jsonl.gz", b"no gzip", "x.jsonl.gz cannot be read: "),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "x.jsonl.gz cannot be read: "),
        ("x.parquet", b"no parquet", "x.parquet cannot be read: "),
        ("x.csv", b"a,b", "x.csv: unknown kind of file; fix: use one of .json, "),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_rows(tmp_path / name))
    assert str(error.value).startswith(f"error[DATA] {tmp_path}/{problem}")


CHAT = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
SHAREGPT = {"conversations": [user("hi")], "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("good", "change", "problem"),
    [
        (PAIR, {"chosen": 3}, "field 'chosen' is a number, not text"),
        (PAIR, {"chosen": None}, "field 'chosen' is null, not text"),
        (PAIR, {"rejected": ["b"]}, "field 'rejected' is a list, not text"),
        (PAIR, {"prompt": True}, "field 'prompt' is a boolean, not text"),
        (PAIR, {"prompt": "a\0b"}, "field 'prompt' holds a NUL byte"),
        (PAIR, {"prompt": "\ud800"}, "field 'prompt' holds half a surrogate pair, which is no character"),
        (CHAT, {"chosen": "a"}, "field 'chosen' is text, not a list"),
        (CHAT, {"chosen": []}, "field 'chosen' is an empty list"),
        (CHAT, {"chosen": ["a"]}, "field 'chosen[0]' is text, not an object"),
        (CHAT, {"chosen": [{"role": "assistant"}]}, "field 'chosen[0].content' is missing"),
        (CHAT, {"prompt": [user("hi"), {"role": "user", "content": 5}]}, "field 'prompt[1].content' is a number"),
        (CHAT, {"rejected": [user("b")]}, "field 'rejected' does not end in a message of the assistant"),
        (CHAT, {"prompt": [assistant("x")]}, "field 'prompt' ends in a message of the assistant, where the"),
        (CHAT, {"chosen": [user("ho"), assistant("a")]}, "field 'chosen' has messages before its last that are not"),
        (SHAREGPT, {"conversations": [{"from": "x", "value": "hi"}]}, "field 'conversations[0].from' is 'x', not one"),
        (SHAREGPT, {"chosen": user("a")}, "field 'chosen' is not a message of the assistant"),
        (SHAREGPT, {"rejected": 3}, "field 'rejected' is a number, not an object"),
        (RANKED, {"responses": []}, "field 'responses' is an empty list"),
        (RANKED, {"responses": ["a", 2]}, "field 'responses[1]' is a number, not text"),
        (RANKED, {"scores": [1]}, "field 'scores' has 1 values for 2 responses"),
        (RANKED, {"scores": [1, "2"]}, "field 'scores[1]' is text, not a number"),
        (RANKED, {"scores": [1, float("nan")]}, "field 'scores[1]' is nan"),
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
    with pytest.raises(UserError, match=r"line 1: the columns prompt, chosen are of no known form; fix: .*format="):
        load_rows(tmp_path, [missing], tokenizer)
    with pytest.raises(UserError, match="line 1: field 'chosen' has no message before its last"):
        load_rows(tmp_path, [{"chosen": [assistant("a")], "rejected": [assistant("b")]}], tokenizer)
    with pytest.raises(UserError, match=r"line 1: field 'chosen' has no '\\n\\nAssistant:' turn"):
        load_rows(tmp_path, [{"chosen": "a", "rejected": "b"}], tokenizer)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, r"error\[CONFIG\] chat_template: .* the tokenizer has no template; fix: set chat_template=hh"),
        ("missing.jinja", r"error\[CONFIG\] chat_template: missing\.jinja cannot be read"),
        ("{{ raise_exception('roles must alternate') }}", r"line 1: the chat template refuses it: roles must"),
        ("{{ messages", r"line 1: the chat template refuses it"),
        ("{{ messages | length }}", r"error\[CONFIG\] .* a dialogue does not begin as its own prompt does"),
    ],
)
def test_templates_that_do_not_work(tmp_path, template, problem):
    if template and "{" in template:
        (tmp_path / "t.jinja").write_text(template)
        template = str(tmp_path / "t.jinja")
    with pytest.raises(UserError, match=problem):
        load_rows(tmp_path, [CHAT], byte_tokenizer(), chat_template=template)


def test_hh_template_refuses_other_roles(tmp_path, tokenizer):
    rows = [{**CHAT, "prompt": [user("hi"), {"role": "tool", "content": "x"}]}]
    with pytest.raises(UserError, match="line 1: role 'tool' has no place in chat_template=hh"):
        load_rows(tmp_path, rows, tokenizer, chat_template="hh")


# ---- Splits ----


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{**PAIR, "prompt": f"p{i}"} for i in range(start, start + count)]


@pytest.mark.parametrize("test_name", ["test.json", "validation.jsonl.gz", "eval.jsonl"])
def test_a_folder(tmp_path, tokenizer, test_name):
    write(tmp_path / "train.jsonl.gz", numbered(3))
    write(tmp_path / test_name, numbered(2, start=3))
    write(tmp_path / "training.jsonl", numbered(9))
    assert list(load(tmp_path, tokenizer, test_fraction=0.5)) == ["p0", "p1", "p2"]
    assert list(load(tmp_path, tokenizer, split="test", test_fraction=0.5)) == ["p3", "p4"]


def test_test_goes_before_validation(tmp_path, tokenizer):
    for number, name in enumerate(("train", "validation", "test")):
        write(tmp_path / f"{name}.jsonl", numbered(1, start=number))
    assert list(load(tmp_path, tokenizer, split="test")) == ["p2"]


def test_folders_that_do_not_work(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"error\[DATA\] datasets: .* holds no file train"):
        load(tmp_path, tokenizer)
    write(tmp_path / "train.jsonl", numbered(1))
    write(tmp_path / "train.json", numbered(1))
    with pytest.raises(UserError, match=r"holds both train\.json and train\.jsonl"):
        load(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"there is no file .*nothing\.jsonl"):
        load(tmp_path / "nothing.jsonl", tokenizer)


@pytest.mark.parametrize("folder", [False, True])
def test_held_out_prompts(tmp_path, tokenizer, folder):
    rows = numbered(200) + numbered(200)  # every prompt twice
    write(tmp_path / "train.jsonl", rows)
    path = tmp_path if folder else tmp_path / "train.jsonl"
    tallies = {"train": Tally(), "test": Tally()}
    train, test = (load(path, tokenizer, split=s, test_fraction=0.1, tally=tallies[s]) for s in ("train", "test"))
    assert len(test) == 20 and len(train) == 180 and not train.keys() & test.keys()
    assert all(len(preference["pairs"]) == 2 for preference in (train | test).values())
    assert (tallies["train"].rows, tallies["test"].rows) == (360, 40)
    write(tmp_path / "train.jsonl", rows[::-1])
    assert load(path, tokenizer, split="test", test_fraction=0.1).keys() == test.keys()


def test_what_is_held_out_does_not_depend_on_the_template(tmp_path, tokenizer):
    rows = [{**CHAT, "prompt": [user(f"question {i}")]} for i in range(40)]
    asked = []
    for template in (None, "hh"):
        test = load_rows(tmp_path, rows, tokenizer, split="test", test_fraction=0.2, chat_template=template)
        asked.append({prompt[prompt.index("question") :].split("\n")[0].removesuffix("<eos>") for prompt in test})
    assert asked[0] == asked[1] and len(asked[0]) == 8


@pytest.mark.parametrize(("num_rows", "fraction", "expected"), [(1, 0.5, 0), (2, 0.01, 1), (3, 0.99, 2), (4, 0, 0)])
def test_small_files_keep_a_prompt_in_each_split(tmp_path, tokenizer, num_rows, fraction, expected):
    rows = numbered(num_rows)
    assert len(load_rows(tmp_path, rows, tokenizer, split="test", test_fraction=fraction)) == expected
    assert len(load_rows(tmp_path, rows, tokenizer, test_fraction=fraction)) == num_rows - expected
