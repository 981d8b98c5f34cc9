"""Collect the examples of each data set and split, as the trainer makes them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.data.examples import Observe, TokenizedExample
from engine.data.preferences import SplitName
from engine.data.rows import RowCounts
from engine.settings.schema import Settings
from utils import UserError, clipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Loads one data set of settings; preference_datasets has it, and the engine does not import it.
Load = Callable[[Settings, SplitName, RowCounts, Observe], object]
# Names of an example's responses, by batch kind.
ROLES = {"sft": ("response",), "pairs": ("chosen", "rejected"), "unpaired": ("response",)}


@dataclass
class DatasetSplit:
    """The examples of a data set in a split.

    Args:
        dataset: its short name.
        counts: rows read and dropped.
        examples: in order, also those dropped by tokenization.
    """

    dataset: str
    split: SplitName
    counts: RowCounts
    examples: list[TokenizedExample] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.split}"

    @property
    def kept(self) -> Iterator[TokenizedExample]:
        """The examples to train on, or to evaluate with."""
        return (each for each in self.examples if each.reason is None)

    @property
    def dropped(self) -> Counter[str]:
        return self.counts.dropped


@dataclass
class Data:
    """All examples of an inspection.

    Args:
        roles: names of an example's responses.
    """

    splits: list[DatasetSplit]
    tokenizer: "PreTrainedTokenizerBase"
    settings: Settings
    roles: tuple[str, ...]

    @property
    def is_pairs(self) -> bool:
        return len(self.roles) == 2

    @property
    def num_rows(self) -> int:
        return sum(split.counts.rows for split in self.splits)

    def kept(self) -> Iterator[tuple[DatasetSplit, TokenizedExample]]:
        """Each example that is kept, with its split."""
        return ((split, each) for split in self.splits for each in split.kept)


def collect(settings: Settings, tokenizer: "PreTrainedTokenizerBase", batch: str, load: Load) -> Data:
    """Load every data set by itself, so that each has its own counts.

    Raises:
        UserError: as in training.
    """
    splits: list[DatasetSplit] = []
    for name, short in zip(settings.datasets, short_names(settings.datasets), strict=True):
        one = settings.model_copy(update={"datasets": [name]})
        for split in ("train", "test"):
            part = DatasetSplit(short, split, RowCounts(on_bad_row=settings.on_bad_row))
            load(one, part.split, part.counts, part.examples.append)
            if part.examples or part.counts.rows:
                splits.append(part)
    if not any(each.reason is None for part in splits for each in part.examples):
        raise UserError("DATA", f"datasets: {', '.join(settings.datasets)} give no example", "add rows")
    return Data(splits, tokenizer, settings, ROLES[batch])


def short_names(datasets: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where two would be equal."""
    names = [clipped(Path(name).name, 30) for name in datasets]
    return [name if names.count(name) == 1 else whole for name, whole in zip(names, datasets, strict=True)]


def place_of(split: DatasetSplit, example: TokenizedExample, length: int = 70) -> str:
    """An example's data set and split, and the end of its prompt."""
    return f"{split.name}: {quoted_end(example.prompt_text.text, length)}"


def quoted_end(text: str, length: int = 70) -> str:
    """The end of a text in quotes: the end of a prompt differs more than its start."""
    text = text.strip()
    return repr(text) if len(text) <= length else f"...{text[-length:]!r}"


def key_of(arrays: Iterable[np.ndarray]) -> bytes:
    """A hash of the content of arrays, to compare by; lengths keep their borders apart."""
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(len(array).to_bytes(4, "little"))
        digest.update(array.tobytes())
    return digest.digest()
