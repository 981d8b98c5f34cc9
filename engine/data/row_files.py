"""Rows of files: read JSON, JSON lines, CSV, Parquet and Arrow, plain or gzipped."""

import base64
import gzip
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from engine.data.json_arrays import ArrayError, ArrayReader
from engine.data.rows import MAX_LINE_BYTES, BadRow, Row
from engine.data.table_files import RejectRow, arrow_rows, csv_rows, row_decoder
from utils import UserError

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".arrow")

PARQUET_WORKER = Path(__file__).with_name("parquet_worker.py")
MAX_PARQUET_BYTES = 4 * 2**30  # memory of the child that reads Parquet


def raise_error(error: BadRow) -> None:
    raise error


def read_rows(path: Path, reject: RejectRow = raise_error) -> Iterator[Row]:
    """Read the rows of a file in order.

    JSON is a list of objects, or one object per line, whatever the suffix. Lines are counted from 1, rows from 0.

    Args:
        path: a file with one of SUFFIXES.
        reject: called for each unreadable row; if it returns, the row is left out.

    Raises:
        UserError: with file and line, if the file or a row is unreadable.
    """
    if path.exists() and not path.is_file():
        raise UserError("DATA", f"{path} is not a file", "give a file, or a folder with a file train.*")
    if not path.name.endswith(SUFFIXES):
        raise UserError("DATA", f"{path}: unknown kind of file", f"use one of {', '.join(SUFFIXES)}")
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path, reject)
        elif path.name.endswith(".arrow"):
            yield from arrow_rows(path)
        else:
            read = csv_rows if path.name.endswith((".csv", ".csv.gz")) else _json_rows
            with open(path, "rb") as file:
                yield from read(path, gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file, reject)
    except (OSError, EOFError, zlib.error) as error:  # permissions, or a damaged or truncated gzip file
        raise UserError("DATA", f"{path} cannot be read: {error}", "check or replace the file") from error


def _json_rows(path: Path, file: BinaryIO | gzip.GzipFile, reject: RejectRow) -> Iterator[Row]:
    is_first, number = True, 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        text = line.strip(b" \t\r\n\xef\xbb\xbf")
        if is_first and text.startswith(b"["):
            yield from _array_rows(path, file, line, number, reject)
            return
        try:
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                size = len(line) + _skip_line(file)
                raise BadRow(f"{path} line {number} has {size:,} bytes, more than {MAX_LINE_BYTES:,}")
            if text:
                yield _as_row(_parse_json(line, path, number), f"{path} line {number}")
        except BadRow as error:
            reject(error)
        is_first = is_first and not text


def _skip_line(file: BinaryIO | gzip.GzipFile) -> int:
    """Read to the end of the line; returns its number of bytes."""
    size = 0
    while line := file.readline(MAX_LINE_BYTES):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def _array_rows(
    path: Path, file: BinaryIO | gzip.GzipFile, start: bytes, first_line: int, reject: RejectRow
) -> Iterator[Row]:
    """Read the rows of an array that opens in `start`; one broken row makes the rest unreadable."""
    try:
        for index, value in enumerate(ArrayReader(file, start, MAX_LINE_BYTES).values()):
            try:
                yield _as_row(value, f"{path} row {index}")
            except BadRow as error:
                reject(error)
    except ArrayError as error:
        problem = f"{path} line {first_line + error.line - 1} {error}"
        raise UserError("DATA", problem, "correct the file, or write it as .jsonl, one row per line") from error


def _parse_json(data: bytes, path: Path, first_line: int) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, problem = first_line + data.count(b"\n", 0, error.start), "is not UTF-8"
    except json.JSONDecodeError as error:
        line, problem = first_line + error.lineno - 1, f"is not JSON: {error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or deep nesting
        line, problem = first_line, f"is not usable JSON: {error}"
    raise BadRow(f"{path} line {line} {problem}", "correct this line or remove it")


def _parquet_rows(path: Path, reject: RejectRow) -> Iterator[Row]:
    """Read Parquet in a child process: pages of a small file may unpack to any size."""
    import pyarrow.ipc

    # -P: modules beside the worker have names of the standard library. Other allocators reserve addresses.
    command = [sys.executable, "-P", str(PARQUET_WORKER), str(path), str(MAX_PARQUET_BYTES)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    index, kind, content = 0, "", ""
    decode: Callable[[dict[str, Any]], dict[str, Any]] = dict
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                kind, content = json.loads(line)
                if kind == "schema":
                    decode = row_decoder(pyarrow.ipc.read_schema(pyarrow.py_buffer(base64.b64decode(content))))
                elif kind == "row" and len(line) <= MAX_LINE_BYTES:
                    yield _as_row(decode(content), f"{path} row {index}")
                elif kind == "row":
                    reject(BadRow(f"{path} row {index} has {len(line):,} bytes, more than {MAX_LINE_BYTES:,}"))
                index += kind == "row"
        finally:
            child.kill()
    if kind == "not UTF-8":
        problem = f"{path}: text near row {index} is not UTF-8"
        raise UserError("DATA", problem, "write the file again from valid text")
    if kind != "end":
        reason = content if kind == "unreadable" else "its reader ended; the file is damaged, or needs too much memory"
        raise UserError("DATA", f"{path} cannot be read: {reason}", "check or replace the file")


def _as_row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise BadRow(f"{origin} is not an object", 'write each row as {"field": value, ...}')
    return Row(value, origin)
