"""Texts to token ids: preferences become examples, cut to length, with each distinct text encoded once and cached."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from engine.formats import MARK, Preferences, Tally, special_token_marker
from utils import UserError, content_hash, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = tuple[bool, str]  # whether it is from a chat template, the text
BatchKind = Literal["sft", "pairs"]
TruncationMode = Literal["keep_end", "keep_start"]

CHUNK_SIZE = 2048  # texts handed to the tokenizer at once
CACHE_VERSION = 1  # of how texts are encoded and stored


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """What one step of training reads: a prompt and its responses, as token ids that the model sees as they are."""

    prompt: np.ndarray  # int32 [prompt tokens], cut, with BOS where the tokenizer adds one
    responses: tuple[np.ndarray, ...]  # int32 [response tokens] each, ending in EOS unless cut: (target,) for SFT,
    # (chosen, rejected) for pairs
    prompt_index: int  # examples of one prompt share it; 0, 1, ... in the order of the data


@dataclass
class Split:
    """The examples of a split in the order of the data, all of one prompt adjacent, and what was counted on the way.

    counts: rows, prompts, pairs (for SFT: targets), dropped {reason: number}, truncated (examples) and max_length; if
        there are any, duplicates (of pairs), contradictions (two pairs of opposite preference) and first_bad_row.
    """

    examples: list[Example]
    counts: dict[str, Any] = field(default_factory=dict)


def tokenize(
    data: Sequence[tuple[Preferences, TruncationMode]],
    tokenizer: "PreTrainedTokenizerBase",
    batch: BatchKind,
    tally: Tally,
    *,
    max_length: int,
    max_prompt_length: int,
    cache_dir: Path,
) -> Split:
    """Make the examples of one or more data sets: for "sft" one per prompt, or per demonstration; for "pairs" one per
    pair.

    Args:
        data: the data sets, each with the end of its prompts that stays when they are cut.
        tokenizer: needs an EOS token.
        batch: what an example is.
        tally: rows read and dropped so far; what is dropped here is added to it.
        max_length: of prompt + response, in tokens.
        max_prompt_length: of a prompt that is cut, in tokens, its BOS included.
        cache_dir: holds encoded texts by content.
    """
    texts: dict[Text, int] = {}  # -> index
    rows: list[tuple[int, bool, list[int]]] = []  # prompt number, keep_end, indices of prompt and responses
    num_prompts = 0
    duplicates = contradictions = 0
    for preferences, truncation_mode in data:
        for text, preference in preferences.items():
            template, answers = preference.get("template", False), preference["responses"]
            learned: set[tuple[str, ...]] = set()
            demonstrations = preference.get("demonstrations", [])
            if preference["sft_target"] not in demonstrations:
                demonstrations = [*demonstrations, preference["sft_target"]]
            candidates: list[tuple[str, ...]] = [(answer,) for answer in demonstrations]
            if batch == "pairs":
                candidates = [(answers[chosen], answers[rejected]) for chosen, rejected in preference["pairs"]]
                if not candidates:
                    tally.dropped["prompt without a pair"] += 1
                distinct = set(candidates)
                duplicates += len(candidates) - len(distinct)
                contradictions += sum(pair[0] < pair[1] and pair[::-1] in distinct for pair in distinct)
            for candidate in candidates:
                if not all(answer.strip() for answer in candidate):
                    tally.dropped["empty response"] += 1
                elif batch == "pairs" and candidate[0] == candidate[1]:
                    tally.dropped["chosen equal to rejected"] += 1
                elif batch == "sft" and candidate in learned:
                    tally.dropped["answer that the prompt has already"] += 1
                else:
                    learned.add(candidate)
                    indices = [texts.setdefault((template, part), len(texts)) for part in (text, *candidate)]
                    rows.append((num_prompts, truncation_mode == "keep_end", indices))
            num_prompts += 1

    examples: list[Example] = []
    numbers: dict[int, int] = {}  # of the prompts that have examples
    truncated = 0
    encoded = encode_cached(list(texts), tokenizer, cache_dir)
    for prompt_number, keep_end, (prompt_index, *response_indices) in rows:
        prompt, responses = encoded.prompt(prompt_index), tuple(map(encoded.response, response_indices))
        num_tokens = len(prompt) + sum(map(len, responses))
        num_front = max_prompt_length
        if keep_end:  # all but BOS, which a chat template may have written
            num_front = len(encoded.prefix) or int(prompt[:1].tolist() == [tokenizer.bos_token_id])
        prompt, responses = cut(prompt, responses, max_length, max_prompt_length, num_front=num_front)
        if not all(map(len, responses)) or not all(encoded.lengths[index] for index in response_indices):
            tally.dropped["no response tokens left"] += 1
        elif not len(prompt):
            tally.dropped["empty prompt, so nothing to predict the first token from"] += 1
        elif len(responses) == 2 and np.array_equal(*responses):
            tally.dropped["chosen equal to rejected as tokens"] += 1
        else:
            examples.append(Example(prompt, responses, numbers.setdefault(prompt_number, len(numbers))))
            truncated += len(prompt) + sum(map(len, responses)) < num_tokens
    counts = {
        "rows": tally.rows,
        "prompts": len(numbers),
        "targets" if batch == "sft" else "pairs": len(examples),
        "dropped": dict(tally.dropped),
        "truncated": truncated,
        "max_length": max_length,
    }
    remarkable = {"duplicates": duplicates, "contradictions": contradictions, "first_bad_row": tally.first_bad_row}
    return Split(examples, counts | {name: value for name, value in remarkable.items() if value})


def cut(
    prompt: np.ndarray, responses: tuple[np.ndarray, ...], max_length: int, max_prompt_length: int, *, num_front: int
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Cut a prompt and its responses to length, where prompt + longest response is longer than max_length.

    The prompt is cut to max_prompt_length first, and then each response that still does not fit.

    Args:
        prompt: int32 [prompt tokens].
        responses: int32 [response tokens] each.
        max_length: of prompt + response.
        max_prompt_length: of a prompt that is cut.
        num_front: how much of that is the prompt's first tokens; the others are its last.
    """
    if len(prompt) + max(map(len, responses)) > max_length:
        if len(prompt) > max_prompt_length:
            num_front = min(num_front, max_prompt_length)
            num_back = max_prompt_length - num_front
            prompt = np.concatenate([prompt[:num_front], prompt[len(prompt) - num_back :]])
        responses = tuple(response[: max(max_length - len(prompt), 0)] for response in responses)
    return prompt, responses


# ---- Encoding ----


@dataclass(frozen=True)
class EncodedTexts:
    """Distinct texts, each stored as `prefix + text + EOS`, so that prompts and responses are slices of one array."""

    tokens: np.ndarray  # int32 [all tokens]
    lengths: np.ndarray  # int64 [texts], tokens of each text alone
    starts: np.ndarray  # int64 [texts], where each text begins in tokens, behind its prefix
    prefix: list[int]  # what the tokenizer puts in front of any text: BOS or nothing

    @classmethod
    def locate(cls, tokens: np.ndarray, lengths: np.ndarray, prefix: list[int]) -> "EncodedTexts":
        stored = lengths + len(prefix) + 1
        return cls(tokens, lengths, np.cumsum(stored) - stored + len(prefix), prefix)

    def prompt(self, index: int) -> np.ndarray:
        """int32 [prompt tokens], behind the prefix, unless a chat template has written that itself."""
        start, end = self.starts[index], self.starts[index] + self.lengths[index]
        has_prefix = self.tokens[start : min(start + len(self.prefix), end)].tolist() == self.prefix
        return self.tokens[start if has_prefix else start - len(self.prefix) : end]

    def response(self, index: int) -> np.ndarray:
        """int32 [response tokens], EOS included."""
        return self.tokens[self.starts[index] : self.starts[index] + self.lengths[index] + 1]


def encode(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase") -> EncodedTexts:
    """Encode texts. Special tokens count as such in a chat template's text, but for those marked; elsewhere never."""
    prefix, eos = token_prefix(tokenizer), _eos_token_id(tokenizer)
    arrays: list[np.ndarray] = []
    lengths: list[int] = []
    with tqdm(total=len(texts), desc="tokenizing", unit=" texts", disable=None) as bar:  # None: unless on a terminal
        for template, run in groupby(texts, key=lambda item: item[0]):
            while chunk := [text for _, text in islice(run, CHUNK_SIZE)]:
                ids = encode_texts(chunk, tokenizer, parse_special_tokens=template)
                lengths.extend(map(len, ids))
                total = sum(map(len, ids)) + len(ids) * (len(prefix) + 1)
                stored = chain.from_iterable(chain(prefix, one, (eos,)) for one in ids)
                arrays.append(np.fromiter(stored, np.int32, total))
                bar.update(len(chunk))
    return EncodedTexts.locate(np.concatenate([np.empty(0, np.int32), *arrays]), np.array(lengths, np.int64), prefix)


def encode_texts(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", parse_special_tokens: bool
) -> list[list[int]]:
    """The ids of each text alone: no BOS, no EOS. Marked texts are encoded in the pieces between their marks.

    Where special tokens are not to be parsed, none comes out, except the one for unknown text.
    """
    pieces = [piece for text in texts for piece in text.split(MARK)]
    ids: list[list[int]] = tokenizer(
        pieces,
        add_special_tokens=False,
        split_special_tokens=not parse_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    if len(pieces) > len(texts):
        remaining = iter(ids)
        ids = [list(chain.from_iterable(islice(remaining, text.count(MARK) + 1))) for text in texts]
    if not parse_special_tokens:
        # Not parsed, a special token may still be found as a word of the vocabulary: by Unigram, or learnt by BPE.
        added = tokenizer.added_tokens_decoder.items()
        special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
        special.discard(tokenizer.unk_token_id)
        mark = special_token_marker(tokenizer)
        found = [i for i, one in enumerate(ids) if not special.isdisjoint(one) and mark(texts[i]) != texts[i]]
        if found and not any(MARK in texts[i] for i in found):
            again = encode_texts([mark(texts[i]) for i in found], tokenizer, parse_special_tokens=False)
            for i, one in zip(found, again, strict=True):
                ids[i] = one
    return ids


def token_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts in front of any text: [BOS], more, or nothing. What it puts behind is left out."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next(whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare)


def encode_cached(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", cache_dir: Path) -> EncodedTexts:
    """encode(), or what it gave for the same texts and tokenizer before. A damaged file is made again.

    Raises:
        UserError: if the cache cannot be written.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save

    prefix = token_prefix(tokenizer)
    key = content_hash(
        chain(
            [CACHE_VERSION, prefix, _eos_token_id(tokenizer), tokenizer_state(tokenizer)],
            chain.from_iterable((b"template" if template else b"plain", text.encode()) for template, text in texts),
        )
    )
    path = cache_dir / "tokens" / f"{key}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
            # safetensors does not notice changed bytes.
            if (file.metadata() or {}).get("content") == content_hash([tokens.tobytes(), lengths.tobytes()]):
                return EncodedTexts.locate(tokens, lengths, prefix)
    except (OSError, SafetensorError):
        pass
    encoded = encode(texts, tokenizer)
    tensors = {"tokens": encoded.tokens, "lengths": encoded.lengths}
    content = content_hash([tensor.tobytes() for tensor in tensors.values()])
    try:
        write_atomically(path, save(tensors, {"content": content}))
    except OSError as error:
        problem = f"cache_dir: {path} cannot be written ({error})"
        raise UserError("STORAGE", problem, "make room or set cache_dir elsewhere") from error
    return encoded


def tokenizer_state(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """All that decides how the tokenizer encodes a text, as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its vocabulary stands for it
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        return [type(tokenizer).__name__, tokenizer.get_vocab(), special]
    state = json.loads(backend.to_str())
    return state | {"truncation": None, "padding": None}  # changed by calls, and never used here


def _eos_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        fix = "set model.tokenizer_name_or_path to a tokenizer that has one"
        raise UserError("CONFIG", "the tokenizer has no end-of-text token, which must end every response", fix)
    return tokenizer.eos_token_id
