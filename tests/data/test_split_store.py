"""Splits on disk: a second load reads no rows, and gives the same; any change of what it follows from reads them."""

import errno
import gzip
import json
from collections import Counter

import numpy as np
import pytest

import preference_datasets
from engine.data import files, split_store
from engine.data.example_table import ExampleTable, labels_of, prompt_hash, prompt_hashes, prompt_indices
from engine.data.examples import Example, fingerprint
from engine.data.mismatched import add_mismatched
from engine.step.layout import fed_tokens
from preference_datasets import Dataset, load_split, num_shared_prompts
from tests.configs import make_settings
from tests.data.samples import CHATML, byte_tokenizer

ROWS = [
    {"prompt": "a question", "chosen": "yes", "rejected": "no"},
    {"prompt": "a question", "chosen": "yes", "rejected": "maybe so", "weight": 0.5},
    {"prompt": "another one, much longer", "chosen": "a long response " * 3, "rejected": "short"},
    {"prompt": "<eos> in a prompt", "chosen": "x", "rejected": "y"},
]


@pytest.fixture
def num_read(monkeypatch) -> Counter[str]:
    """Counts readings of files of rows."""
    calls: Counter[str] = Counter()
    real = files.read_rows

    def spy(*args, **kwargs):
        calls["read"] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(files, "read_rows", spy)
    return calls


@pytest.fixture
def tokenizer():
    return byte_tokenizer("<s> $A", chat_template=CHATML)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SETTINGS = make_settings()


def settings_of(tmp_path, path, **options):
    limits = {"max_length": 30, "max_prompt_length": 12, "test_fraction": 0}
    paths = {"datasets": [str(path)], "cache_dir": str(tmp_path / "cache")}
    return SETTINGS.model_copy(update=limits | paths | options)


def shown(example: Example):
    arrays = [example.prompt, *example.responses, *([] if example.mismatched is None else [example.mismatched])]
    assert all(array.dtype == np.int32 for array in arrays)
    return [array.tolist() for array in arrays], example.prompt_index, example.label, example.weight


def same(first, second):
    assert [*map(shown, first.examples)] == [*map(shown, second.examples)]
    assert (first.counts, first.sizes) == (second.counts, second.sizes)
    assert fingerprint(first.examples) == fingerprint(second.examples) == fingerprint([*second.examples])


@pytest.mark.parametrize("batch", ["pairs", "sft", "unpaired"])
@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_a_second_load_reads_no_rows_and_gives_the_same(
    tmp_path, tokenizer, num_read, capsys, batch, mode, monkeypatch
):
    settings = settings_of(tmp_path, write(tmp_path / "rows.jsonl", ROWS))
    load = preference_datasets._load_dataset
    monkeypatch.setattr(preference_datasets, "_load_dataset", lambda *args: (load(*args)[0], mode))
    first = load_split(settings, tokenizer, "train", batch)
    printed = capsys.readouterr().out
    assert "the column weight of" in printed
    second = load_split(settings, tokenizer, "train", batch)
    assert num_read["read"] == 1
    same(first, second)
    assert capsys.readouterr().out == printed
    assert first.counts["truncated"] > 0
    observed = load_split(settings, tokenizer, "train", batch, observe=lambda _: None)  # reads them
    assert num_read["read"] == 2
    same(observed, second)


def test_a_table_gives_what_the_examples_give(tmp_path, tokenizer):
    settings = settings_of(tmp_path, write(tmp_path / "rows.jsonl", ROWS))
    _, table = (load_split(settings, tokenizer, "train", "unpaired").examples for _ in range(2))
    assert isinstance(table, ExampleTable) and not table.columns["weight"].flags.owndata
    examples = [*table]
    assert [*map(shown, table[1:3])] == [*map(shown, examples[1:3])] and shown(table[-1]) == shown(examples[-1])
    with pytest.raises(IndexError):
        table[len(table)]
    assert prompt_indices(table).tolist() == prompt_indices(examples).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert prompt_hashes(table).tolist() == prompt_hashes(examples).tolist()
    assert prompt_hashes(table)[0] == prompt_hash(examples[0].prompt)
    assert labels_of(table) == labels_of(examples) == [True, False] * 4
    for layout in (("packed", False), ("packed", True), ("padded", False)):
        assert fed_tokens(table, *layout).tolist() == fed_tokens(examples, *layout).tolist()
    ours, theirs = (add_mismatched(each, 30, 3, "train") for each in (table, examples))
    assert [*map(shown, ours)] == [*map(shown, theirs)]
    assert fingerprint(ours) == fingerprint(theirs) != fingerprint(table)


def test_any_change_reads_the_rows_again(tmp_path, tokenizer, num_read, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROWS)
    first = load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs")
    write(path, ROWS[:-1])
    assert len(load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs").examples) == 3
    assert num_read["read"] == 2
    write(path, ROWS)
    same(load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs"), first)
    for change in ({"max_length": 20}, {"max_prompt_length": 5}, {"on_bad_row": "drop"}, {"sft_turns": "last"}):
        before = num_read["read"]
        load_split(settings_of(tmp_path, path, **change), tokenizer, "train", "pairs")
        assert num_read["read"] == before + 1, change
    load_split(settings_of(tmp_path, path), tokenizer, "train", "sft")
    load_split(settings_of(tmp_path, path), byte_tokenizer("<s> $A", 1, CHATML), "train", "pairs")
    monkeypatch.setattr(split_store, "_hash_code", lambda *loaders: "other code")
    load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs")
    assert num_read["read"] == 10
    load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs")
    assert num_read["read"] == 10


def test_a_new_test_file_changes_the_train_split(tmp_path, tokenizer, num_read):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS * 3)
    settings = settings_of(tmp_path, folder, test_fraction=0.5)
    held_out = [load_split(settings, tokenizer, split, "pairs") for split in ("train", "test")]
    assert num_shared_prompts(*held_out)[0] == 0
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    train, test = (load_split(settings, tokenizer, split, "pairs") for split in ("train", "test"))
    assert (len(train.examples), len(test.examples)) == (12, 1)
    assert num_shared_prompts(train, test) == (1, 1)


@pytest.mark.parametrize("store", ["examples", "tokens"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_store_is_read_again(tmp_path, tokenizer, num_read, store, damage):
    settings = settings_of(tmp_path, write(tmp_path / "rows.jsonl", ROWS))
    first = load_split(settings, tokenizer, "train", "pairs")
    (file,) = (tmp_path / "cache" / store).glob("*/*.arrow")
    data = file.read_bytes()
    file.unlink()
    if damage == "changed":
        file.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    for _ in range(2):
        same(load_split(settings, tokenizer, "train", "pairs"), first)
    assert num_read["read"] == 2


def test_rows_of_a_file_that_changes_while_it_is_read_are_not_stored(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROWS)
    real = files.read_rows

    def read_late(*args, **kwargs):
        write(path, [*ROWS, *ROWS[:1]])
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_rows", read_late)
        assert load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs").counts["rows"] == 5
    write(path, ROWS)
    assert load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs").counts["rows"] == 4


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, tokenizer, num_read, monkeypatch, capsys):
    """As before splits were stored: a read-only cache with the tokens is enough for a run with other lengths."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    load_split(settings_of(tmp_path, path), tokenizer, "train", "pairs")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(split_store, "write_arrow", refuse)
        first = load_split(settings_of(tmp_path, path, max_length=20), tokenizer, "train", "pairs")
    assert "Read-only file system), so the next run reads the rows again" in capsys.readouterr().out
    same(load_split(settings_of(tmp_path, path, max_length=20), tokenizer, "train", "pairs"), first)
    assert num_read["read"] == 3
    assert not [*(tmp_path / "cache" / "examples").glob(".*")]


def test_a_template_with_the_date_is_rendered_anew_on_the_next_day(tmp_path, num_read, monkeypatch):
    dated = byte_tokenizer(chat_template=CHATML + "{# strftime_now #}")
    messages = [{"role": "user", "content": "q"}]
    rows = [{"prompt": messages, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}]
    settings = settings_of(tmp_path, write(tmp_path / "rows.jsonl", rows))
    for day in ("2030-01-01", "2030-01-01", "2030-01-02"):
        monkeypatch.setattr(split_store, "_day", lambda *templates, day=day: day)
        load_split(settings, dated, "train", "pairs")
    assert num_read["read"] == 2
    monkeypatch.undo()
    assert split_store._day("strftime_now") and split_store._day(None, "x") is None


def test_a_loader_that_reads_files_by_itself_is_called_every_time(tmp_path, tokenizer, monkeypatch):
    calls: Counter[str] = Counter()

    def get_own(split, source):
        calls["load"] += 1
        return {"p": {"responses": [f"a{calls['load']}", "b"], "pairs": [(0, 1)], "sft_target": "a"}}

    monkeypatch.setitem(preference_datasets.DATASETS, "own", Dataset(get_own))
    settings = settings_of(tmp_path, "own")
    decoded = [
        tokenizer.decode(load_split(settings, tokenizer, "train", "pairs").examples[0].responses[0]) for _ in "12"
    ]
    assert decoded == ["a1<eos>", "a2<eos>"]
