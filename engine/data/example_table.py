"""Tables of examples: columns over a token store. An example is made when it is read, and not kept."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from engine.data.dialogues import Turn
from utils import ContentHash, content_hash

if TYPE_CHECKING:
    from engine.data.encoding import EncodedTexts
    from engine.data.examples import Example

NUM_RESPONSES = {"sft": 1, "pairs": 2, "unpaired": 1}  # by batch kind: those that make a table
NO_LABEL = -1
# Types of the columns of integers. A prompt is its first num_front tokens and its last num_back.
COLUMNS: dict[str, type[np.signedinteger[Any]]] = {
    "prompt_start": np.int64,  # in the tokens of the store
    "prompt_length": np.int32,  # before truncation
    "num_front": np.int32,
    "num_back": np.int32,
    "prompt_index": np.int32,
    "label": np.int8,
    "prompt_hash": np.int64,  # of the truncated prompt
}
# Those that an earlier turn of a dialogue has too. Its prompt is the start of the prompt of the example.
TURN_COLUMNS = ("prompt_index", "prompt_hash", "start_0", "length_0", "weight")


@dataclass(frozen=True, eq=False)
class TurnTable:
    """Earlier turns of the examples of a table.

    Args:
        offsets: int64 [examples + 1], of the turns of each example, and the end.
        columns: one value a turn: those of TURN_COLUMNS, and num_prompt, the tokens of its prompt.
    """

    offsets: np.ndarray
    columns: Mapping[str, np.ndarray]


class ExampleTable(Sequence["Example"]):
    """Examples of one kind, as views of stored tokens.

    Args:
        columns: one value an example: COLUMNS, weight, start_N and length_N of response N, and perhaps
            mismatched_start and mismatched_length.
        tokens: of the store.
        make: the class Example.
        fingerprint: a hash of the content of all examples; None if it is not known.
        texts: the key of the store.
        turns: of dialogues; None if no example has any.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        tokens: np.ndarray,
        make: "type[Example]",
        fingerprint: str | None = None,
        texts: str = "",
        turns: TurnTable | None = None,
    ):
        self.columns, self.tokens, self.fingerprint, self._make = columns, tokens, fingerprint, make
        self.texts, self.turns = texts, turns
        self.num_responses = sum(name.startswith("start_") for name in columns)

    def __len__(self) -> int:
        return len(self.columns["prompt_start"])

    @overload
    def __getitem__(self, index: int) -> "Example": ...
    @overload
    def __getitem__(self, index: slice) -> "list[Example]": ...
    def __getitem__(self, index: int | slice) -> "Example | list[Example]":
        if isinstance(index, slice):
            return [self._example(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._example(index % len(self))

    def __iter__(self) -> "Iterator[Example]":
        return map(self._example, range(len(self)))

    def _example(self, index: int) -> "Example":
        columns = self.columns
        label = columns["label"].item(index)
        mismatched = None
        if "mismatched_start" in columns:
            mismatched = self._view(columns["mismatched_start"].item(index), columns["mismatched_length"].item(index))
        return self._make(
            prompt=self._prompt(index),
            responses=tuple(
                self._view(columns[f"start_{number}"].item(index), columns[f"length_{number}"].item(index))
                for number in range(self.num_responses)
            ),
            prompt_index=columns["prompt_index"].item(index),
            label=None if label == NO_LABEL else bool(label),
            weight=columns["weight"].item(index),
            mismatched=mismatched,
            turns=() if self.turns is None else self._turns(self.turns, index),
        )

    def _turns(self, table: TurnTable, index: int) -> tuple[Turn, ...]:
        columns = (table.columns[name] for name in ("num_prompt", "start_0", "length_0", "weight"))
        start, end = table.offsets[index : index + 2].tolist()
        rows = zip(*(column[start:end].tolist() for column in columns), strict=True)
        return tuple(Turn(num_prompt, self._view(place, length), weight) for num_prompt, place, length, weight in rows)

    def _prompt(self, index: int) -> np.ndarray:
        start, num_back = (self.columns[name].item(index) for name in ("prompt_start", "num_back"))
        front = self._view(start, self.columns["num_front"].item(index))
        if not num_back:
            return front
        return np.concatenate(
            [front, self._view(start + self.columns["prompt_length"].item(index) - num_back, num_back)]
        )

    def _view(self, start: int, length: int) -> np.ndarray:
        """int32 [length]. It is a copy if the store has smaller ids."""
        return self.tokens[start : start + length].astype(np.int32, copy=False)

    # ---- Columns derived from others ----

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int64 [examples], after truncation."""
        return self.columns["num_front"].astype(np.int64) + self.columns["num_back"]

    @property
    def response_lengths(self) -> list[np.ndarray]:
        """int32 [examples] for each response."""
        return [self.columns[f"length_{number}"] for number in range(self.num_responses)]

    def with_mismatched(self, others: np.ndarray, max_length: int) -> "ExampleTable":
        """The examples, each with the first response of another.

        Args:
            others: int64 [examples].
            max_length: of prompt + response; a longer response is truncated.
        """
        lengths = np.minimum(self.columns["length_0"][others], max_length - self.prompt_lengths).astype(np.int32)
        added = {"mismatched_start": self.columns["start_0"][others], "mismatched_length": lengths}
        return ExampleTable({**self.columns, **added}, self.tokens, self._make)


class TableBuilder:
    """Gathers the columns of a table.

    Args:
        encoded: the texts of the examples.
        num_responses: of each example.
        parts: an example -> the bytes that its hash covers.
    """

    def __init__(self, encoded: "EncodedTexts", num_responses: int, parts: "Callable[[Example], Iterator[bytes]]"):
        self._encoded, self._parts, self._hash = encoded, parts, ContentHash()
        self._integers, self._weights = array("q"), array("d")
        self._num_responses = num_responses
        self._earlier: dict[int, int] = {}  # row of a turn -> that of the turn before it

    def append(
        self,
        example: "Example",
        prompt_text: int,
        responses: Sequence[int],
        num_front: int,
        earlier: int | None = None,
    ) -> None:
        """Add an example.

        Args:
            prompt_text, responses: the numbers of its texts.
            num_front: tokens that a truncated prompt keeps of its start, at most.
            earlier: the number of an example added before. It becomes a turn of this one.
        """
        if earlier is not None:
            self._earlier[len(self._weights)] = earlier
        encoded, num_prompt = self._encoded, len(example.prompt)
        start, end = encoded.prompt_span(prompt_text)
        num_front = num_prompt if num_prompt == end - start else min(num_front, num_prompt)
        label = NO_LABEL if example.label is None else example.label
        values = (start, end - start, num_front, num_prompt - num_front, example.prompt_index, label)
        self._integers.extend((*values, prompt_hash(example.prompt)))  # in the order of COLUMNS
        for text, response in zip(responses, example.responses, strict=True):
            self._integers.extend((int(encoded.starts[text]), len(response)))
        self._weights.append(example.weight)
        self._hash.add_all(self._parts(example))

    def finish(self, make: "type[Example]") -> ExampleTable:
        types = COLUMNS | {
            f"{name}_{number}": dtype
            for number in range(self._num_responses)
            for name, dtype in (("start", np.int64), ("length", np.int32))
        }
        rows = np.frombuffer(self._integers, np.int64).reshape(-1, len(types))
        columns = {name: rows[:, place].astype(dtype) for place, (name, dtype) in enumerate(types.items())}
        columns["weight"] = np.array(self._weights)
        if not self._earlier:
            return ExampleTable(columns, self._encoded.tokens, make, self._hash.hexdigest(), self._encoded.key)
        columns, turns = self._join_turns(columns)
        joined = ExampleTable(columns, self._encoded.tokens, make, texts=self._encoded.key, turns=turns)
        joined.fingerprint = content_hash(part for example in joined for part in self._parts(example))
        return joined

    def _join_turns(self, columns: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], TurnTable]:
        """Divide rows into the last turns of dialogues, which are examples, and the turns before them."""
        is_last = np.ones(len(self._weights), bool)
        is_last[[*self._earlier.values()]] = False
        counts, turns = [], list[int]()
        for row in np.flatnonzero(is_last).tolist():
            before = []
            while (row := self._earlier.get(row, -1)) >= 0:
                before.append(row)
            counts.append(len(before))
            turns += reversed(before)
        of_turns = {name: columns[name][turns] for name in TURN_COLUMNS}
        of_turns["num_prompt"] = columns["num_front"][turns] + columns["num_back"][turns]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return {name: values[is_last] for name, values in columns.items()}, TurnTable(offsets, of_turns)


def prompt_hash(prompt: np.ndarray) -> int:
    """A hash of a prompt's tokens, 64 bits."""
    return int.from_bytes(blake2b(prompt.tobytes(), digest_size=8).digest(), "little", signed=True)


# ---- Columns of tables and of lists of examples ----


def of_all_turns(name: str, examples: "Sequence[Example]", of_examples: np.ndarray) -> np.ndarray:
    """A column of examples with that of their earlier turns.

    Args:
        of_examples: [examples].
    """
    if not isinstance(examples, ExampleTable) or examples.turns is None:
        return of_examples
    return np.concatenate([of_examples, examples.turns.columns[name]])


def prompt_indices(examples: "Sequence[Example]") -> np.ndarray:
    """int64 [examples]."""
    if isinstance(examples, ExampleTable):
        return examples.columns["prompt_index"].astype(np.int64)
    return np.fromiter((example.prompt_index for example in examples), np.int64, len(examples))


def prompt_hashes(examples: "Sequence[Example]") -> np.ndarray:
    """int64 [examples], of the truncated prompts."""
    if isinstance(examples, ExampleTable):
        return examples.columns["prompt_hash"]
    return np.fromiter((prompt_hash(example.prompt) for example in examples), np.int64, len(examples))


def labels_of(examples: "Sequence[Example]") -> "list[bool | None]":
    """Of unpaired responses; None for others."""
    if isinstance(examples, ExampleTable):
        return [None if label == NO_LABEL else bool(label) for label in examples.columns["label"].tolist()]
    return [example.label for example in examples]
