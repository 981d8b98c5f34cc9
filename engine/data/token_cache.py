"""The token cache: token stores of encoded texts, found by a hash of texts and tokenizer."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.encoding import EncodedTexts, Text, encode_chunks, eos_token_id, token_prefix
from engine.data.token_store import TokenStoreWriter, open_store
from utils import UserError, content_hash, one_at_a_time

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TRIES = 4  # another process may replace a damaged store at the same time
CACHE_VERSION = 2  # raise it when texts are encoded or stored differently


def encode_cached(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", cache_dir: Path) -> EncodedTexts:
    """Encode texts, or read them from the cache. A damaged store is rebuilt.

    Raises:
        UserError: if the cache cannot be written.
    """
    prefix = token_prefix(tokenizer)
    key = _cache_key(texts, tokenizer, prefix)
    for _ in range(MAX_TRIES):
        if (cached := read_texts(cache_dir, key, prefix)) is not None:
            return cached
        path = cache_dir / "tokens" / key
        with one_at_a_time(path, f"waiting for another run, which fills {path}"):
            if (cached := read_texts(cache_dir, key, prefix)) is not None:
                return cached
            write_texts(cache_dir, key, tokenizer, texts)
    problem = f"cache_dir: {cache_dir / 'tokens' / key} is damaged whenever it is written"
    raise UserError("STORAGE", problem, "check the disk or set cache_dir elsewhere")


def read_texts(cache_dir: Path, key: str, prefix: list[int]) -> EncodedTexts | None:
    """The texts of a store; None if it is missing or damaged."""
    store = open_store(cache_dir / "tokens" / key, key)
    if store is None:
        return None
    num_added = len(prefix) + 1
    lengths = np.diff(store.offsets) - num_added
    return EncodedTexts(store.tokens, lengths, store.offsets[:-1] + len(prefix), prefix, key)


def write_texts(cache_dir: Path, key: str, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Text]) -> None:
    """Encode texts into a store."""
    num_added = len(token_prefix(tokenizer)) + 1
    with TokenStoreWriter(cache_dir / "tokens" / key, num_ids(tokenizer), key, total=len(texts)) as writer:
        for tokens, lengths in encode_chunks(texts, tokenizer):
            writer.add_stream(tokens, lengths + num_added)


def num_ids(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest token id. A vocabulary with gaps has fewer tokens."""
    return max(len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values()))


def _cache_key(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", prefix: list[int]) -> str:
    return content_hash(
        chain(
            [CACHE_VERSION, prefix, eos_token_id(tokenizer), tokenizer_state(tokenizer)],
            chain.from_iterable(
                (b"template" if from_template else b"plain", text.encode()) for from_template, text in texts
            ),
        )
    )


def tokenizer_state(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Everything that affects how the tokenizer encodes a text, as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python, with no state to export
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        return [type(tokenizer).__name__, tokenizer.get_vocab(), special]
    state = json.loads(backend.to_str())
    return state | {"truncation": None, "padding": None}  # changed by calls, and unused here
