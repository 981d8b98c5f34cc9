"""An example token by token: the ids of its microbatch, and whether they are trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.data.examples import Example
from engine.data.special_tokens import special_token_ids
from engine.inspect.collecting import ROLES, Data, DatasetSplit
from engine.step.layout import Microbatch, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE, NEWLINE, TAB = "·", "↵", "→"
State = Literal["masked", "trained on", "not scored", "scored at the last"]
MAX_NAMED = 6  # worse responses of a ranking, named beside a response


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
    """A token.

    Args:
        is_used: it is a target of the loss, or the score is read there.
    """

    id: int
    text: str
    is_special: bool
    is_used: bool


@dataclass(frozen=True)
class Part:
    """A prompt or a response of an example.

    Args:
        role: prompt, chosen, rejected or response.
        state: what the loss does with its tokens.
        num_cut: tokens lost by truncation.
    """

    role: str
    tokens: list[Token]
    state: State
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
        example, layout, pad_token_id = each.example, data.settings.batching, data.tokenizer.pad_token_id
        if not data.has_responses:
            prompt = example.prompt.tolist()
            yield ExampleTokens(_title(split, index), [_part("prompt", prompt, texts, len(each.prompt), "masked")])
            continue
        batch = lay_out([example], layout, pad_token_id, feeds_last_token=data.is_ranked)
        # The last token of the prompt predicts the first target.
        prompt = batch.input_ids[0, : int(batch.predict_index[0]) + 1].tolist()
        parts = [_part("prompt", prompt, texts, len(each.prompt), "not scored" if data.is_ranked else "masked")]
        roles = _roles(data, example)
        for role, ids, whole in zip(roles, _responses(batch, example), each.responses, strict=True):
            parts.append(_part(role, ids, texts, len(whole), "scored at the last" if data.is_ranked else "trained on"))
        yield ExampleTokens(_title(split, index), parts)


def _responses(batch: Microbatch, example: Example) -> Iterator[list[int]]:
    """Tokens of an example's responses in its microbatch: targets, or for a score the tokens that are fed."""
    if batch.score_index is None:
        targets = batch.targets.split(batch.response_lengths.tolist())
        for indices in (batch.chosen, batch.rejected)[: len(example.responses)]:
            assert indices is not None
            yield targets[int(indices[0])].tolist()
        return
    assert batch.rankings is not None
    fed = batch.input_ids.flatten().tolist()
    for number in batch.rankings[0].tolist():
        end = int(batch.score_index[number]) + 1
        yield fed[end - int(batch.response_lengths[number]) : end]


def _roles(data: Data, example: Example) -> Sequence[str]:
    """Names of an example's responses, with a label or the comparisons of a ranking."""
    if example.comparisons is None:
        label = {None: "", True: ", desirable", False: ", undesirable"}[example.label]
        return [role + label for role in data.roles]
    pairs = example.comparisons.pairs.tolist()
    if pairs == [[0, 1]]:
        return ROLES["pairs"]
    worse: list[list[str]] = [[] for _ in example.responses]
    for better, other in pairs:
        if str(other + 1) not in worse[better]:
            worse[better].append(str(other + 1))
    better_than = (f" better than {_listed(numbers)}" if numbers else "" for numbers in worse)
    return [f"response {index}{ending}" for index, ending in enumerate(better_than, 1)]


def _listed(numbers: list[str]) -> str:
    more = len(numbers) - MAX_NAMED
    return ", ".join(numbers[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _title(split: DatasetSplit, index: int) -> str:
    return f"{split.name}, example {index:,} of train"


def _part(role: str, ids: list[int], texts: TokenTexts, num_whole: int, state: State) -> Part:
    is_used = [state == "trained on"] * len(ids)
    is_used[-1] |= state == "scored at the last"
    tokens = [
        Token(token, texts[token], token in texts.special, used) for token, used in zip(ids, is_used, strict=True)
    ]
    return Part(role, tokens, state, num_whole - len(ids))
