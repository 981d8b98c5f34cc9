"""Literal special tokens in a text: mark them, to encode them as plain text."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts are encoded in the pieces between marks, so no special token can span one. Data never contain this character:
# Row.as_text refuses it.
MARK = "\x00"


def special_token_marker(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], str]:
    """A function to put a MARK into every literal special token of a text.

    Overlapping tokens are all marked. Tokens of one character have no inside, so they stay.
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    escaped = [re.escape(token) for token in sorted(tokens | set(tokenizer.all_special_tokens)) if len(token) > 1]
    if not escaped:
        return lambda text: text
    first_character = re.compile(f"(?={'|'.join(escaped)}).", re.DOTALL)
    return lambda text: first_character.sub(rf"\g<0>{MARK}", text)


def without_eos(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text without an EOS at its end."""
    eos, stripped = tokenizer.eos_token, text.rstrip()
    return stripped.removesuffix(eos) if eos and stripped.endswith(eos) else text


def special_token_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids of the special tokens, without the one for unknown text."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
