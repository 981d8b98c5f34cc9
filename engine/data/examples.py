"""Examples: preferences as truncated token ids."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from engine.data.encoding import EncodedTexts, Text
from engine.data.preferences import Preference, Preferences
from engine.data.rankings import ComparedPair, rankings_of
from engine.data.rows import RowCounts
from engine.data.special_tokens import without_eos
from engine.data.token_cache import encode_cached
from utils import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from losses import BatchKind  # imports torch, and data need none

TruncationMode = Literal["keep_end", "keep_start"]
# By batch kind: the name of examples in counts, and what their prompt needs.
COUNTED = {"sft": "targets", "pairs": "pairs", "unpaired": "examples", "ranked": "rankings"}
NEEDED = {"sft": "a desirable response", "pairs": "a pair", "unpaired": "a pair or a label", "ranked": "a pair"}


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A prompt and its responses as token ids, as the model gets them."""

    prompt: np.ndarray  # int32 [prompt tokens], truncated, with BOS if the tokenizer adds one
    responses: tuple[np.ndarray, ...]  # int32 [response tokens] each, with EOS unless truncated: (target,) for SFT,
    # (chosen, rejected) for pairs, (response,) for unpaired ones, best first for rankings
    prompt_index: int  # shared by all examples of a prompt: 0, 1, ... in the order of the data
    label: bool | None = None  # of an unpaired response: whether it is desirable
    weight: float = 1.0  # scales the loss
    mismatched: np.ndarray | None = None  # int32, the response to another prompt, for losses with the need "kl"
    ranks: tuple[int, ...] | None = None  # of the responses of a ranking, 0 for the best; equal ones are ties
    margin: float = 0.0  # of a ranking: scores should differ by it


def fingerprint(examples: Iterable[Example]) -> str:
    """A hash of the content of examples, in their order."""
    return content_hash(part for example in examples for part in _parts(example))


def _parts(example: Example) -> Iterator[bytes]:
    yield from (array.tobytes() for array in (example.prompt, *example.responses))
    if example.label is not None:
        yield bytes([example.label])
    if example.weight != 1:
        yield repr(example.weight).encode()
    if example.mismatched is not None:
        yield example.mismatched.tobytes()
    if example.ranks is not None:
        yield repr((example.ranks, example.margin)).encode()


@dataclass
class Split:
    """The examples of a split, and numbers to report.

    Examples are in the order of the data; those of one prompt are adjacent.

    Args:
        examples: the examples.
        sizes: number of examples of each data set.
        counts: rows, prompts, pairs (for SFT: targets; for unpaired responses: examples, and desirable ones), dropped
            {reason: number}, truncated (examples) and max_length; rankings in place of pairs for ranked responses. Only
            if above 0: duplicates (of pairs or examples), contradictions (those with their opposite), ties and
            cut_responses (ranked responses; the latter lost their end). Only if there is one: first_bad_row.
    """

    examples: list[Example]
    counts: dict[str, Any] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)


def tokenize(
    data: Sequence[tuple[Preferences, TruncationMode]],
    tokenizer: "PreTrainedTokenizerBase",
    batch: "BatchKind",
    counts: RowCounts,
    *,
    max_length: int,
    max_prompt_length: int,
    cache_dir: Path,
) -> Split:
    """Make the examples of one or more data sets.

    Args:
        data: each data set, with the end of a prompt that truncation keeps.
        tokenizer: needs an EOS token.
        batch: "sft": one example per demonstration and SFT target; "pairs": one per pair; "unpaired": one per labelled
            response, two per pair; "ranked": one per ranking.
        counts: rows read and dropped so far; rows dropped here are added.
        max_length: of prompt + response, in tokens.
        max_prompt_length: of a truncated prompt, in tokens, with BOS.
        cache_dir: where encoded texts are cached.
    """
    drafts = _draft(data, batch, counts, tokenizer)
    encoded = encode_cached(list(drafts.texts), tokenizer, cache_dir)
    examples: list[Example] = []
    prompt_indices: dict[int, int] = {}  # by prompt number; prompts without examples get none
    num_truncated = 0
    ends, sizes = list(accumulate(len(preferences) for preferences, _ in data)), [0] * len(data)  # ends: of prompts
    for draft in drafts.examples:
        prompt, responses = encoded.prompt(draft.prompt), tuple(map(encoded.response, draft.responses))
        num_tokens = len(prompt) + sum(map(len, responses))
        keeps_end = draft.truncation_mode == "keep_end"
        num_front = _num_bos(prompt, encoded, tokenizer) if keeps_end else max_prompt_length
        prompt, responses = truncate(prompt, responses, max_length, max_prompt_length, num_front=num_front)
        responses, ranks = _distinct(responses, draft.group.ranks)
        if reason := _reason_to_drop(draft, encoded, prompt, responses, ranks):
            counts.dropped[reason] += 1
            continue
        prompt_index = prompt_indices.setdefault(draft.prompt_number, len(prompt_indices))
        _, label, weight, _, margin, _ = draft.group
        examples.append(Example(prompt, responses, prompt_index, label, weight, ranks=ranks, margin=margin))
        sizes[bisect_right(ends, draft.prompt_number)] += 1
        num_truncated += len(prompt) + sum(map(len, responses)) < num_tokens
    split_counts = {
        "rows": counts.rows,
        "prompts": len(prompt_indices),
        COUNTED[batch]: len(examples),
        "dropped": dict(counts.dropped),
        "truncated": num_truncated,
        "max_length": max_length,
    }
    if batch == "unpaired":
        split_counts["desirable"] = sum(bool(example.label) for example in examples)
    optional = {
        "duplicates": drafts.num_duplicates,
        "contradictions": drafts.num_contradictions,
        **_ranking_counts(examples, tokenizer.eos_token_id),
        "first_bad_row": counts.first_bad_row,
    }
    return Split(examples, split_counts | {name: value for name, value in optional.items() if value}, sizes)


# ---- Before encoding ----


class Group(NamedTuple):
    """The responses of one example: (target,), (chosen, rejected), (response,) with a label, or a ranking.

    Args:
        ranks, margin: of a ranking.
        indices: of a pair, among the responses to its prompt.
    """

    responses: tuple[str, ...]
    label: bool | None = None
    weight: float = 1.0
    ranks: tuple[int, ...] | None = None
    margin: float = 0.0
    indices: tuple[int, int] = (0, 0)

    @property
    def opposite(self) -> "Group":
        """The group with the opposite preference, and the weight 1."""
        return Group(self.responses[::-1], None if self.label is None else not self.label)


class ExampleDraft(NamedTuple):
    """An example before encoding; texts are given by their index."""

    prompt_number: int
    truncation_mode: TruncationMode
    prompt: int
    responses: tuple[int, ...]
    group: Group


@dataclass
class Drafts:
    """Examples before encoding, and their distinct texts."""

    examples: list[ExampleDraft] = field(default_factory=list)
    texts: dict[Text, int] = field(default_factory=dict)  # to their index
    num_duplicates: int = 0
    num_contradictions: int = 0

    def add(self, prompt_number: int, mode: TruncationMode, from_template: bool, prompt: str, group: Group) -> None:
        texts = (Text(from_template, text) for text in (prompt, *group.responses))
        prompt_index, *indices = (self.texts.setdefault(text, len(self.texts)) for text in texts)
        self.examples.append(ExampleDraft(prompt_number, mode, prompt_index, tuple(indices), group))

    def count_repeats(self, groups: list[Group]) -> None:
        distinct = {Group(group.responses, group.label) for group in groups}
        self.num_duplicates += len(groups) - len(distinct)
        self.num_contradictions += sum(group < group.opposite and group.opposite in distinct for group in distinct)


def _draft(
    data: Sequence[tuple[Preferences, TruncationMode]],
    batch: "BatchKind",
    counts: RowCounts,
    tokenizer: "PreTrainedTokenizerBase",
) -> Drafts:
    drafts = Drafts()
    prompt_number = 0
    for preferences, mode in data:
        for prompt, preference in preferences.items():
            groups = _groups(preference, batch, counts)
            # Each response gets an EOS; one that its author wrote would be learned as letters.
            groups = [
                group._replace(responses=tuple(without_eos(text, tokenizer) for text in group.responses))
                for group in groups
            ]
            if batch != "sft":
                drafts.count_repeats(groups)
            if not groups:
                counts.dropped[f"prompt without {NEEDED[batch]}"] += 1
            useful = _drop_useless(groups, batch, counts)
            for group in _rankings(useful) if batch == "ranked" else useful:
                drafts.add(prompt_number, mode, preference.get("from_template", False), prompt, group)
            prompt_number += 1
    return drafts


def _drop_useless(groups: list[Group], batch: "BatchKind", counts: RowCounts) -> Iterator[Group]:
    """The groups of a prompt, without those useless for training."""
    learned: set[tuple[str, ...]] = set()
    for group in groups:
        if not all(text.strip() for text in group.responses):
            counts.dropped["empty response"] += 1
        elif batch in ("pairs", "ranked") and group.responses[0] == group.responses[1]:
            counts.dropped["chosen equal to rejected"] += 1
        elif batch == "sft" and group.responses in learned:
            counts.dropped["duplicate response"] += 1
        else:
            learned.add(group.responses)
            yield group


def _rankings(pairs: Iterable[Group]) -> Iterator[Group]:
    """The rankings of a prompt."""
    compared = []
    for pair in pairs:
        preferred, other = pair.responses
        compared.append(ComparedPair((preferred, other), pair.indices, pair.weight, pair.margin))
    for responses, ranks, weight, margin in rankings_of(compared):
        yield Group(responses, weight=weight, ranks=ranks, margin=margin)


def _groups(preference: Preference, batch: "BatchKind", counts: RowCounts) -> list[Group]:
    """The examples of a prompt, each with the weight of its row."""
    responses, target = preference["responses"], preference["sft_target"]
    weights = preference.get("weights", [1.0] * len(responses))
    if batch == "sft":
        demonstrations = preference.get("demonstrations", [])
        if target is not None and target not in demonstrations:
            demonstrations = [*demonstrations, target]
        # Of rows with an equal response the first counts, as later ones are dropped.
        by_text = dict(reversed([*zip(responses, weights, strict=True)]))
        return [Group((text,), weight=by_text.get(text, 1.0)) for text in demonstrations]
    if batch == "ranked":
        margins = preference.get("margins", {})
        return [
            Group((responses[i], responses[j]), weight=weights[i], margin=margins.get((i, j), 0.0), indices=(i, j))
            for i, j in preference["pairs"]
        ]
    pairs = [(responses[chosen], responses[rejected], weights[chosen]) for chosen, rejected in preference["pairs"]]
    if batch == "pairs":
        return [Group((chosen, rejected), weight=weight) for chosen, rejected, weight in pairs]
    labels = preference.get("labels", [])
    labelled = [Group((responses[index],), label, weights[index]) for index, label in labels]
    for chosen, rejected, weight in pairs:
        if chosen == rejected:
            counts.dropped["chosen equal to rejected"] += 1
        else:
            labelled += [Group((chosen,), True, weight), Group((rejected,), False, weight)]
    return labelled


# ---- After encoding ----


def _num_bos(prompt: np.ndarray, encoded: EncodedTexts, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Number of tokens before a prompt's text: the prefix, or a template's BOS."""
    return len(encoded.prefix) or int(prompt[:1].tolist() == [tokenizer.bos_token_id])


def truncate(
    prompt: np.ndarray, responses: tuple[np.ndarray, ...], max_length: int, max_prompt_length: int, *, num_front: int
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Truncate a prompt and its responses if prompt + longest response exceeds max_length.

    First the prompt is truncated to max_prompt_length, then each response that still does not fit.

    Args:
        prompt: int32 [prompt tokens].
        responses: int32 [response tokens] each.
        max_length: of prompt + response.
        max_prompt_length: of a truncated prompt.
        num_front: number of first tokens kept of a truncated prompt; the rest are its last ones.
    """
    if len(prompt) + max(map(len, responses)) > max_length:
        if len(prompt) > max_prompt_length:
            num_front = min(num_front, max_prompt_length)
            num_back = max_prompt_length - num_front
            prompt = np.concatenate([prompt[:num_front], prompt[len(prompt) - num_back :]])
        responses = tuple(response[: max(max_length - len(prompt), 0)] for response in responses)
    return prompt, responses


def _distinct(
    responses: tuple[np.ndarray, ...], ranks: tuple[int, ...] | None
) -> tuple[tuple[np.ndarray, ...], tuple[int, ...] | None]:
    """A ranking without responses that are equal to a better one as tokens; others as they are."""
    if ranks is None:
        return responses, None
    first = {response.tobytes(): index for index, response in reversed([*enumerate(responses)])}
    kept = sorted(first.values())
    return tuple(responses[index] for index in kept), tuple(ranks[index] for index in kept)


def _ranking_counts(examples: Sequence[Example], eos_token_id: int) -> dict[str, int]:
    """Numbers of ranked responses: tied ones, and those without an end-of-text token."""
    rankings = [example for example in examples if example.ranks is not None]
    num_ties = [number for example in rankings for number in Counter(example.ranks).values() if number > 1]
    num_cut = sum(response[-1] != eos_token_id for example in rankings for response in example.responses)
    return {"ties": sum(num_ties), "cut_responses": num_cut}


def _reason_to_drop(
    draft: ExampleDraft,
    encoded: EncodedTexts,
    prompt: np.ndarray,
    responses: tuple[np.ndarray, ...],
    ranks: tuple[int, ...] | None,
) -> str | None:
    """Why a truncated example cannot train; None if it can."""
    if not all(map(len, responses)) or not all(encoded.lengths[index] for index in draft.responses):
        return "no response tokens left"
    if not len(prompt):
        return "empty prompt (no token predicts the first of the response)"
    if (ranks is not None and len({*ranks}) == 1) or (len(responses) == 2 and np.array_equal(*responses)):
        return "chosen equal to rejected as tokens"
    return None
