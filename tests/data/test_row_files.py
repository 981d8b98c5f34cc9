"""Files of rows: JSON, JSON lines, Parquet, gzipped or damaged."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
def test_unreadable_files(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_rows(tmp_path / name))
    assert str(error.value).startswith(f"error[DATA] {tmp_path}/{problem}")
