"""Windows of token streams: the examples of pretraining.

A window of length L has L + 1 tokens. The first one is context alone: it is the last token of the window before. So
each token of a stream is predicted once, but the first. The last window of a stream may be shorter.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, overload

import numpy as np

from engine.data.examples import Example

NO_DOCUMENTS = np.empty(0, np.int64)


class TokenStream(NamedTuple):
    """Documents one after another.

    Args:
        name: of the data set.
        tokens: integers [tokens], may be memory-mapped.
        offsets: int64 [documents + 1], where each document begins, and the end.
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray


class Windows(Sequence[Example]):
    """The windows of streams, made when they are read.

    Args:
        length: tokens that a window feeds, at most.
        document_mask: documents of a window do not see each other. The first token of a document is not predicted then.

    Attributes:
        sizes: number of windows of each stream.
    """

    def __init__(self, streams: Sequence[TokenStream], length: int, *, document_mask: bool):
        self.streams, self.length, self._document_mask = streams, length, document_mask
        self.sizes = [max(0, -(-(len(stream.tokens) - 1) // length)) for stream in streams]
        self._ends = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        stream = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._window(self.streams[stream], index - int(self._ends[stream]), index)

    def first_of(self, stream: int) -> int:
        """The index of the first window of a stream."""
        return int(self._ends[stream])

    def _window(self, stream: TokenStream, number: int, index: int) -> Example:
        start = number * self.length
        tokens = stream.tokens[start : start + self.length + 1].astype(np.int32)
        documents = NO_DOCUMENTS
        if self._document_mask:
            begins = stream.offsets[:-1]
            first, end = np.searchsorted(begins, [start, start + len(tokens) - 1], side="right")
            documents = begins[first:end] - start
        return Example(tokens[:1], (tokens[1:],), index, documents=documents)


def num_targets(window: Example) -> int:
    """The number of predicted tokens of a window."""
    assert window.documents is not None
    return len(window.responses[0]) - len(window.documents)


def with_token_weights(windows: Sequence[Example]) -> list[Example]:
    """Windows with weights that make the mean of their summed losses a mean over their tokens."""
    weight = len(windows) / max(1, sum(map(num_targets, windows)))
    return [replace(window, weight=weight) for window in windows]
