"""An example token by token: the ids of its microbatch, and whether they are trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.data.special_tokens import special_token_ids
from engine.inspect.collecting import Data, DatasetSplit
from engine.step.layout import lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE, NEWLINE, TAB = "·", "↵", "→"


class TokenTexts:
    """The text of each token of a tokenizer, with visible white space and without control characters."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._plain: dict[int, str] = {}
        self.special = special_token_ids(tokenizer)
        self.end_of_text = tokenizer.eos_token_id

    def plain(self, token: int) -> str:
        """The text itself; of a part of a character, the vocabulary's name for it."""
        if token not in self._plain:
            piece = self._tokenizer.convert_ids_to_tokens(token)
            text = piece if token in self.special else self._tokenizer.decode([token])
            if "�" in text or not text:
                text = _bytes_of(piece)
            elif piece.startswith("▁") and not text.startswith(" "):  # SentencePiece drops a space at the start
                text = " " + text
            self._plain[token] = text
        return self._plain[token]

    def __getitem__(self, token: int) -> str:
        text = self.plain(token).replace(" ", SPACE).replace("\n", NEWLINE).replace("\t", TAB)
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _bytes_of(piece: str) -> str:
    """A piece of a byte-level vocabulary as bytes in hexadecimal; another piece as it is."""
    values = {char: value for value, char in bytes_to_unicode().items()}
    return "".join(f"\\x{values[char]:02x}" for char in piece) if set(piece) <= values.keys() else piece


@dataclass(frozen=True)
class Token:
    id: int
    text: str
    is_special: bool


@dataclass(frozen=True)
class Part:
    """A prompt or a response of an example.

    Args:
        role: prompt, chosen, rejected or response.
        is_trained: whether its tokens are targets of the loss.
        num_cut: tokens lost by truncation.
    """

    role: str
    tokens: list[Token]
    is_trained: bool
    num_cut: int


@dataclass(frozen=True)
class ExampleTokens:
    """An example as the model gets it."""

    title: str
    parts: list[Part]


def choose_examples(data: Data, number: int) -> Iterator[ExampleTokens]:
    """Some examples of train at random, by the seed, each laid out as a microbatch."""
    items = [item for item in data.kept() if item[0].split == "train"]
    order = np.random.default_rng(data.settings.seed).permutation(len(items))[:number]
    texts = TokenTexts(data.tokenizer)
    for index in sorted(order.tolist()):
        split, each = items[index]
        batch = lay_out([each.example], data.settings.batching, data.tokenizer.pad_token_id)
        # The last token of the prompt predicts the first target.
        prompt = batch.input_ids[0, : int(batch.predict_index[0]) + 1].tolist()
        targets = batch.targets.split(batch.response_lengths.tolist())
        label = {None: "", True: ", desirable", False: ", undesirable"}[each.example.label]
        parts = [_part("prompt", prompt, texts, len(each.prompt), is_trained=False)]
        for role, indices, whole in zip(data.roles, (batch.chosen, batch.rejected), each.responses, strict=False):
            assert indices is not None
            parts.append(_part(role + label, targets[int(indices[0])].tolist(), texts, len(whole), is_trained=True))
        yield ExampleTokens(_title(split, index), parts)


def _title(split: DatasetSplit, index: int) -> str:
    return f"{split.name}, example {index:,} of train"


def _part(role: str, ids: list[int], texts: TokenTexts, num_whole: int, *, is_trained: bool) -> Part:
    tokens = [Token(token, texts[token], token in texts.special) for token in ids]
    return Part(role, tokens, is_trained, num_whole - len(ids))
