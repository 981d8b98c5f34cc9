"""Rows of data sets: check each field on access, count rows, drop bad ones."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.data.special_tokens import MARK
from utils import UserError, clipped

# Longer texts are no dialogues, and a tokenizer would need minutes for them.
MAX_LINE_BYTES = 16_000_000
MAX_CHARACTERS = 2_000_000
LARGEST_FP32 = float(np.finfo(np.float32).max)
MALFORMED = "malformed"  # reason for dropping bad rows
MAX_PLACES = 3  # kept of the rows dropped for a reason


class BadRow(UserError):
    """An unreadable row, or one without the fields of its data set."""

    def __init__(self, what: str, remedy: str = "correct this row or remove it"):
        self.remedy = remedy
        super().__init__("DATA", what, f"{remedy}; on_bad_row=drop leaves out such rows")


@dataclass
class RowCounts:
    """Numbers of rows: read, and dropped by reason.

    Args:
        rows: number of rows read, dropped ones included.
        dropped: number of dropped rows by reason.
        on_bad_row: "error": a bad row ends the run; "drop": it is dropped.
        first_bad_row: the problem of the first bad row dropped.
        places: of the first rows dropped for each reason: file and line, or a piece of the prompt.
        sources: what the rows were read from, each with a hash; see read_sources.
        notices: lines printed about the rows.
    """

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    on_bad_row: str = "error"
    first_bad_row: str = ""
    places: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict, compare=False)
    notices: list[str] = field(default_factory=list, compare=False)

    def notify(self, line: str) -> None:
        """Print a line about the rows."""
        print(line, flush=True)
        self.notices.append(line)

    def drop(self, reason: str, place: str = "", number: int = 1) -> None:
        """Count dropped rows, or parts of a row."""
        self.dropped[reason] += number
        self._note(reason, place)

    def _note(self, reason: str, place: str) -> None:
        places = self.places.setdefault(reason, [])
        if place and len(places) < MAX_PLACES:
            places.append(place)

    def reject(self, error: BadRow) -> None:
        """Drop a bad row, or raise its error."""
        if self.on_bad_row == "error":
            raise error
        self.drop(MALFORMED, error.what)
        self.first_bad_row = self.first_bad_row or error.what

    @contextmanager
    def catch_bad_row(self) -> Iterator[None]:
        """Reject the row if the block raises BadRow."""
        try:
            yield
        except BadRow as error:
            self.reject(error)

    def add(self, other: "RowCounts") -> None:
        """Add other counts to these."""
        self.rows += other.rows
        self.dropped.update(other.dropped)
        self.first_bad_row = self.first_bad_row or other.first_bad_row
        self.sources.update(other.sources)
        for reason, places in other.places.items():
            for place in places:
                self._note(reason, place)


@dataclass(frozen=True)
class Row:
    """One row of a data set. Each access to a field checks its type.

    Args:
        values: fields by name.
        origin: file and line, for errors: "hh/train.jsonl line 17".
    """

    values: dict[str, Any]
    origin: str

    def text(self, name: str) -> str:
        return self.as_text(self.value(name), name)

    def number(self, name: str) -> float:
        return self.as_number(self.value(name), name)

    def column_number(self, name: str) -> float:
        """A field with a number, in CSV as text."""
        value = self.value(name)
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        return float(self.as_number(value, name))

    def weight(self) -> float | None:
        """The column `weight`, a number of at least 0. None for a row without it."""
        if "weight" not in self.values:
            return None
        weight = self.column_number("weight")
        if weight < 0:
            raise self.error("weight", f"is {weight:g}, below 0")
        return weight

    def margin(self) -> float:
        """The column `margin`, a number in the range of fp32."""
        margin = self.column_number("margin")
        if abs(margin) > LARGEST_FP32:
            raise self.error("margin", f"is {margin:g}, beyond the range of fp32")
        return margin

    def boolean(self, name: str) -> bool:
        """A field with true or false, 1 or 0; in CSV, these as text."""
        value = self.value(name)
        found = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(str(value).lower())
        if found is None:
            raise self.error(name, f"is {clipped(repr(value), 50)}, not true or false")
        return found

    def items(self, name: str) -> list[Any]:
        return self.as_list(self.value(name), name)

    def value(self, name: str) -> Any:
        """The field of this name, of any type."""
        if name not in self.values:
            raise self.error(name, "is missing")
        return self.values[name]

    # Below, `name` is a place in the row: "chosen[0].content".

    def as_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise self.wrong_type(value, name, "text")
        if MARK in value:
            raise self.error(name, "contains a NUL byte")
        if len(value) > MAX_CHARACTERS:
            raise self.error(name, f"has {len(value):,} characters, more than {MAX_CHARACTERS:,}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(name, "contains invalid characters (half a surrogate pair)") from None
        return value

    def as_number(self, value: Any, name: str) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.wrong_type(value, name, "a number")
        if not abs(value) < 1e300:  # integers may exceed every float
            raise self.error(name, "is too large" if abs(value) >= 1e300 else "is NaN")
        return value

    def as_list(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong_type(value, name, "a list")
        return value

    def member(self, value: Any, key: str, name: str) -> Any:
        """value[key]; the value must be an object with this key."""
        if not isinstance(value, dict):
            raise self.wrong_type(value, name, "an object")
        if key not in value:
            raise self.error(f"{name}.{key}", "is missing")
        return value[key]

    def wrong_type(self, value: Any, name: str, expected: str) -> BadRow:
        names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
        names |= {list: "a list", dict: "an object"}
        return self.error(name, f"is {names.get(type(value), type(value).__name__)}, not {expected}")

    def error(self, name: str, problem: str) -> BadRow:
        return BadRow(f"{self.origin}: field '{name}' {problem}")
