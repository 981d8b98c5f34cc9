"""The token cache: encoded texts on disk, found by a hash of texts and tokenizer."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.encoding import EncodedTexts, Text, encode, eos_token_id, token_prefix
from utils import UserError, content_hash, one_at_a_time, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 1  # raise it when texts are encoded or stored differently


def encode_cached(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", cache_dir: Path) -> EncodedTexts:
    """Encode texts, or read them from the cache. A damaged file is rebuilt.

    Raises:
        UserError: if the cache cannot be written.
    """
    prefix = token_prefix(tokenizer)
    path = cache_dir / "tokens" / f"{_cache_key(texts, tokenizer, prefix)}.safetensors"
    cached = _read(path, prefix)
    if cached is not None:
        return cached
    with one_at_a_time(path, f"waiting for another run, which fills {path}"):
        if (cached := _read(path, prefix)) is not None:
            return cached
        encoded = encode(texts, tokenizer)
        _write(path, encoded)
    return encoded


def _cache_key(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", prefix: list[int]) -> str:
    return content_hash(
        chain(
            [CACHE_VERSION, prefix, eos_token_id(tokenizer), _tokenizer_state(tokenizer)],
            chain.from_iterable(
                (b"template" if from_template else b"plain", text.encode()) for from_template, text in texts
            ),
        )
    )


def _tokenizer_state(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Everything that affects how the tokenizer encodes a text, as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python, with no state to export
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        return [type(tokenizer).__name__, tokenizer.get_vocab(), special]
    state = json.loads(backend.to_str())
    return state | {"truncation": None, "padding": None}  # changed by calls, and unused here


def _read(path: Path, prefix: list[int]) -> EncodedTexts | None:
    """The texts of a cache file; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
            # safetensors itself does not notice changed bytes.
            if (file.metadata() or {}).get("content") == content_hash([tokens.tobytes(), lengths.tobytes()]):
                return EncodedTexts.from_lengths(tokens, lengths, prefix)
    except (OSError, SafetensorError):
        pass
    return None


def _write(path: Path, encoded: EncodedTexts) -> None:
    from safetensors.numpy import save

    tensors = {"tokens": encoded.tokens, "lengths": encoded.lengths}
    content = content_hash([tensor.tobytes() for tensor in tensors.values()])
    try:
        write_atomically(path, save(tensors, {"content": content}))
    except OSError as error:
        problem = f"cache_dir: {path} cannot be written ({error})"
        raise UserError("STORAGE", problem, "make room or set cache_dir elsewhere") from error
