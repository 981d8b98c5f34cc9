"""The user's own files: splits of files and folders, and held-out prompts."""

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data.rows import RowCounts
from tests.data.samples import CHAT, PAIR, assistant, byte_tokenizer, load, load_rows, user, write
from utils import UserError


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{**PAIR, "prompt": f"p{i}"} for i in range(start, start + count)]


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("test_name", ["test.json", "validation.jsonl.gz", "eval.jsonl"])
def test_a_folder(tmp_path, tokenizer, test_name):
    write(tmp_path / "train.jsonl.gz", numbered(3))
    write(tmp_path / test_name, numbered(2, start=3))
    write(tmp_path / "training.jsonl", numbered(9))
    assert list(load(tmp_path, tokenizer, test_fraction=0.5)) == ["p0", "p1", "p2"]
    assert list(load(tmp_path, tokenizer, split="test", test_fraction=0.5)) == ["p3", "p4"]


def test_test_files_take_precedence_over_validation(tmp_path, tokenizer):
    for number, name in enumerate(("train", "validation", "test")):
        write(tmp_path / f"{name}.jsonl", numbered(1, start=number))
    assert list(load(tmp_path, tokenizer, split="test")) == ["p2"]


def test_unusable_folders(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"error\[DATA\] datasets: .* holds no file train"):
        load(tmp_path, tokenizer)
    write(tmp_path / "train.jsonl", numbered(1))
    write(tmp_path / "train.json", numbered(1))
    with pytest.raises(UserError, match=r"holds both train\.json and train\.jsonl"):
        load(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"there is no file .*nothing\.jsonl"):
        load(tmp_path / "nothing.jsonl", tokenizer)


@pytest.mark.parametrize("folder", ["", "data"])
def test_the_layout_of_the_hub(tmp_path, tokenizer, folder):
    for number in range(2):
        write_parquet(tmp_path / folder / f"train-0000{number}-of-00002.parquet", numbered(2, start=2 * number))
    write_parquet(tmp_path / folder / "validation-00000-of-00001.parquet", numbered(1, start=4))
    (tmp_path / "README.md").write_text("a card")
    assert list(load(tmp_path, tokenizer)) == ["p0", "p1", "p2", "p3"]
    assert list(load(tmp_path, tokenizer, split="test")) == ["p4"]
    (tmp_path / folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"holds 1 of 2 files train-\*; fix: add the others"):
        load(tmp_path, tokenizer)
    write(tmp_path / folder / "train.jsonl", numbered(1))
    with pytest.raises(UserError, match=r"holds both train-00000-of-00002\.parquet and train\.jsonl"):
        load(tmp_path, tokenizer)


def test_a_folder_of_save_to_disk(tmp_path, tokenizer):
    data = datasets.Dataset.from_list(numbered(10))
    data.save_to_disk(tmp_path / "one", num_shards=2)
    train, test = (load(tmp_path / "one", tokenizer, split=s, test_fraction=0.2) for s in ("train", "test"))
    assert len(train) == 8 and len(test) == 2 and sorted(train | test) == sorted(f"p{i}" for i in range(10))
    splits = {"train": data.select(range(1, 7)), "validation": data.select(range(7, 10))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert list(load(tmp_path / "two", tokenizer)) == [f"p{i}" for i in range(1, 7)]
    assert list(load(tmp_path / "two", tokenizer, split="test")) == ["p7", "p8", "p9"]


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("{", r"state\.json does not list the files of a data set; fix: save it again"),
        ('{"_data_files": [{"filename": 3}]}', r"state\.json does not list the files"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', r"names \.\./x\.arrow, not an \.arrow file beside it"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', r"names /etc/passwd, not an \.arrow file beside it"),
        ('{"_data_files": [{"filename": "x.arrow"}]}', r"lacks its file x\.arrow; fix: copy the folder again"),
    ],
)
def test_damaged_folders_of_save_to_disk(tmp_path, tokenizer, state, problem):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=problem):
        load(tmp_path, tokenizer)


PLAIN_TEXT = "holds plain text: its prompts go in as they are, without the chat template of the model (format=messages"


@pytest.mark.parametrize(
    ("row", "options", "is_said"),
    [
        (PAIR, {}, True),
        ({"prompt": "p", "completion": "c"}, {}, True),
        ({"prompt": "p", "responses": ["c"]}, {}, True),
        (PAIR, {"split": "test"}, False),  # the train split said it
        (PAIR, {"form": "messages"}, False),
        ({"prompt": "p", "completion": "c"}, {"form": "messages"}, False),
        (CHAT, {}, False),
        (CHAT, {"chat_template": "hh"}, False),
        (PAIR, {"chat_template": "hh", "form": "messages"}, False),
    ],
)
def test_plain_text_for_an_instruct_model_is_said_once(tmp_path, tokenizer, capsys, row, options, is_said):
    load_rows(tmp_path, [row, row], tokenizer, **options)
    said = capsys.readouterr().out
    assert said.startswith(f"note: {tmp_path}/rows.jsonl {PLAIN_TEXT}") if is_said else said == ""
    assert said.count("\n") == is_said
    load_rows(tmp_path, [PAIR], byte_tokenizer())  # a base model
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("has_template", [False, True])
@pytest.mark.parametrize("row", [PAIR, {"prompt": "p", "completion": "c"}, {"prompt": "p", "responses": ["c"]}])
def test_a_chat_template_beside_plain_text_is_warned_of(tmp_path, tokenizer, capsys, row, has_template):
    tokenizer = tokenizer if has_template else byte_tokenizer()
    load_rows(tmp_path, [row, row], tokenizer, chat_template="chatml")
    load_rows(tmp_path, [row, row], tokenizer, chat_template="chatml", split="test")  # the train split said it
    warning = f"warning: chat_template=chatml changes nothing for {tmp_path}/rows.jsonl: it holds plain text (format="
    said = capsys.readouterr().out
    assert said.startswith(warning) and said.count("\n") == 1


@pytest.mark.parametrize("is_text_first", [False, True])
def test_rows_of_plain_text_beside_messages_are_counted(tmp_path, tokenizer, capsys, is_text_first):
    text, messages = {"prompt": "p", "completion": "c"}, {"prompt": [user("q")], "completion": [assistant("d")]}
    rows = [text, text, messages] if is_text_first else [messages, text, text]
    load_rows(tmp_path, rows, tokenizer, chat_template="hh")
    place = f"2 of 3 rows of {tmp_path}/rows.jsonl"
    said = capsys.readouterr().out
    assert said.startswith(f"warning: chat_template=hh changes nothing for {place}: they are plain text (format=")
    load_rows(tmp_path, rows, tokenizer)
    assert capsys.readouterr().out.startswith(f"note: {place} are plain text: their prompts go in as they are, ")


@pytest.mark.parametrize("folder", [False, True])
def test_held_out_prompts(tmp_path, tokenizer, folder):
    rows = numbered(200) + numbered(200)  # every prompt twice
    write(tmp_path / "train.jsonl", rows)
    path = tmp_path if folder else tmp_path / "train.jsonl"
    counts = {"train": RowCounts(), "test": RowCounts()}
    train, test = (load(path, tokenizer, split=s, test_fraction=0.1, counts=counts[s]) for s in ("train", "test"))
    assert len(test) == 20 and len(train) == 180 and not train.keys() & test.keys()
    assert all(len(preference["pairs"]) == 2 for preference in (train | test).values())
    assert (counts["train"].rows, counts["test"].rows) == (360, 40)
    write(tmp_path / "train.jsonl", rows[::-1])
    assert load(path, tokenizer, split="test", test_fraction=0.1).keys() == test.keys()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_single_prompt_cannot_be_split(tmp_path, tokenizer, split):
    write(tmp_path / "one.jsonl", numbered(1) * 2)
    with pytest.raises(UserError, match=r"datasets: .*one\.jsonl has a single prompt, so none can be held out"):
        load(tmp_path / "one.jsonl", tokenizer, split=split, test_fraction=0.05)
    assert list(load(tmp_path / "one.jsonl", tokenizer, test_fraction=0)) == ["p0"]


def test_held_out_prompts_are_the_same_with_every_template(tmp_path, tokenizer):
    rows = [{**CHAT, "prompt": [user(f"question {i}")]} for i in range(40)]
    held_out = []
    for template in (None, "hh"):
        test = load_rows(tmp_path, rows, tokenizer, split="test", test_fraction=0.2, chat_template=template)
        held_out.append({prompt[prompt.index("question") :].split("\n")[0].removesuffix("<eos>") for prompt in test})
    assert held_out[0] == held_out[1] and len(held_out[0]) == 8


@pytest.mark.parametrize(("num_rows", "fraction", "expected"), [(2, 0.01, 1), (3, 0.99, 2), (4, 0, 0)])
def test_small_files_keep_a_prompt_in_each_split(tmp_path, tokenizer, num_rows, fraction, expected):
    rows = numbered(num_rows)
    assert len(load_rows(tmp_path, rows, tokenizer, split="test", test_fraction=fraction)) == expected
    assert len(load_rows(tmp_path, rows, tokenizer, test_fraction=fraction)) == num_rows - expected


def test_responses_of_a_dialogue_are_held_out_together(tmp_path, tokenizer):
    rows = [{"messages": [user(f"q{i}"), assistant("a"), user("and?"), assistant(f"b{i}")]} for i in range(20)]
    rows.append({"messages": [*rows[0]["messages"][:3], assistant("c")]})  # same beginning as the first
    start = rows[1]["messages"][:3]  # a pair with the same beginning as rows[1]
    rows.insert(0, {"messages": start, "chosen": [*start, assistant("c")], "rejected": [*start, assistant("d")]})
    splits = [
        load_rows(tmp_path, rows, tokenizer, split=split, test_fraction=0.25, chat_template="hh")
        for split in ("train", "test")
    ]
    assert list(map(len, splits)) == [30, 10]
    for preferences in splits:
        questions = [re.findall(r"q\d+", prompt)[0] for prompt in preferences]
        assert all(questions.count(question) == 2 for question in questions)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "i", "output": "o"},
        {"messages": [user("hi"), assistant("a")]},
        {"conversations": [user("hi"), assistant("a")]},
    ],
)
def test_rows_without_a_preference_are_for_sft_only(tmp_path, tokenizer, row):
    with pytest.raises(UserError, match="have one response and no preference; fix: train on them with loss=sft"):
        load_rows(tmp_path, [row], tokenizer, batch="pairs")
    with pytest.raises(UserError, match="loss=sft; other losses need prompt, completion and label, or pairs"):
        load_rows(tmp_path, [row], tokenizer, batch="unpaired")
