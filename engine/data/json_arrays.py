"""Reads the values of a JSON array one at a time, with bounded memory."""

import codecs
import gzip
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

CHUNK_BYTES = 1 << 20
VALUE_END = re.compile(r"[ \t\r\n,\]]")
SPACE = re.compile(r"[ \t\r\n]+")


class ArrayError(Exception):
    """The array is unreadable; `line` is the place, counted from 1 at the start of the text."""

    def __init__(self, line: int, problem: str):
        self.line = line
        super().__init__(problem)


class ArrayReader:
    """Decodes a JSON array from a file in chunks; values are decoded by json, with its rules.

    Args:
        file: read from its position.
        start: bytes before that position; the array opens here.
        max_characters: of one value.
    """

    def __init__(self, file: BinaryIO | gzip.GzipFile, start: bytes, max_characters: int):
        self._file, self._max_characters = file, max_characters
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position = "", 0  # text read, and the part of it that is done
        self._line, self._column = 1, 0  # of the text's start
        self._is_complete = False
        self._add(start)

    def values(self) -> Iterator[object]:
        """Yield the values in order.

        Raises:
            ArrayError: if the text is not UTF-8, no array, or a value is too long.
        """
        self._next_character()
        self._position += 1  # the bracket
        if self._next_character() != "]":
            while True:
                yield self._value()
                if self._next_character() != ",":
                    break
                self._position += 1
                self._next_character()
        if self._next_character() != "]":
            raise self._error("is not JSON: Expecting ',' delimiter", self._position)
        self._position += 1
        if self._next_character():
            raise self._error("is not JSON: Extra data", self._position)

    def _value(self) -> object:
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
                problem, place = "is not JSON: Expecting ',' delimiter", end
                # The text may end inside a number: "1.5" of "1.5e3".
                if self._is_complete or VALUE_END.match(self._text, end):
                    if end - self._position > self._max_characters:
                        raise self._too_long()
                    self._position = end
                    return value
            except json.JSONDecodeError as error:  # or a value of which more must be read
                problem, place = f"is not JSON: {error.msg}", error.pos
            except (ValueError, RecursionError) as error:  # thousands of digits, or deep nesting
                raise self._error(f"is not usable JSON: {error}", self._position) from error
            if len(self._text) - self._position > self._max_characters:
                raise self._too_long()
            if self._is_complete:
                raise self._error(problem, place)
            self._read_more()

    def _next_character(self) -> str:
        """Skip white space; returns the character behind it, or "" at the end."""
        while True:
            space = SPACE.match(self._text, self._position)
            self._position = space.end() if space else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if self._is_complete:
                return ""
            self._read_more()

    def _read_more(self) -> None:
        """Double the text that is not done, or read a chunk."""
        lines = self._text.count("\n", 0, self._position)
        self._line += lines
        self._column = self._position - (self._text.rfind("\n", 0, self._position) + 1 if lines else -self._column)
        self._text, self._position = self._text[self._position :], 0
        self._add(self._file.read(max(CHUNK_BYTES, len(self._text))))

    def _add(self, data: bytes) -> None:
        try:
            self._is_complete = not data
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise ArrayError(line, "is not UTF-8") from error

    def _too_long(self) -> ArrayError:
        return ArrayError(self._line_at(self._position), f"starts a row of over {self._max_characters:,} characters")

    def _error(self, problem: str, place: int) -> ArrayError:
        start = self._text.rfind("\n", 0, place)
        column = place - start if start >= 0 else self._column + place + 1
        is_syntax = problem.startswith("is not JSON")
        return ArrayError(self._line_at(place), f"{problem}, column {column}" if is_syntax else problem)

    def _line_at(self, place: int) -> int:
        return self._line + self._text.count("\n", 0, place)
