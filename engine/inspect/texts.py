"""Checks of texts: literal special tokens, and overlap with a benchmark."""

import re
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from engine.data.encoding import Text
from engine.data.row_files import SUFFIXES, read_rows
from engine.data.special_tokens import MARK
from engine.inspect.collecting import Data, place_of
from engine.inspect.findings import MAX_PLACES, NGRAM_WORDS, Finding
from utils import UserError, clipped

WORD = re.compile(r"\w+")
# A run of numbers is hashed as its weighted sum, modulo 2^64.
WEIGHTS = np.random.default_rng(0).integers(1, 2**64 - 1, NGRAM_WORDS, np.uint64)


# ---- Special tokens ----


def literal_special_tokens(data: Data) -> Iterator[Finding]:
    """Examples with special tokens in their text, learned as plain text.

    In text of a chat template, the trainer marks those of a message; the template's own count.
    """
    special = sorted({token for token in data.tokenizer.all_special_tokens if token.strip()} | _added(data))
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    number, total = 0, 0
    places: list[str] = []
    is_special: dict[Text, str | None] = {}
    for split, each in data.kept():
        total += 1
        for text in (each.prompt_text, *each.response_texts):
            if text not in is_special:
                is_special[text] = _literal_token(text, pattern) if special else None
            if is_special[text] is not None:
                number += 1
                if len(places) < MAX_PLACES:
                    places.append(f"{is_special[text]!r} in {place_of(split, each)}")
                break
    if number:
        meaning = (
            "The letters are learned as plain text, never as the token. If they are markup of a chat template, give"
            " the rows as messages. Else remove them."
        )
        yield Finding("literal special tokens", number, total, "examples", meaning, places)


def _added(data: Data) -> set[str]:
    return {token.content for token in data.tokenizer.added_tokens_decoder.values() if token.special}


def _literal_token(text: Text, pattern: re.Pattern[str]) -> str | None:
    """A special token that is plain text here."""
    if text.from_template:  # the mark stands behind the token's first character
        start = text.text.find(MARK) - 1
        found = pattern.match(text.text[start:].replace(MARK, "")) if start >= 0 else None
    else:
        found = pattern.search(text.text)
    return found[0] if found else None


# ---- Overlap with a benchmark ----


def contamination(data: Data, path: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Examples that share a run of NGRAM_WORDS words with a benchmark.

    Words are lowercase, without punctuation, as in the GPT-3 paper (arXiv 2005.14165, appendix C).

    Raises:
        UserError: DATA, if the file cannot be read or has no text long enough.
    """
    if path is None:
        return
    items = [*benchmark_texts(path)]
    wanted = {runs for item in items for runs in word_runs(item)}
    num_short = sum(len(WORD.findall(item)) < NGRAM_WORDS for item in items)
    if not wanted:
        problem = f"contamination: {path} has no text of {NGRAM_WORDS} words or more"
        raise UserError("DATA", problem, "give a file with longer texts")
    notes.append(f"contamination: {len(items):,} texts of {path}, {num_short:,} of them too short to compare")
    index = RunIndex(wanted)
    by_text: dict[str, str | None] = {}
    number, total = 0, 0
    places: list[str] = []
    for split, each in data.kept():
        total += 1
        for text in (each.prompt_text, *each.response_texts):
            if text.text not in by_text:
                by_text[text.text] = index.find(text.text)
            if by_text[text.text] is not None:
                number += 1
                if len(places) < MAX_PLACES:
                    places.append(f"{split.name}: {clipped(by_text[text.text] or '', 90)!r}")
                break
    if number:
        meaning = f"Scores on this benchmark are too good. Remove these rows. Overlap: {NGRAM_WORDS} equal words."
        yield Finding("contamination", number, total, "examples", meaning, places)


def benchmark_texts(path: Path) -> Iterator[str]:
    """All texts of a file of rows, or the paragraphs of a text file."""
    if path.name.endswith(SUFFIXES):
        for row in read_rows(path):
            yield from _texts_in(row.values)
        return
    try:
        yield from re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        fix = f"give a UTF-8 text, or one of {', '.join(SUFFIXES)}"
        raise UserError("DATA", f"contamination: {path} cannot be read ({error})", fix) from error


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def word_runs(text: str) -> Iterator[str]:
    """Each run of NGRAM_WORDS words."""
    words = WORD.findall(text.lower())
    for start in range(len(words) - NGRAM_WORDS + 1):
        yield " ".join(words[start : start + NGRAM_WORDS])


class RunIndex:
    """Finds runs of words in texts, by numbers first and by words then.

    Args:
        runs: to find.
    """

    def __init__(self, runs: set[str]):
        self._runs = runs
        self._numbers = {word: number + 1 for number, word in enumerate({w for run in runs for w in run.split(" ")})}
        self._hashes = np.unique(np.concatenate([self._hash(run.split(" ")) for run in runs]))

    def _hash(self, words: list[str]) -> np.ndarray:
        """uint64 [runs] of consecutive words; 0 for runs with a word that no wanted run has."""
        known = map(self._numbers.get, words, repeat(0))
        runs = sliding_window_view(np.fromiter(known, np.uint64, len(words)), NGRAM_WORDS)
        return np.where(runs.all(axis=1), (runs * WEIGHTS).sum(axis=1), np.uint64(0))

    def find(self, text: str) -> str | None:
        """The first wanted run of a text."""
        words = WORD.findall(text.lower())
        if len(words) < NGRAM_WORDS:
            return None
        hashes = self._hash(words)
        nearest = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        (starts,) = np.nonzero(self._hashes[nearest] == hashes)
        runs = (" ".join(words[start : start + NGRAM_WORDS]) for start in starts)
        return next((run for run in runs if run in self._runs), None)
