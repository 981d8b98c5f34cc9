"""Examples: preferences as truncated token ids."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from engine.data.dialogues import DialogueRows, Turn
from engine.data.encoding import EncodedTexts, Text
from engine.data.example_table import NUM_RESPONSES, ExampleTable, TableBuilder
from engine.data.preferences import Preference, Preferences
from engine.data.rankings import (
    Comparisons,
    Reasons,
    find_order,
    join_equal,
    read_comparisons,
    without_ties,
)
from engine.data.rows import RowCounts
from engine.data.special_tokens import without_eos
from engine.data.split_counts import count_split
from engine.data.token_cache import encode_cached
from utils import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.data.parts import Part
    from losses import BatchKind  # imports torch, and data need none

TruncationMode = Literal["keep_end", "keep_start"]
# By batch kind: the name of examples in counts, and what their prompt needs.
COUNTED = {"sft": "targets", "pairs": "pairs", "unpaired": "examples", "ranked": "rankings", "rollout": "prompts"}
USELESS_TEXTS = Reasons("empty response", "chosen equal to rejected")
USELESS_TOKENS = Reasons("no response tokens left", "chosen equal to rejected as tokens")
WITHOUT_ORDER = "prompt without one order of its responses (loss.ranking=pairs learns its pairs)"
WITHOUT_UNTIED = "prompt without two untied responses (loss.ranking=pairs learns its pairs)"
TIED = "tied response"
NEEDED = {"sft": "a desirable response", "pairs": "a pair", "unpaired": "a pair or a label", "ranked": "a pair"}


class PromptRow(NamedTuple):
    """What a reward reads of a prompt.

    Args:
        text: of the prompt, before truncation.
        columns: of its row; empty for named data sets.
        from_template: whether a chat template wrote the text.
    """

    text: str
    columns: Mapping[str, Any]
    from_template: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Rollout:
    """What a loss of sampled responses reads of each response beside its tokens, fp64 [response tokens] each.

    Args:
        weights: of the losses of the tokens; the loss of an example is their weighted sum.
        old_logps: log-probs under the policy that sampled the response.
        reference_logps: None without a reference.
        advantages: how much better than expected each token is.
        values: of the critic at sampling, where it predicts the token; None without one.
        returns: what the critic learns; None without one.
    """

    weights: tuple[np.ndarray, ...]
    old_logps: tuple[np.ndarray, ...]
    reference_logps: tuple[np.ndarray, ...] | None
    advantages: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...] | None = None
    returns: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A prompt and its responses as token ids, as the model gets them."""

    prompt: np.ndarray  # int32 [prompt tokens], truncated, with BOS if the tokenizer adds one
    responses: tuple[np.ndarray, ...]  # int32 [response tokens] each, with EOS unless truncated: (target,) for SFT,
    # (chosen, rejected) for pairs, (response,) for unpaired ones, all different ones for rankings, samples for rollouts
    prompt_index: int  # shared by all examples of a prompt: 0, 1, ... in the order of the data
    label: bool | None = None  # of an unpaired response: whether it is desirable
    weight: float = 1.0  # scales the loss
    mismatched: np.ndarray | None = None  # int32, the response to another prompt, for losses with the need "kl"
    comparisons: Comparisons | None = None  # of the responses of a ranking; each is in a pair
    row: PromptRow | None = None  # of a prompt for online training
    rollout: Rollout | None = None  # of sampled responses
    part: "Part | None" = None  # of an example too large for a microbatch
    documents: np.ndarray | None = None  # of a window of tokens: where documents begin in prompt + response, after its
    # first token; empty without a document mask
    turns: tuple[Turn, ...] = ()  # of a dialogue: earlier responses that are learned too, in order

    @property
    def group_key(self) -> bytes:
        """Equal for examples with one prompt and the same turns.

        A window of tokens shares its first token with no other.
        """
        if self.documents is not None:
            return f"window {self.prompt_index}".encode()
        turns = b"".join(f"turn {turn.num_prompt}".encode() + turn.response.tobytes() for turn in self.turns)
        return turns + self.prompt.tobytes()

    @property
    def is_sampled(self) -> bool:
        """Whether its responses are sampled. They may be none, if all are left out."""
        return self.row is not None


def fingerprint(examples: Iterable[Example]) -> str:
    """A hash of the content of examples, in their order."""
    if isinstance(examples, ExampleTable) and examples.fingerprint is not None:
        return examples.fingerprint
    return content_hash(part for example in examples for part in _parts(example))


def _parts(example: Example) -> Iterator[bytes]:
    yield from (array.tobytes() for array in (example.prompt, *example.responses))
    if example.label is not None:
        yield bytes([example.label])
    if example.weight != 1:
        yield repr(example.weight).encode()
    if example.mismatched is not None:
        yield example.mismatched.tobytes()
    if example.comparisons is not None:
        pairs, margins, weights, _ = example.comparisons
        yield from (array.tobytes() for array in (pairs, margins, weights))
    for turn in example.turns:
        yield repr((turn.num_prompt, turn.weight)).encode()
        yield turn.response.tobytes()
    if example.row is not None:
        yield repr((example.row.text, dict(example.row.columns))).encode()


@dataclass
class Split:
    """The examples of a split, and numbers to report.

    Examples are in the order of the data; those of one prompt are adjacent.

    Args:
        examples: the examples.
        sizes: number of examples of each data set.
        counts: rows, prompts, pairs (for SFT: targets; for unpaired responses: examples, and desirable ones), dropped
            {reason: number}, truncated (examples) and max_length; for ranked responses, rankings and their
            compared_pairs; for dialogues with several targets, joined (examples). Only if above 0: duplicates (of pairs
            or examples), contradictions (those with their opposite), ties and truncated_responses (ranked responses;
            the latter lost their end). Only if there is one: first_bad_row.
        prompt_texts: of each ranking or prompt, the number of its prompt before truncation. Data sets may share it.
    """

    examples: Sequence[Example]
    counts: dict[str, Any] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    prompt_texts: list[int] = field(default_factory=list)


class TokenizedExample(NamedTuple):
    """An example beside its texts, and its tokens before truncation.

    Args:
        example: with all its responses if it is dropped.
        prompt_text: of its prompt.
        response_texts: of its responses.
        prompt: int32 [prompt tokens], before truncation.
        responses: int32 [response tokens] of each of its responses, before truncation.
        num_front: first tokens that a truncated prompt keeps.
        reason: for dropping it.
        num_pairs: compared, those dropped by tokenization too.
        num_made_equal: of them, distinct responses that truncation made equal.
        earlier: the turn of a dialogue that this example continues; both are one example in training.
    """

    example: Example
    prompt_text: Text
    response_texts: tuple[Text, ...]
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    num_front: int
    reason: str | None
    num_pairs: int
    num_made_equal: int
    earlier: Example | None = None


Observe = Callable[[TokenizedExample], None]


def tokenize(
    data: Sequence[tuple[Preferences, TruncationMode]],
    tokenizer: "PreTrainedTokenizerBase",
    batch: "BatchKind",
    counts: RowCounts,
    *,
    max_length: int,
    max_prompt_length: int,
    cache_dir: Path,
    needs_order: bool = False,
    observe: Observe | None = None,
) -> Split:
    """Make the examples of one or more data sets.

    Args:
        data: each data set, with the end of a prompt that truncation keeps.
        tokenizer: needs an EOS token.
        batch: an example is a demonstration or SFT target ("sft"; one a dialogue), a pair, a labelled response
            ("unpaired"; two a pair), or a prompt: with all its pairs ("ranked"), or alone ("rollout").
        counts: rows read and dropped so far; rows dropped here are added.
        max_length: of prompt + response, in tokens.
        max_prompt_length: of a truncated prompt, in tokens, with BOS.
        cache_dir: where encoded texts are cached.
        needs_order: drop rankings unless their pairs are those of one order.
        observe: gets each example beside its text, dropped ones too.
    """
    drafts = _draft(data, batch, counts, tokenizer)
    encoded = encode_cached(texts := list(drafts.texts), tokenizer, cache_dir)
    examples, prompt_texts, num_truncated = list[Example](), list[int](), 0
    table = TableBuilder(encoded, NUM_RESPONSES[batch], _parts) if batch in NUM_RESPONSES else None
    dialogues, prompt_indices = DialogueRows(drafts.examples), dict[int, int]()  # by prompt number, of kept ones
    limit = max_prompt_length if batch == "rollout" else max_length  # a sampled response has any length
    ends, sizes = list(accumulate(len(preferences) for preferences, _ in data)), [0] * len(data)  # ends: of prompts
    for number, draft in enumerate(drafts.examples):
        whole = prompt, responses = encoded.prompt(draft.prompt), tuple(map(encoded.response, draft.responses))
        num_tokens = len(prompt) + sum(map(len, responses))
        num_front = max_prompt_length if draft.truncation_mode == "keep_start" else num_bos(prompt, encoded, tokenizer)
        prompt, responses = truncate(prompt, responses, limit, max_prompt_length, num_front=num_front)
        has_text = [encoded.lengths[index] > 0 for index in draft.responses]
        prompt_index = prompt_indices.get(draft.prompt_number, len(prompt_indices))
        outcome = _example(draft, prompt, responses, has_text, prompt_index, needs_order)
        for reason, num_dropped in outcome.dropped.items():
            counts.drop(reason, _place(texts[draft.prompt].text), num_dropped)
        row, earlier = dialogues.add(number, draft, outcome.example)
        if observe is not None:
            observe(_tokenized(draft, texts, whole, (prompt, responses), num_front, outcome, earlier))
        if outcome.example is None:
            continue
        prompt_indices[draft.prompt_number] = prompt_index
        if table is None:
            examples.append(outcome.example)
            prompt_texts.append(draft.prompt)
        else:
            table.append(outcome.example, draft.prompt, draft.responses, num_front, row)
        sizes[bisect_right(ends, draft.prompt_number)] += earlier is None
        num_truncated += len(prompt) + sum(map(len, responses)) < num_tokens
    made = examples if table is None else table.finish(Example)
    truncation = {"truncated": num_truncated, "max_length": max_length}
    split_counts = count_split(made, COUNTED[batch], counts, truncation, drafts.repeats, tokenizer.eos_token_id)
    return Split(made, split_counts, sizes, prompt_texts)


# ---- Before encoding ----


class Group(NamedTuple):
    """The responses of one example: (target,), (chosen, rejected), (response,) with a label, or a ranking.

    Args:
        comparisons: of a ranking.
        row: of a prompt for online training, without responses.
        previous: of a demonstration, prompt and response of the turn before it.
    """

    responses: tuple[str, ...]
    label: bool | None = None
    weight: float = 1.0
    comparisons: Comparisons | None = None
    row: PromptRow | None = None
    previous: tuple[str, str] | None = None

    @property
    def opposite(self) -> "Group":
        """The group with the opposite preference, and the weight 1."""
        return Group(self.responses[::-1], None if self.label is None else not self.label)


class ExampleDraft(NamedTuple):
    """An example before encoding; texts are given by their index.

    Args:
        previous: the number of the draft with the turn before it.
    """

    prompt_number: int
    truncation_mode: TruncationMode
    prompt: int
    responses: tuple[int, ...]
    group: Group
    previous: int | None = None


@dataclass
class Drafts:
    """Examples before encoding, and their distinct texts."""

    examples: list[ExampleDraft] = field(default_factory=list)
    texts: dict[Text, int] = field(default_factory=dict)  # to their index
    num_duplicates: int = 0
    num_contradictions: int = 0
    turns: dict[tuple[int, ...], int] | None = None  # drafts of a data set by their texts, if it has dialogues

    def add(self, prompt_number: int, mode: TruncationMode, from_template: bool, prompt: str, group: Group) -> None:
        texts = (Text(from_template, text) for text in (prompt, *group.responses))
        prompt_index, *indices = (self.texts.setdefault(text, len(self.texts)) for text in texts)
        previous = None
        if self.turns is not None:
            if group.previous is not None:
                before = (self.texts.get(Text(from_template, text), -1) for text in group.previous)
                previous = self.turns.pop(tuple(before), None)  # one dialogue continues it
            self.turns[prompt_index, *indices] = len(self.examples)
        self.examples.append(ExampleDraft(prompt_number, mode, prompt_index, tuple(indices), group, previous))

    @property
    def repeats(self) -> tuple[int, int]:
        """Numbers of duplicates and contradictions."""
        return self.num_duplicates, self.num_contradictions

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
        has_dialogues = batch == "sft" and any("previous" in each for each in preferences.values())
        drafts.turns = {} if has_dialogues else None
        for prompt, preference in preferences.items():
            # Each response gets an EOS; one that its author wrote would be learned as letters.
            if batch == "ranked":
                responses = [without_eos(text, tokenizer) for text in preference["responses"]]
                useful = _ranking(preference, responses, counts, prompt)
            else:
                groups = [
                    group._replace(responses=tuple(without_eos(text, tokenizer) for text in group.responses))
                    for group in _groups(preference, batch, counts, prompt, tokenizer)
                ]
                if batch not in ("sft", "rollout"):
                    drafts.count_repeats(groups)
                if not groups:
                    counts.drop(f"prompt without {NEEDED[batch]}", _place(prompt))
                useful = _drop_useless(groups, batch, counts, prompt)
            for group in useful:
                drafts.add(prompt_number, mode, preference.get("from_template", False), prompt, group)
            prompt_number += 1
    return drafts


def _place(prompt: str) -> str:
    """A prompt to recognise a dropped row by: its end is next to the response."""
    return f"prompt {prompt!r}" if len(prompt) <= 60 else f"prompt ...{prompt[-60:]!r}"


def _drop_useless(groups: list[Group], batch: "BatchKind", counts: RowCounts, prompt: str) -> Iterator[Group]:
    """The groups of a prompt, without those useless for training."""
    learned: set[tuple[str, ...]] = set()
    for group in groups:
        if not all(text.strip() for text in group.responses):
            counts.drop(USELESS_TEXTS.empty, _place(prompt))
        elif batch == "pairs" and group.responses[0] == group.responses[1]:
            counts.drop(USELESS_TEXTS.equal, _place(prompt))
        elif batch == "sft" and group.responses in learned:
            counts.drop("duplicate response", _place(prompt))
        else:
            learned.add(group.responses)
            yield group


def _ranking(preference: Preference, responses: Sequence[str], counts: RowCounts, prompt: str) -> Iterator[Group]:
    """The ranking of a prompt, if it has a useful pair."""
    if not preference["pairs"]:
        counts.drop(f"prompt without {NEEDED['ranked']}", _place(prompt))
        return
    is_empty, dropped = [not text.strip() for text in responses], Counter[str]()
    kept, comparisons = join_equal(responses, is_empty, read_comparisons(preference), dropped, USELESS_TEXTS)
    for reason, number in dropped.items():
        counts.drop(reason, _place(prompt), number)
    if kept:
        yield Group(tuple(responses[index] for index in kept), comparisons=comparisons)


def _groups(
    preference: Preference,
    batch: "BatchKind",
    counts: RowCounts,
    prompt: str,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[Group]:
    """The examples of a prompt, each with the weight of its row."""
    responses, target = preference["responses"], preference["sft_target"]
    weights = preference.get("weights", [1.0] * len(responses))
    if batch == "rollout":
        rows = preference["rows"].values() if "rows" in preference else [({}, 1.0)]
        from_template = preference.get("from_template", False)
        return [Group((), weight=weight, row=PromptRow(prompt, columns, from_template)) for columns, weight in rows]
    if batch == "sft":
        demonstrations = preference.get("demonstrations", [])
        if target is not None and target not in demonstrations:
            demonstrations = [*demonstrations, target]
        # Of rows with an equal response the first counts, as later ones are dropped.
        by_text = dict(reversed([*zip(responses, weights, strict=True)]))
        previous = {
            text: (before, without_eos(response, tokenizer))
            for text, (before, response) in preference.get("previous", {}).items()
        }
        return [Group((text,), weight=by_text.get(text, 1.0), previous=previous.get(text)) for text in demonstrations]
    pairs = [(responses[chosen], responses[rejected], weights[chosen]) for chosen, rejected in preference["pairs"]]
    if batch == "pairs":
        return [Group((chosen, rejected), weight=weight) for chosen, rejected, weight in pairs]
    labels = preference.get("labels", [])
    labelled = [Group((responses[index],), label, weights[index]) for index, label in labels]
    for chosen, rejected, weight in pairs:
        if chosen == rejected:
            counts.drop(USELESS_TEXTS.equal, _place(prompt))
        else:
            labelled += [Group((chosen,), True, weight), Group((rejected,), False, weight)]
    return labelled


# ---- After encoding ----


def num_bos(prompt: np.ndarray, encoded: EncodedTexts, tokenizer: "PreTrainedTokenizerBase") -> int:
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
    if len(prompt) + max(map(len, responses), default=0) > max_length:
        if len(prompt) > max_prompt_length:
            num_front = min(num_front, max_prompt_length)
            num_back = max_prompt_length - num_front
            prompt = np.concatenate([prompt[:num_front], prompt[len(prompt) - num_back :]])
        responses = tuple(response[: max(max_length - len(prompt), 0)] for response in responses)
    return prompt, responses


class Outcome(NamedTuple):
    """Of a draft after encoding.

    Args:
        example: None if it is dropped.
        kept: indices of the draft's responses in the example.
        dropped: numbers by reason: of examples, or of pairs and responses of a ranking.
    """

    example: Example | None
    kept: Sequence[int]
    dropped: Counter[str]


def _example(
    draft: ExampleDraft,
    prompt: np.ndarray,
    responses: tuple[np.ndarray, ...],
    has_text: Sequence[bool],
    prompt_index: int,
    needs_order: bool,
) -> Outcome:
    """Make the example of a truncated prompt and its responses, or drop it."""
    group = draft.group
    weight, comparisons, dropped = group.weight, group.comparisons, Counter[str]()
    kept, reason = [*range(len(responses))], None
    is_empty = [not has or not len(response) for has, response in zip(has_text, responses, strict=True)]
    if comparisons is not None:
        keys = [response.tobytes() for response in responses]
        kept, comparisons = join_equal(keys, is_empty, comparisons, dropped, USELESS_TOKENS)
        if kept and needs_order:
            kept, comparisons = _untie(kept, comparisons, dropped)
        if not kept:
            return Outcome(None, kept, dropped)
        responses = tuple(responses[index] for index in kept)
        weight = float(comparisons.weights.mean())
    elif any(is_empty):
        reason = USELESS_TOKENS.empty
    elif len(responses) == 2 and np.array_equal(*responses):
        reason = USELESS_TOKENS.equal
    if reason is None and not len(prompt):
        reason = "empty prompt (no token predicts the first of the response)"
    if reason is not None:
        dropped[reason] += 1
        return Outcome(None, kept, dropped)
    example = Example(
        prompt=prompt,
        responses=responses,
        prompt_index=prompt_index,
        label=group.label,
        weight=weight,
        comparisons=comparisons,
        row=group.row,
    )
    return Outcome(example, kept, dropped)


def _untie(kept: list[int], comparisons: Comparisons, dropped: Counter[str]) -> tuple[list[int], Comparisons]:
    """Leave out the tied responses of a ranking, or all of it if it has no order.

    Args:
        kept: numbers of its responses.
        dropped: gets what is left out.
    """
    ranks = find_order(comparisons)
    if ranks is None:
        dropped[WITHOUT_ORDER] += 1
        return [], comparisons
    untied, comparisons = without_ties(comparisons, ranks)
    if not untied:
        dropped[WITHOUT_UNTIED] += 1
    elif len(untied) < len(kept):
        dropped[TIED] += len(kept) - len(untied)
    return [kept[index] for index in untied], comparisons


def _tokenized(
    draft: ExampleDraft,
    texts: Sequence[Text],
    whole: tuple[np.ndarray, tuple[np.ndarray, ...]],
    truncated: tuple[np.ndarray, tuple[np.ndarray, ...]],
    num_front: int,
    outcome: Outcome,
    earlier: Example | None,
) -> TokenizedExample:
    """What an observer gets of a draft, its prompt and its responses."""
    example, kept = outcome.example, outcome.kept
    if example is None:
        example, kept = Example(*truncated, draft.prompt_number, draft.group.label), range(len(draft.responses))
    comparisons = draft.group.comparisons
    pairs = [(0, 1)] if len(kept) == 2 else []
    if comparisons is not None:
        pairs = comparisons.pairs.tolist()
    return TokenizedExample(
        example,
        prompt_text=texts[draft.prompt],
        response_texts=tuple(texts[draft.responses[index]] for index in kept),
        prompt=whole[0],
        responses=tuple(whole[1][index] for index in kept),
        num_front=num_front,
        reason=", ".join(outcome.dropped) if outcome.example is None else None,
        num_pairs=len(pairs),
        num_made_equal=_count_made_equal(pairs, whole[1], truncated[1]),
        earlier=earlier,
    )


def _count_made_equal(
    pairs: Sequence[Sequence[int]], whole: Sequence[np.ndarray], truncated: Sequence[np.ndarray]
) -> int:
    """Number of pairs of distinct responses that truncation made equal."""
    if sum(map(len, whole)) == sum(map(len, truncated)):
        return 0
    return sum(
        np.array_equal(truncated[left], truncated[right]) and not np.array_equal(whole[left], whole[right])
        for left, right in pairs
    )
