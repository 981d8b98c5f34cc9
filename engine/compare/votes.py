"""Votes as a preference file, and their win rate."""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.chat import Message
from engine.data.rows import Row
from engine.judges.win_rates import Estimate, wilson_interval
from utils import UserError, fsync

if TYPE_CHECKING:
    from engine.data.chat import Chat

MODEL, AGAINST, TIE, BOTH_BAD = "model", "against", "tie", "both bad"  # values of the column vote


# ---- The win rate ----


@dataclass(frozen=True)
class Tally:
    """Numbers of votes, seen from one of two models."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    both_bad: int = 0

    @property
    def num_votes(self) -> int:
        return self.wins + self.losses + self.ties + self.both_bad

    @property
    def win_rate(self) -> Estimate:
        """The share of wins; a tie counts as half, and so does both bad. Needs a vote."""
        return wilson_interval(self.wins, self.ties + self.both_bad, self.losses)


def count_votes(rows: Iterable[Mapping[str, Any]], model: str, against: str) -> Tally:
    """Count the votes on two models, in either order; other rows are left out."""
    counts = dict.fromkeys((MODEL, AGAINST, TIE, BOTH_BAD), 0)
    swapped = {MODEL: AGAINST, AGAINST: MODEL}
    for row in rows:
        vote, names = row.get("vote"), (row.get("model"), row.get("against"))
        if vote in counts and names == (model, against):
            counts[vote] += 1
        elif vote in counts and names == (against, model):
            counts[swapped.get(vote, vote)] += 1
    return Tally(counts[MODEL], counts[AGAINST], counts[TIE], counts[BOTH_BAD])


# ---- Rows ----


def preference_columns(
    chat: "Chat", messages: list[Message], responses: Sequence[str]
) -> tuple[str | list[Message], list[Any]]:
    """A prompt and its responses as columns of a row: messages, or text in the format of HH.

    A tokenizer without a chat template could not train on messages.
    """
    turns: list[Message] = [{"role": "assistant", "content": text} for text in responses]
    if chat.is_template:
        return messages, [[turn] for turn in turns]
    prompt, texts = chat.render(Row({}, "the vote"), messages, turns)
    return prompt, list(texts)


def check_rows(votes: "VoteFile", has_messages: bool) -> None:
    """Refuse a file with prompts of another kind: a file has one form.

    Args:
        has_messages: whether new rows have messages, not text.

    Raises:
        UserError: CONFIG.
    """
    prompts = [row["prompt"] for row in votes.rows if "prompt" in row]
    if any(isinstance(prompt, str) == has_messages for prompt in prompts):
        kinds = ("text", "messages") if has_messages else ("messages", "text")
        problem = f"votes: {votes.path} has prompts of {kinds[0]}, and this model's are {kinds[1]}"
        raise UserError("CONFIG", problem, "give another file")


# ---- The file ----


class VoteFile:
    """JSON lines of preferences, appended by one command at a time.

    Args:
        path: created if it does not exist.

    Attributes:
        rows: all rows of the file.

    Raises:
        UserError: CONFIG, if another command writes the file; DATA, if it has other contents; STORAGE.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.suffix != ".jsonl":
            raise UserError("CONFIG", f"votes: {path} is not named *.jsonl", "give a name such as votes.jsonl")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fsync(path.absolute().parent)
        except OSError as error:
            problem = f"votes: {path} cannot be opened ({error.strerror})"
            raise UserError("STORAGE", problem, "give another file") from error
        try:
            self._lock()
            self.rows = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, whole or not at all. It is on the disk on return."""
        try:
            self._write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            problem = f"votes: {self.path} cannot be written ({error.strerror})"
            raise UserError("STORAGE", problem, "make room, and vote again") from error
        self.rows.append(dict(row))

    def close(self) -> None:
        """Close the file; without a row it is removed."""
        if os.fstat(self._file).st_size == 0:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem = f"votes: another command writes {self.path}"
            raise UserError("CONFIG", problem, "end it, or give another file") from error
        except OSError:  # a file system without locks
            pass

    def _read(self) -> list[dict[str, Any]]:
        """The rows. The beginning of a line, left by a crash, is cut off."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if data[end:].strip():
            try:
                json.loads(data[end:])
                self._write(b"\n")
            except ValueError:
                os.ftruncate(self._file, end)
                print(f"votes: an incomplete last line of {self.path} is cut off", file=sys.stderr)
                data = data[:end]
        rows = []
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                rows.append(self._parse(line, number))
        return rows

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:  # also of bytes that are not UTF-8
            row = None
        if not isinstance(row, dict):
            problem = f"votes: {self.path} line {number} is not a JSON object"
            raise UserError("DATA", problem, "correct the line, or give another file")
        return row

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise
