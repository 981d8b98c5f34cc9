"""The file of scores: written beside its target, continued after a stop, moved there when complete."""

import fcntl
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from utils import UserError, write_atomically


class ScoreFile:
    """JSON lines in a hidden file beside the target, until finish(). A context manager.

    Rows are scored in batches. A stopped command continues at the start of a batch, so all sums have the same order and
    the file has the same bytes.

    Args:
        target: the file to write.
        identity: a hash of model, data and options.
        batch_size: rows scored together.

    Attributes:
        lines: the rows written so far, as objects.
    """

    def __init__(self, target: Path, identity: str, batch_size: int):
        self.target = target
        self.partial = target.with_name(f".{target.name}.partial")
        self.lines: list[dict[str, Any]] = []
        self._identity, self._batch_size = identity, batch_size
        self._file: TextIO | None = None

    def __enter__(self) -> "ScoreFile":
        with self._as_user_errors():
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "a", encoding="utf-8")
            try:
                self._open(self._file)
            except BaseException:
                self._file.close()
                raise
        if self.lines:
            print(f"continuing after {len(self.lines):,} rows of {self.partial}", flush=True)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with suppress(OSError):  # of unwritten lines; a full disk has raised before
            if self._file is not None:
                self._file.close()
        if kind is not None and self.lines:
            text = f"{len(self.lines):,} rows are scored; repeat the command to continue"
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)
        elif not self.lines:
            with suppress(OSError):
                self.partial.unlink()

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the lines of a batch."""
        with self._as_user_errors():
            self._write(lines)
        self.lines += lines

    def finish(self) -> None:
        """Write the target, and remove the partial file."""
        with self._as_user_errors():
            write_atomically(self.target, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
            self.partial.unlink()

    def _open(self, file: TextIO) -> None:
        """Read what a stopped command has written, and continue there."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem = f"to: another command writes {self.target}"
            raise UserError("CONFIG", problem, "wait for it, or give another file") from error
        except OSError:  # a file system without locks
            pass
        data = self.partial.read_bytes()
        self.lines, size = self._read(data[: data.rfind(b"\n") + 1])
        file.truncate(size)
        if size == 0:
            self._write([{"of": self._identity}])

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        assert self._file is not None
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()

    def _read(self, data: bytes) -> tuple[list[dict[str, Any]], int]:
        """The rows of complete batches in a partial file, and its size up to there.

        Raises:
            UserError: CONFIG, if the file is damaged, or of another model, other data or other options.
        """
        rows: list[dict[str, Any]] = []
        ends = [0]
        for number, text in enumerate(data.splitlines(keepends=True)):
            try:
                value = json.loads(text)
            except ValueError:  # also of bytes that are not UTF-8
                value = None
            is_row = isinstance(value, dict) and value.get("row") == number - 1
            if number > 0 and not is_row:
                problem = f"to: {self.partial} line {number + 1} is not a row of scores"
                raise UserError("CONFIG", problem, "remove this file, or give another one as to")
            if number == 0 and value != {"of": self._identity}:
                problem = f"to: {self.partial} is damaged, or of another model, other data or other options"
                raise UserError("CONFIG", problem, "remove this file, or give another one as to")
            ends.append(ends[-1] + len(text))
            rows += [value] if number > 0 else []
        kept = len(rows) - len(rows) % self._batch_size
        return rows[:kept], ends[kept + 1] if len(ends) > 1 else 0

    @contextmanager
    def _as_user_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_file = isinstance(error, FileExistsError)  # of mkdir
            reason = f"{self.target.parent} is not a folder" if is_file else error.strerror or error
            problem = f"to: {self.target} cannot be written ({reason})"
            raise UserError("STORAGE", problem, "make room, or give another file") from error
