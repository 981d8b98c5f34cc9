"""What an inspection reports: findings, tables, histograms, and the limits of its checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Pairs with at least this similarity are reported: at most a fifth of their tokens is edited.
MIN_SIMILARITY = 0.8
# Longer chosen responses are reported outside of this range of shares, from this number of pairs on.
USUAL_LONGER_SHARE = (0.35, 0.65)
MIN_PAIRS_FOR_LENGTH = 20
# Truncated prompts are reported from this share of examples on.
MAX_TRUNCATED_PROMPTS = 0.05
# Near-duplicate prompts share at least this part of their pieces of SHINGLE_TOKENS tokens (Jaccard index).
MIN_JACCARD = 0.8
SHINGLE_TOKENS = 5
# Pieces in more prompts than this share, and this number, are a system prompt or another frame, and do not count.
MAX_PIECE_SHARE, MAX_PIECE_PROMPTS = 0.1, 10
MAX_ROWS_FOR_NEAR_DUPLICATES = 50_000
# Overlap with a benchmark: equal pieces of so many words, as in the GPT-3 paper, arXiv 2005.14165, appendix C.
NGRAM_WORDS = 13

MAX_PLACES = 3  # shown of a finding


@dataclass(frozen=True)
class Finding:
    """A defect of the data.

    Args:
        check: its name, as in docs/inspect.md.
        number: of affected rows, pairs or prompts.
        total: how many were checked.
        unit: their name, in the plural.
        meaning: what it does to training, and a fix.
        places: of the first few.
    """

    check: str
    number: int
    total: int
    unit: str
    meaning: str
    places: Sequence[str] = ()

    @property
    def headline(self) -> str:
        share = f" ({format_share(self.number, self.total)})" if self.total else ""
        return f"{self.number:,} of {self.total:,} {self.unit}{share}"


@dataclass(frozen=True)
class Histogram:
    """Numbers to draw.

    Args:
        title: of the chart.
        unit: of the values.
        values: [values]; those above the 99th percentile are left out.
        mark: (name, value) to draw a line at, such as a limit.
    """

    title: str
    unit: str
    values: np.ndarray
    mark: tuple[str, float] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of text below a header; the first column is left-aligned, the others right-aligned.

    Args:
        has_bars: the last column is a histogram in characters, for a terminal.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_bars: bool = False

    @property
    def without_bars(self) -> "Table":
        return Table(self.header[:-1], [row[:-1] for row in self.rows]) if self.has_bars else self


@dataclass
class Section:
    """A part of the report."""

    title: str
    table: Table | None = None
    notes: list[str] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)


def format_share(number: float, total: float) -> str:
    """A share in percent, with enough digits to differ from 0 and 100."""
    if not total:
        return "-"
    share = number / total
    for digits in (0, 1, 2):
        text = f"{share:.{digits}%}"
        if share in (0, 1) or (float(text[:-1]) not in (0, 100) and (digits or 0.1 <= share <= 0.9)):
            return text
    return "<0.01%" if share < 0.5 else ">99.99%"
