"""Rows of tables: CSV, Arrow, and what Parquet and Arrow add to a row."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from engine.data.rows import MAX_CHARACTERS, MAX_LINE_BYTES, BadRow, Row
from utils import UserError

if TYPE_CHECKING:
    import gzip

    import pyarrow

RejectRow = Callable[[BadRow], None]
ROWS_PER_BATCH = 1024


def csv_rows(path: Path, file: "BinaryIO | gzip.GzipFile", reject: RejectRow) -> Iterator[Row]:
    """Rows of comma-separated text, whose first line names the columns."""
    csv.field_size_limit(MAX_CHARACTERS)  # the default is too small for dialogues
    reader = csv.reader(_csv_lines(path, file), strict=True)
    columns: list[str] = []
    try:
        for values in reader:
            origin = f"{path} line {reader.line_num}"
            if not columns:
                columns = values
                if len(set(columns)) < len(columns):
                    raise UserError("DATA", f"{origin} names a column twice", "give each column another name")
            elif len(values) == len(columns):
                yield Row(dict(zip(columns, values, strict=True)), origin)
            elif values:  # not an empty line
                problem = f"{origin} has {len(values)} fields, and the first line {len(columns)}"
                reject(BadRow(problem, 'put fields with commas or line breaks in "quotes"'))
    except csv.Error as error:
        problem = f"{path} line {reader.line_num} is not CSV: {error}"
        raise UserError("DATA", problem, "correct the file, or write it as .jsonl") from error


def _csv_lines(path: Path, file: "BinaryIO | gzip.GzipFile") -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            problem = f"{path} line {number} has {MAX_LINE_BYTES:,} bytes or more"
            raise UserError("DATA", problem, "correct the file")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            problem = f"{path} line {number} is not UTF-8"
            raise UserError("DATA", problem, "write the file again as UTF-8") from error


def arrow_rows(path: Path) -> Iterator[Row]:
    """Rows of an Arrow file, a stream (as save_to_disk writes it) or a file with an index."""
    import pyarrow as pa

    index = 0
    try:
        with pa.memory_map(str(path)) as file:
            is_indexed = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pa.ipc.open_file(file) if is_indexed else pa.ipc.open_stream(file)
            decode = row_decoder(reader.schema)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_indexed else reader:
                batch.validate(full=True)  # else a damaged file could end the process
                for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                    for values in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                        yield Row(decode(values), f"{path} row {index}")
                        index += 1
    except UnicodeDecodeError as error:
        problem = f"{path}: text near row {index} is not UTF-8"
        raise UserError("DATA", problem, "write the file again from valid text") from error
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("DATA", f"{path} cannot be read: {error}", "check or replace the file") from error


def row_decoder(schema: "pyarrow.Schema") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function for each row of Parquet or Arrow, as the library datasets would read it.

    All objects of a column have the same fields there: those that an object lacks are null, and are left out. Objects
    with fields of several types are stored as JSON.
    """
    features = (schema.metadata or {}).get(b"huggingface", b"")
    if b'"Json"' not in features:
        return _without_nested_nulls
    from datasets import Features

    stored = Features.from_arrow_schema(schema)

    def decode(values: dict[str, Any]) -> dict[str, Any]:
        return _without_nested_nulls(stored.decode_example(values))

    return decode


def _without_nested_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
