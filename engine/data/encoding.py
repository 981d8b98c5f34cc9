"""Texts as token ids: each distinct text is encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.data.special_tokens import MARK, special_token_ids, special_token_marker
from utils import Progress, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_SIZE = 2048  # texts per call of the tokenizer


class Text(NamedTuple):
    from_template: bool  # written by a chat template, so its special tokens count
    text: str


@dataclass(frozen=True)
class EncodedTexts:
    """Distinct texts in one array, each as `prefix + text + EOS`.

    Prompts and responses are slices of it.
    """

    tokens: np.ndarray  # int32 [all tokens]
    lengths: np.ndarray  # int64 [texts]: tokens of each text, without prefix and EOS
    starts: np.ndarray  # int64 [texts]: position of each text in tokens, after its prefix
    prefix: list[int]  # tokens before any text: BOS or nothing

    @classmethod
    def from_lengths(cls, tokens: np.ndarray, lengths: np.ndarray, prefix: list[int]) -> "EncodedTexts":
        stored = lengths + len(prefix) + 1
        return cls(tokens, lengths, np.cumsum(stored) - stored + len(prefix), prefix)

    def prompt(self, index: int) -> np.ndarray:
        """int32 [prompt tokens], with one prefix, also if a chat template wrote it already."""
        start, end = self.starts[index], self.starts[index] + self.lengths[index]
        has_prefix = self.tokens[start : min(start + len(self.prefix), end)].tolist() == self.prefix
        return self.tokens[start if has_prefix else start - len(self.prefix) : end]

    def response(self, index: int) -> np.ndarray:
        """int32 [response tokens], with EOS."""
        return self.tokens[self.starts[index] : self.starts[index] + self.lengths[index] + 1]


def encode(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", *, show_progress: bool = True) -> EncodedTexts:
    """Encode texts.

    Special tokens count in text of a chat template, unless they are marked. Elsewhere they are plain text.
    """
    prefix, eos = token_prefix(tokenizer), eos_token_id(tokenizer)
    arrays: list[np.ndarray] = []
    lengths: list[int] = []
    with Progress("tokenizing", total=len(texts), unit="texts", is_shown=None if show_progress else False) as progress:
        for from_template, group in groupby(texts, key=lambda item: item.from_template):
            while chunk := [item.text for item in islice(group, CHUNK_SIZE)]:
                ids = encode_texts(chunk, tokenizer, parse_special_tokens=from_template)
                lengths.extend(map(len, ids))
                num_tokens = sum(map(len, ids)) + len(ids) * (len(prefix) + 1)
                stored = chain.from_iterable(chain(prefix, text_ids, (eos,)) for text_ids in ids)
                arrays.append(np.fromiter(stored, np.int32, num_tokens))
                progress.update(len(chunk))
    tokens = np.concatenate([np.empty(0, np.int32), *arrays])
    return EncodedTexts.from_lengths(tokens, np.array(lengths, np.int64), prefix)


def encode_texts(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", parse_special_tokens: bool
) -> list[list[int]]:
    """The ids of each text, without BOS and EOS.

    Marked texts are encoded in the pieces between their marks. Without parse_special_tokens the ids contain no special
    token, except the one for unknown text.
    """
    ids = _encode_pieces(texts, tokenizer, parse_special_tokens)
    if not parse_special_tokens:
        # Some vocabularies contain a special token as a word too: Unigram, or a learned BPE merge.
        special = special_token_ids(tokenizer)
        mark = special_token_marker(tokenizer)
        found = [i for i, one in enumerate(ids) if not special.isdisjoint(one) and mark(texts[i]) != texts[i]]
        if found and not any(MARK in texts[i] for i in found):
            marked = _encode_pieces([mark(texts[i]) for i in found], tokenizer, parse_special_tokens=False)
            for i, one in zip(found, marked, strict=True):
                ids[i] = one
    return ids


def _encode_pieces(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", parse_special_tokens: bool
) -> list[list[int]]:
    pieces = [piece for text in texts for piece in text.split(MARK)]
    ids: list[list[int]] = tokenizer(
        pieces,
        add_special_tokens=False,
        split_special_tokens=not parse_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    if len(pieces) == len(texts):
        return ids
    remaining = iter(ids)
    return [list(chain.from_iterable(islice(remaining, text.count(MARK) + 1))) for text in texts]


def token_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens the tokenizer puts before any text: mostly [BOS] or nothing. Tokens after the text are ignored."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next(full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare)


def eos_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the token at the end of every response.

    Raises:
        UserError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        fix = "set model.tokenizer_name_or_path to a tokenizer that has one"
        raise UserError("CONFIG", "the tokenizer has no end-of-text token, and every response must end with one", fix)
    return tokenizer.eos_token_id
