"""The user's own files: splits of files and folders, and held-out prompts."""

import re

import pytest

from engine.data.rows import RowCounts
from tests.data.samples import CHAT, PAIR, assistant, load, load_rows, user, write
from utils import UserError


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{**PAIR, "prompt": f"p{i}"} for i in range(start, start + count)]


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


def test_held_out_prompts_are_the_same_with_every_template(tmp_path, tokenizer):
    rows = [{**CHAT, "prompt": [user(f"question {i}")]} for i in range(40)]
    held_out = []
    for template in (None, "hh"):
        test = load_rows(tmp_path, rows, tokenizer, split="test", test_fraction=0.2, chat_template=template)
        held_out.append({prompt[prompt.index("question") :].split("\n")[0].removesuffix("<eos>") for prompt in test})
    assert held_out[0] == held_out[1] and len(held_out[0]) == 8


@pytest.mark.parametrize(("num_rows", "fraction", "expected"), [(1, 0.5, 0), (2, 0.01, 1), (3, 0.99, 2), (4, 0, 0)])
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
        load_rows(tmp_path, [row], tokenizer, needs_pairs=True)
