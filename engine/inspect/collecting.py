"""Collect the examples of each data set and split, as the trainer makes them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.data.examples import Observe, TokenizedExample
from engine.data.preferences import SplitName
from engine.data.rows import RowCounts
from engine.settings.schema import Settings
from utils import UserError, clipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from losses import BatchKind

# Loads one data set of settings; preference_datasets has it, and the engine does not import it.
Load = Callable[[Settings, SplitName, RowCounts, Observe], object]
# Names of an example's responses, by batch kind. A ranking has any number of responses; a prompt has none yet.
ROLES = {
    "sft": ("response",),
    "pairs": ("chosen", "rejected"),
    "unpaired": ("response",),
    "ranked": ("response",),
    "rollout": (),
}


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


class Compared(NamedTuple):
    """A pair of responses, or a single response.

    Args:
        indices: of the responses of its example, (chosen, rejected) or (response,).
    """

    split: DatasetSplit
    each: TokenizedExample
    indices: Sequence[int]

    @property
    def whole(self) -> list[np.ndarray]:
        """The responses before truncation."""
        return [self.each.responses[index] for index in self.indices]

    @property
    def trained(self) -> list[np.ndarray]:
        """The responses after truncation."""
        return [self.each.example.responses[index] for index in self.indices]


def pairs_of(each: TokenizedExample) -> Sequence[Sequence[int]]:
    """Indices of the compared responses; of a ranking, of each of its pairs."""
    comparisons = each.example.comparisons
    return [range(len(each.responses))] if comparisons is None else comparisons.pairs.tolist()


@dataclass
class Data:
    """All examples of an inspection.

    Args:
        batch: the kind of examples.
    """

    splits: list[DatasetSplit]
    tokenizer: "PreTrainedTokenizerBase"
    settings: Settings
    batch: "BatchKind"

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of an example's responses."""
        return ROLES[self.batch]

    @property
    def is_ranked(self) -> bool:
        """Examples are rankings, for a reward model."""
        return self.batch == "ranked"

    @property
    def has_responses(self) -> bool:
        """False for prompts whose responses are sampled in training."""
        return self.batch != "rollout"

    @property
    def has_pairs(self) -> bool:
        return self.batch in ("pairs", "ranked")

    @property
    def holds_out(self) -> bool:
        """Training of a reward model holds out prompts of train, as there is no test split."""
        return self.is_ranked and not any(each.split == "test" for each, _ in self.kept())

    @property
    def unit(self) -> str:
        """The name of what compared() gives."""
        return "pairs" if self.is_ranked else "examples"

    @property
    def num_rows(self) -> int:
        return sum(split.counts.rows for split in self.splits)

    def kept(self) -> Iterator[tuple[DatasetSplit, TokenizedExample]]:
        """Each example that is kept, with its split."""
        return ((split, each) for split in self.splits for each in split.kept)

    def compared(self) -> Iterator[Compared]:
        """Each pair of a ranking; of others, each example."""
        return (Compared(split, each, pair) for split, each in self.kept() for pair in pairs_of(each))


def collect(settings: Settings, tokenizer: "PreTrainedTokenizerBase", batch: "BatchKind", load: Load) -> Data:
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
    return Data(splits, tokenizer, settings, batch)


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
