"""Files of rows: JSON, JSON lines, CSV, Parquet, Arrow, gzipped or damaged."""

import gzip
import io
import json
import os
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data import json_arrays, row_files
from engine.data.row_files import read_rows
from tests.data.samples import PAIR, assistant, load, user, write
from utils import UserError


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_lines(tmp_path, name):
    rows = list(read_rows(write(tmp_path / name, [PAIR, PAIR])))
    assert [row.values for row in rows] == [PAIR, PAIR]
    assert [row.origin for row in rows] == [f"{tmp_path}/{name} line 1", f"{tmp_path}/{name} line 2"]


def test_a_json_list(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("\ufeff\n" + json.dumps([PAIR, PAIR], indent=1))
    assert [(row.values, row.origin) for row in read_rows(path)] == [(PAIR, f"{path} row 0"), (PAIR, f"{path} row 1")]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_values_of_an_array_are_those_of_json(monkeypatch, chunk):
    monkeypatch.setattr(json_arrays, "CHUNK_BYTES", chunk)
    values = [{"a": ["文字]", {"b": '\\"'}]}, 12, -1.5e-3, "[,]", None, True, [], {}, 10**40, "😀", 7]
    for text in (json.dumps(values, indent=1), json.dumps(values, ensure_ascii=False) + " \n", "[ ]", "[12]\n\n"):
        reader = json_arrays.ArrayReader(io.BytesIO(text.encode()[1:]), text.encode()[:1], 1000)
        assert list(reader.values()) == json.loads(text)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[1,\n 2, {"a" 1}]', 2, "is not JSON: Expecting ':' delimiter, column 10"),
        ("[1, 2", 1, "is not JSON: Expecting ',' delimiter, column 6"),
        ("[1,\n", 2, "is not JSON: Expecting value, column 1"),
        ("[1, 2 3]", 1, "is not JSON: Expecting ',' delimiter, column 7"),
        ("[1]\n\n x", 3, "is not JSON: Extra data, column 2"),
        ("[1,]", 1, "is not JSON: Expecting value, column 4"),
        ('["a"', 1, "is not JSON: Expecting ',' delimiter, column 5"),
        ('[\n"a', 2, "is not JSON: Unterminated string starting at, column 1"),
        ('[1,\n"' + "x" * 200 + '"]', 2, "starts a row of over 100 characters"),
        ("[1,\n" + "[" * 90_000, 2, "starts a row of over 100 characters"),
    ],
)
def test_broken_arrays(monkeypatch, text, line, problem, chunk):
    monkeypatch.setattr(json_arrays, "CHUNK_BYTES", chunk)
    with pytest.raises(json_arrays.ArrayError) as error:
        list(json_arrays.ArrayReader(io.BytesIO(text.encode()[1:]), b"[", 100).values())
    if "starts" in problem and chunk > 100_000:
        assert error.value.line == line and str(error.value).startswith((problem, "is not usable JSON: "))
    else:
        assert (error.value.line, str(error.value)) == (line, problem)


@pytest.mark.parametrize("before", ['["', "[[", '[{"a": 1}, ', '[{"a": 1}, {"b": "', "[" + " " * 50])
def test_an_array_bomb_is_read_with_little_memory(tmp_path, monkeypatch, before):
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 500_000)
    filler = b" " if before.endswith(" ") else b"[],"[: 3 if before == "[[" else 1]
    with gzip.open(tmp_path / "x.json.gz", "wb", compresslevel=1) as file:
        file.write(before.encode())
        for _ in range(30):
            file.write(filler * (1_000_000 // len(filler)))
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        list(read_rows(tmp_path / "x.json.gz"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.value.exit_status == 3 and f"{tmp_path}/x.json.gz line 1 " in str(error.value)
    assert peak < (100e6 if before == "[[" else 10e6)  # an empty list takes 64 bytes


def test_parquet(tmp_path, tokenizer):
    path = tmp_path / "x.parquet"
    row = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert [(row.values, row.origin) for row in read_rows(path)] == [(row, f"{path} row 0")]
    assert len(load(path, tokenizer)) == 1


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
def test_csv(tmp_path, tokenizer, name):
    text = '\ufeffprompt,chosen,rejected\r\n"say ""a, b""\nnow","a\n, b",\r\n\r\n5,x,y'.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert [(row.values, row.origin) for row in read_rows(path)] == [
        ({"prompt": 'say "a, b"\nnow', "chosen": "a\n, b", "rejected": ""}, f"{path} line 4"),
        ({"prompt": "5", "chosen": "x", "rejected": "y"}, f"{path} line 6"),
    ]
    assert len(load(path, tokenizer)) == 2


@pytest.mark.parametrize("new_writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow(tmp_path, new_writer):
    path = tmp_path / "x.arrow"
    table = pa.Table.from_pylist([PAIR] * 3)
    with new_writer(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert [(row.values, row.origin) for row in read_rows(path)] == [(PAIR, f"{path} row {i}") for i in range(3)]


def test_damaged_text_in_arrow_is_an_error(tmp_path):
    """Offsets beyond the end of the text would read other memory."""
    path = tmp_path / "x.arrow"
    table = pa.table({"a": ["x" * 12_345]})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    before, offset, after = path.read_bytes().rpartition((12_345).to_bytes(4, "little"))
    path.write_bytes(before + (2_000_000_000).to_bytes(4, "little") + after)
    assert offset
    with pytest.raises(UserError, match=r"x\.arrow cannot be read: "):
        list(read_rows(path))


def test_nulls_of_absent_fields_are_left_out(tmp_path):
    """Parquet has the same fields in all objects of a column."""
    call = {"name": "f", "arguments": {"a": 1}}
    other = {"name": "g", "arguments": {"b": "x"}}
    rows = [{"messages": [user("hi"), {**assistant(""), "tool_calls": [call, other]}], "system": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [row.values for row in read_rows(tmp_path / "x.parquet")] == rows


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_fields_of_several_types_are_read_like_the_library_datasets(tmp_path, suffix):
    rows = [{"messages": [user("hi")]}, {"messages": [user([{"type": "text", "text": "hi"}])]}]
    stored = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(stored.features)
    if suffix == "parquet":
        stored.to_parquet(tmp_path / "x.parquet")
        path = tmp_path / "x.parquet"
    else:
        stored.save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    assert [row.values for row in read_rows(path)] == rows


def test_a_parquet_bomb_is_data_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_PARQUET_BYTES", 2**30)
    path = tmp_path / "x.parquet"  # one text of 20 MB in each of 10,000 rows
    text = pa.array(["x" * 20_000_000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), text)
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    assert error.value.exit_status == 3
    assert str(error.value).startswith(f"error[DATA] {path} cannot be read: its rows need more than 1 GB of memory")


@pytest.mark.slow
def test_a_large_row_group_of_parquet_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_PARQUET_BYTES", 2**29)
    texts = [os.urandom(2**14).hex() for _ in range(2**13)]  # 256 MB in each column
    table = pa.table({"prompt": texts, "chosen": texts})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression="NONE", use_dictionary=False, data_page_size=2**16)
    assert pq.ParquetFile(path).num_row_groups == 1
    assert sum(1 for _ in read_rows(path)) == len(texts)


def test_long_rows_of_parquet_are_bad_rows(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["a", "x" * 17_000_000, "b"]}), path)
    errors: list = []
    assert [row.origin for row in read_rows(path, errors.append)] == [f"{path} row 0", f"{path} row 2"]
    assert "row 1 has 17,000," in errors[0].what


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
        ("x.txt", b"a,b", "x.txt: unknown kind of file; fix: use one of .json, "),
        ("x.csv", b"a,b\n1,2\n3\n", "x.csv line 3 has 1 fields, and the first line 2; fix: put fields with commas"),
        ("x.csv", b'a,b\n1,"2\n', "x.csv line 2 is not CSV: unexpected end of data; fix: "),
        ("x.csv", b"a,b\n1,\xff\n", "x.csv line 2 is not UTF-8; fix: "),
        ("x.csv", b"a,a\n1,2\n", "x.csv line 1 names a column twice; fix: "),
        ("x.csv", b"a\n" + b"x" * 2_000_001, "x.csv line 2 is not CSV: field larger than field limit (2000000)"),
        ("x.csv", b"a\n" + b"x" * 16_000_000, "x.csv line 2 has 16,000,000 bytes or more; fix: "),
        ("x.csv.gz", b"no gzip", "x.csv.gz cannot be read: "),
        ("x.arrow", b"no arrow", "x.arrow cannot be read: "),
        ("x.arrow", b"ARROW1 nothing", "x.arrow cannot be read: "),
    ],
)
def test_unreadable_files(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_rows(tmp_path / name))
    assert str(error.value).startswith(f"error[DATA] {tmp_path}/{problem}")
