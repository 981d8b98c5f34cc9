"""Texts as token ids: each distinct text is encoded once."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.data.special_tokens import MARK, special_token_ids, special_token_marker
from engine.data.tokenizer_processes import Encoded, Request, encode_in_processes, is_plain, num_processes
from utils import Progress, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_SIZE = 2048  # texts per call of the tokenizer
MIN_PROCESS_TEXTS = 16_384  # fewer are encoded before other processes have started


class Text(NamedTuple):
    from_template: bool  # written by a chat template, so its special tokens count
    text: str


@dataclass(frozen=True)
class EncodedTexts:
    """Distinct texts in one array, each as `prefix + text + EOS`.

    Prompts and responses are slices of it.
    """

    tokens: np.ndarray  # int32, or that of a token store [all tokens]
    lengths: np.ndarray  # int64 [texts]: tokens of each text, without prefix and EOS
    starts: np.ndarray  # int64 [texts]: position of each text in tokens, after its prefix
    prefix: list[int]  # tokens before any text: BOS or nothing
    key: str = ""  # of their store

    @classmethod
    def from_lengths(cls, tokens: np.ndarray, lengths: np.ndarray, prefix: list[int]) -> "EncodedTexts":
        stored = lengths + len(prefix) + 1
        return cls(tokens, lengths, np.cumsum(stored) - stored + len(prefix), prefix)

    def prompt_span(self, index: int) -> tuple[int, int]:
        """Start and end of a prompt in tokens, with one prefix, also if a chat template wrote it already."""
        start = int(self.starts[index])
        end = start + int(self.lengths[index])
        has_prefix = self.tokens[start : min(start + len(self.prefix), end)].tolist() == self.prefix
        return (start if has_prefix else start - len(self.prefix)), end

    def prompt(self, index: int) -> np.ndarray:
        """int32 [prompt tokens], with its prefix."""
        start, end = self.prompt_span(index)
        return self.tokens[start:end].astype(np.int32, copy=False)

    def response(self, index: int) -> np.ndarray:
        """int32 [response tokens], with EOS."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index] + 1].astype(np.int32, copy=False)


def encode(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", *, show_progress: bool = True) -> EncodedTexts:
    """Encode texts.

    Special tokens count in text of a chat template, unless they are marked. Elsewhere they are plain text.
    """
    prefix = token_prefix(tokenizer)
    tokens, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    with Progress("tokenizing", total=len(texts), unit="texts", is_shown=None if show_progress else False) as progress:
        for chunk_tokens, chunk_lengths in encode_chunks(texts, tokenizer):
            tokens.append(chunk_tokens)
            lengths.append(chunk_lengths)
            progress.update(len(chunk_lengths))
    return EncodedTexts.from_lengths(np.concatenate(tokens), np.concatenate(lengths), prefix)


def encode_chunks(
    texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode texts in pieces: yields `prefix + text + EOS` of all texts of a piece, and the lengths of the bare texts.

    Many texts are encoded in several processes.
    """
    prefix, eos = token_prefix(tokenizer), eos_token_id(tokenizer)
    uses_processes = len(texts) >= MIN_PROCESS_TEXTS
    for tokens, lengths in encode_pieces(_chunks(texts), tokenizer, uses_processes):
        yield with_ends(tokens, lengths, prefix, eos), lengths


def encode_pieces(
    pieces: Iterable[Request], tokenizer: "PreTrainedTokenizerBase", uses_processes: bool
) -> Iterator[Encoded]:
    """The ids of the texts of each piece, in order, without BOS and EOS, as encode_texts gives them.

    Args:
        uses_processes: encode in one process for each core. They take a moment to start.
    """
    if uses_processes and num_processes() > 1 and is_plain(tokenizer):
        yield from _encode_in_processes(pieces, tokenizer)
    else:
        yield from (_joined(encode_texts(texts, tokenizer, is_template)) for texts, is_template in pieces)


def _joined(ids: list[list[int]]) -> Encoded:
    tokens = np.fromiter(chain.from_iterable(ids), np.int32, sum(map(len, ids)))
    return tokens, np.array(list(map(len, ids)), np.int64)


def _chunks(texts: Sequence[Text]) -> Iterator[tuple[list[str], bool]]:
    """Pieces of texts, and whether a template wrote them."""
    for from_template, group in groupby(texts, key=lambda item: item.from_template):
        while chunk := [item.text for item in islice(group, CHUNK_SIZE)]:
            yield chunk, from_template


def _encode_in_processes(pieces: Iterable[Request], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Encoded]:
    """encode_pieces() by other processes."""
    special = np.array(sorted(special_token_ids(tokenizer)), np.int32)
    asked = deque[Request]()

    def requests() -> Iterator[Request]:
        for texts, is_template in pieces:
            asked.append((texts, is_template))
            yield [part for text in texts for part in text.split(MARK)], is_template

    for tokens, lengths in encode_in_processes(requests(), tokenizer):
        texts, is_template = asked.popleft()
        if not is_template and np.isin(tokens, special).any():  # a rare word of the vocabulary
            tokens, lengths = _joined(encode_texts(texts, tokenizer, is_template))
        elif len(lengths) > len(texts):
            num_parts = np.array([text.count(MARK) + 1 for text in texts])
            lengths = np.add.reduceat(lengths, np.cumsum(num_parts) - num_parts)
        yield tokens, lengths


def with_ends(tokens: np.ndarray, lengths: np.ndarray, prefix: list[int], eos: int) -> np.ndarray:
    """`prefix + text + EOS` of texts that lie one after another."""
    ends = np.cumsum(lengths + len(prefix) + 1)
    whole = np.empty(len(tokens) + len(lengths) * (len(prefix) + 1), np.int32)
    is_text = np.ones(len(whole), bool)
    for place, token in ((ends - 1, eos), *((ends - 1 - lengths - len(prefix) + i, t) for i, t in enumerate(prefix))):
        whole[place], is_text[place] = token, False
    whole[is_text] = tokens
    return whole


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
