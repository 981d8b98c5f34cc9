"""Write a tokenizer into a GGUF file."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gguf
from gguf import TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.encoding import token_prefix
from engine.export.gguf_errors import UnsupportedModel, require

# ---- Ways to split text ----

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """One of llama.cpp's ways to split text before merging.

    Args:
        name: in llama.cpp.
        ignore_merges: words in the vocabulary become one token, without merging.
    """

    name: str
    ignore_merges: bool = False


# The steps of tokenizer.json's pre-tokenizer ahead of ByteLevel -> llama.cpp's pre-tokenizer. Regular expressions are
# spelled as in the published files.
PRE_TOKENIZERS = {
    ("gpt-2 regex",): PreTokenizer("gpt-2"),
    ("digits", "gpt-2 regex"): PreTokenizer("smollm"),
    (CONTRACTIONS + WORDS + r"|\p{N}" + AFTER_DIGITS,): PreTokenizer("qwen2"),
    (CONTRACTIONS + WORDS + r"|\p{N}{1,3}" + AFTER_DIGITS,): PreTokenizer("llama-bpe", ignore_merges=True),
    (TEKKEN,): PreTokenizer("tekken", ignore_merges=True),
}


# ---- Vocabularies ----


@dataclass
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Args:
        model: "gpt2" for byte-level BPE with merges, "llama" for SentencePiece BPE with scores.
        pre: name of the pre-tokenizer.
        scores: of the tokens made by merges.
        notes: lines for the user.
    """

    model: str
    pre: str
    merges: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    add_space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(state: dict[str, Any]) -> Vocabulary:
    """Translate the content of a tokenizer.json.

    Raises:
        UnsupportedModel: if llama.cpp would split texts differently.
    """
    model = state["model"]
    require(model["type"] == "BPE", f"its tokenizer is of type {model['type']}, not BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        require(not model.get(name), f"its tokenizer has a {name}")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _read_sentencepiece(state, merges)
    return _read_byte_level(state, merges)


def _steps(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with sequences flattened.

    Args:
        key: a sequence's key of its steps.
    """
    if node is None:
        return []
    return [step for inner in node[key] for step in _steps(inner, key)] if node["type"] == "Sequence" else [node]


def _read_byte_level(state: dict[str, Any], merges: list[tuple[str, ...]]) -> Vocabulary:
    notes = []
    normalizers = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    require(set(normalizers) <= {"NFC"}, f"its tokenizer normalizes text by {', '.join(normalizers)}")
    if normalizers:
        notes.append("llama.cpp does not normalize text to NFC, unlike the tokenizer: give it composed characters")
    *splits, last = _steps(state["pre_tokenizer"], "pretokenizers") or [{"type": "none"}]
    require(last["type"] == "ByteLevel", "its tokenizer does not work on bytes")
    require(not last["add_prefix_space"], "its tokenizer adds a space in front")
    names: list[str] = []
    for step in splits:
        if step["type"] == "Digits" and step["individual_digits"]:
            names.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            names.append(next(iter(step["pattern"].values())))
        else:
            raise UnsupportedModel(f"its tokenizer splits text by {step['type']}, unknown to llama.cpp")
    if last["use_regex"]:
        names.append("gpt-2 regex")
    known = PRE_TOKENIZERS.get(tuple(names))
    if known is None:
        raise UnsupportedModel(f"its tokenizer splits text by {', '.join(map(repr, names))}, unknown to llama.cpp")
    ignores = bool(state["model"].get("ignore_merges"))
    require(
        known.ignore_merges == ignores,
        f"its tokenizer has ignore_merges={ignores}; llama.cpp's {known.name} has {known.ignore_merges}",
    )
    return Vocabulary("gpt2", known.name, merges=[" ".join(merge) for merge in merges], notes=notes)


def _read_sentencepiece(state: dict[str, Any], merges: list[tuple[str, ...]]) -> Vocabulary:
    """Translate a SentencePiece BPE; tokenizer.json lists its merges in the order of the pieces' scores."""
    has_prefix, notes = _space_prefix(state)
    vocabulary = state["model"]["vocab"]
    require(all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)), "its tokenizer lacks tokens for bytes")
    # llama.cpp takes the merge with the highest-scored piece. So all merges of one piece must be neighbours.
    scores: dict[str, float] = {}
    previous = None
    for left, right in merges:
        piece = left + right
        require(piece == previous or piece not in scores, f"its tokenizer's merges into {piece!r} are not neighbours")
        scores.setdefault(piece, -float(len(scores)))
        previous = piece
    known = set(merges)
    added = {token["content"] for token in state["added_tokens"]}
    for piece in vocabulary:
        if piece not in added and not piece.startswith("<0x"):
            for i in range(1, len(piece)):
                left, right = piece[:i], piece[i:]
                if left in vocabulary and right in vocabulary and (left, right) not in known:
                    raise UnsupportedModel(f"its tokenizer does not merge {left!r} and {right!r}, unlike SentencePiece")
    return Vocabulary("llama", "default", scores=scores, add_space_prefix=has_prefix, notes=notes)


def _space_prefix(state: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a SentencePiece BPE adds a space in front of texts, and notes for the user."""
    normalizers = _steps(state["normalizer"], "normalizers")
    pre_tokenizers = _steps(state["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in normalizers + pre_tokenizers]
    foreign = "its tokenizer is not SentencePiece's"
    if kinds in (["Prepend", "Replace"], ["Replace"]) and not pre_tokenizers:
        replaces = normalizers[-1]["pattern"] == {"String": " "} and normalizers[-1]["content"] == "▁"
        require(replaces and normalizers[0].get("prepend", "▁") == "▁", foreign)
        return len(normalizers) == 2, []
    require(kinds == ["Metaspace"] and pre_tokenizers[0]["replacement"] == "▁", foreign)
    has_prefix = pre_tokenizers[0]["prepend_scheme"] != "never"
    splits = pre_tokenizers[0].get("split", True)
    crossing = next((token for token in state["model"]["vocab"] if "▁" in token[1:].lstrip("▁")), None)
    require(not splits or crossing is None, f"its tokenizer splits at spaces, but has the token {crossing!r}")
    return has_prefix, ["llama.cpp adds a space also in front of texts with a leading space"] if has_prefix else []


# ---- The file ----


def write_tokenizer(
    writer: gguf.GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: Any
) -> list[str]:
    """Add the tokenizer to a file.

    Args:
        chat_template: Jinja text, a dict of name to Jinja text, or None.

    Returns:
        notes for the user.

    Raises:
        UnsupportedModel: if llama.cpp would encode texts differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel("its tokenizer is written in Python, without a tokenizer.json")
    vocabulary = read_vocabulary(json.loads(backend.to_str()))
    tokens, types, scores = _token_table(model, tokenizer, vocabulary)
    prefix = token_prefix(tokenizer)
    require(prefix in ([], [tokenizer.bos_token_id]), f"its tokenizer puts {prefix} in front of texts, not BOS alone")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if vocabulary.model == "llama":
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(bool(vocabulary.add_space_prefix))
    else:
        writer.add_token_merges(vocabulary.merges)
    _write_special_tokens(writer, model, tokenizer)
    writer.add_add_bos_token(bool(prefix))
    writer.add_add_eos_token(False)
    if isinstance(chat_template, dict):
        chat_template = [{"name": name, "template": template} for name, template in chat_template.items()]
    if chat_template:
        writer.add_chat_template(chat_template)
    return vocabulary.notes


def _token_table(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> tuple[list[str], list[TokenType], list[float]]:
    """Text, type and score of each row of the embedding."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    tokens_by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    require(max(tokens_by_id) < num_rows, f"its tokenizer has {max(tokens_by_id) + 1} tokens, the model {num_rows}")
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    tokens, types, scores = [], [], []
    lowest = -float(len(vocabulary.scores)) - 1
    for index in range(num_rows):
        token = tokens_by_id.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        elif vocabulary.model == "llama" and index == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        elif index in special or (index in added and added[index].special):
            kind = TokenType.CONTROL
        elif index in added:
            kind = TokenType.USER_DEFINED
        elif vocabulary.model == "llama" and token.startswith("<0x") and len(token) == 6:
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(kind)
        scores.append(vocabulary.scores.get(token, lowest))
    require(len(set(tokens)) == len(tokens), "two of its tokens have the same text")
    return tokens, types, scores


def _write_special_tokens(writer: gguf.GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UnsupportedModel("its tokenizer has no end-of-text token")
    # Without a BOS in the file, llama.cpp would take the id of GPT-2's or Llama's.
    writer.add_bos_token_id(eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    ends = getattr(model.generation_config, "eos_token_id", None)
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, eos)]
    if others:
        writer.add_eot_token_id(others[0])
