"""Token stores: what is written is read back, and nothing half, stale or damaged is read."""

import json
import os
import shutil

import numpy as np
import pytest

from engine.data import token_store
from engine.data.token_store import TokenStore, TokenStoreWriter, open_store
from utils import UserError

TEXTS = [[1, 2, 3], [], [65_535], [7] * 1000]


def read(path, inputs="a") -> TokenStore:
    store = open_store(path, inputs)
    assert store is not None
    return store


def write(path, inputs="a", vocabulary_size=65_536, texts=TEXTS):
    with TokenStoreWriter(path, vocabulary_size, inputs) as writer:
        writer.add(texts[:2])
        writer.add([np.array(text, np.int32) for text in texts[2:]])
        writer.columns |= {"weight": np.arange(len(texts)) / 2, "other": [json.dumps({"n": n}) for n in texts]}
        writer.meta["language"] = "none"


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_texts_columns_and_notes_are_read_back(tmp_path, vocabulary_size, dtype):
    write(tmp_path / "store", vocabulary_size=vocabulary_size)
    store = read(tmp_path / "store")
    assert [text.tolist() for text in store] == TEXTS == [store[index].tolist() for index in range(4)]
    assert store.tokens.tolist() == [token for text in TEXTS for token in text]
    assert (store.tokens.dtype, store.offsets.tolist()) == (dtype, [0, 3, 3, 4, 1004])
    assert store[-1] is not None and np.shares_memory(store[3], store.tokens)
    assert not store.tokens.flags.owndata and not store.tokens.flags.writeable
    assert store.columns["weight"].tolist() == [0, 0.5, 1, 1.5]
    assert json.loads(store.columns["other"][2]) == {"n": [65_535]}
    assert dict(store.meta) == {"language": "none"}
    with pytest.raises(IndexError):
        store[4]


def test_a_store_without_texts_is_one(tmp_path):
    write(tmp_path / "store", texts=[])
    store = read(tmp_path / "store")
    assert (len(store), len(store.tokens), list(store)) == (0, 0, [])


def test_other_inputs_or_another_version_make_a_store_stale(tmp_path, monkeypatch):
    write(tmp_path / "store", inputs={"files": ["x"], "n": 1})
    assert open_store(tmp_path / "store", {"n": 1, "files": ("x",)}) is not None
    assert open_store(tmp_path / "store", {"n": 2, "files": ["x"]}) is None
    assert open_store(tmp_path / "none", "a") is None
    monkeypatch.setattr(token_store, "STORE_VERSION", -1)
    assert open_store(tmp_path / "store", {"n": 1, "files": ["x"]}) is None


@pytest.mark.parametrize("name", ["texts.arrow", "meta.json"])
@pytest.mark.parametrize("damage", ["changed", "short", "missing", "empty"])
def test_a_damaged_store_is_none_and_written_anew(tmp_path, name, damage):
    write(tmp_path / "store")
    file = tmp_path / "store" / name
    data = file.read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    file.write_bytes({"changed": changed, "short": data[:middle], "empty": b"", "missing": b""}[damage])
    if damage == "missing":
        file.unlink()
    assert open_store(tmp_path / "store", "a") is None
    write(tmp_path / "store")
    assert len(read(tmp_path / "store")) == 4


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_store_that_another_process_changes_while_it_is_opened_is_none(tmp_path, monkeypatch, change):
    """Its tokens and its notes would be of two stores."""
    write(tmp_path / "store")
    real = token_store.map_arrow

    def map_late(path):
        if change == "removed":
            shutil.rmtree(path.parent)
        else:
            monkeypatch.undo()
            write(tmp_path / "store", inputs="b", texts=[[5], [6]])
        return real(path)

    monkeypatch.setattr(token_store, "map_arrow", map_late)
    assert open_store(tmp_path / "store", "a") is None


def test_a_writer_that_fails_leaves_the_store_before_it(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(RuntimeError), TokenStoreWriter(tmp_path / "store", 10, "b") as writer:
        writer.add([[1]])
        raise RuntimeError
    assert open_store(tmp_path / "store", "a") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_leftovers_of_killed_writers_are_removed(tmp_path, monkeypatch):
    (tmp_path / ".store.1.tmp").mkdir()
    (tmp_path / ".store.1.tmp" / "stream").touch()
    os.utime(tmp_path / ".store.1.tmp", (0, 0))  # a directory is as old as its newest file is
    write(tmp_path / "store")
    assert (tmp_path / ".store.1.tmp").exists()  # perhaps of a writer at work
    monkeypatch.setattr(token_store, "STALE_SECONDS", -1)
    write(tmp_path / "store")
    assert not (tmp_path / ".store.1.tmp").exists()


def test_a_token_beyond_the_vocabulary_is_an_error(tmp_path):
    for tokens in ([10], np.array([65_537], np.int32), [-1]):
        with pytest.raises(ValueError, match="not below 10"), TokenStoreWriter(tmp_path / "store", 10, "a") as writer:
            writer.add([[9], tokens])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"STORAGE.*cache_dir.*cannot be written.*fix: make room"):
        write(tmp_path / "file" / "store")
