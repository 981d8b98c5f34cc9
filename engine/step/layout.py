"""Lay examples out in rows of tokens, the input of the model.

packed: one row without padding, made of groups. A group is a prompt and its responses, [P | R1 | R2 | ...].
- Every response sees its prompt and itself. Its positions start at len(P). So each prompt is run once.
- A response's last token predicts nothing and is not fed. The prompt's last position predicts its first token.
- A score head reads the last token of a response, so it is fed.
- A window of tokens is a group for each of its documents: the prompt is the document's first token.
- An earlier turn of a dialogue feeds nothing: its response stands in the prompt of the last one, and has targets there.

padded: one row per response. It gives the same log-probs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.dialogues import split_turns
from engine.data.example_table import ExampleTable
from engine.data.examples import Example
from engine.step.attention import Segments
from engine.step.samples import Samples, lay_out_samples, no_samples
from utils import to_device


@dataclass(frozen=True)
class GroupSpan:
    """Targets, responses and examples of consecutive groups of a microbatch.

    An earlier turn of a dialogue is a group and an example of its own here.
    """

    targets: slice
    responses: slice
    examples: slice


@dataclass
class Microbatch:
    """Examples of a batch, laid out for one forward pass.

    Every field is in the order of the groups.

    Packed: one row, tokens is the sum over groups. Padded: one row per response, tokens is the longest.
    """

    input_ids: Tensor  # int64 [rows, tokens]
    predict_index: Tensor  # int64 [targets], position of the predicting hidden state in rows * tokens
    targets: Tensor  # int64 [targets], the tokens of all responses
    response_index: Tensor  # int64 [targets], number of each target's response, ascending
    response_lengths: Tensor  # int64 [responses]
    num_responses: Tensor  # int64 [groups]
    chosen: Tensor  # int64 [examples], number of the chosen response (the target of SFT, an unpaired response)
    rejected: Tensor | None  # int64 [examples]; None for examples with one response
    labels: Tensor | None  # bool [examples], true for desirable responses; None if they have none
    weights: Tensor | None  # fp32 [examples], of the losses, fp64 of windows; None if all are 1
    # Of ranked responses, padded. None for others.
    rankings: Tensor | None  # int64 [examples, k], numbers of responses; -1 where there is none
    pairs: Tensor | None  # int64 [examples, p, 2], the better and the worse response as columns of rankings
    margins: Tensor | None  # fp32 [examples, p], of the pairs
    pair_weights: Tensor | None  # fp32 [examples, p], 0 where there is no pair
    groups: list[GroupSpan]
    responses: list[tuple[np.ndarray, np.ndarray]]  # prompt and response tokens of each response
    prompt_indices: list[int]  # prompt numbers in the data set
    num_tokens: int  # fed, without padding
    score_index: Tensor | None  # int64 [responses], position of the last token in rows * tokens; None if not fed
    position_ids: Tensor | None = None  # packed: int64 [1, tokens]
    segments: Segments | None = None  # packed: the division of the row, for attention
    attention_mask: Tensor | None = None  # padded: int64 [rows, tokens], 1 at tokens
    # For losses with the need "shared length": of each pair, the targets of the first min(|chosen|, |rejected|) tokens
    # of its chosen response, then of its rejected one.
    shared_index: Tensor | None = None  # int64 [shared targets]
    shared_lengths: Tensor | None = None  # int64 [2 * examples], min(|chosen|, |rejected|) twice
    shared_offsets: Sequence[int] = ()  # where each example's part of shared_index starts, and the end
    samples: Samples | None = None  # of rollouts
    num_left_out: int = 0  # further examples, without responses; their loss is 0
    num_continued: int = 0  # examples that are a later part of one
    num_turns: int = 0  # examples that are an earlier turn of one

    @property
    def num_examples(self) -> int:
        return len(self.chosen)

    @property
    def span(self) -> GroupSpan:
        """The span of all groups."""
        return GroupSpan(slice(0, len(self.targets)), slice(0, len(self.responses)), slice(0, self.num_examples))

    def to(self, device: torch.device) -> "Microbatch":
        """A microbatch with its tensors on device."""
        tensors = {name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if device.type == "cuda" and self.segments is not None:
            self.segments.varlen(device)
        samples = self.samples.to(device) if self.samples else None
        return Microbatch(**{**vars(self), **tensors, "samples": samples})


@dataclass
class _Group:
    """Examples with equal prompt tokens, and their distinct responses."""

    prompt: np.ndarray
    responses: list[np.ndarray] = field(default_factory=list)
    indices: dict[bytes, int] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    documents: list[np.ndarray] = field(default_factory=list)  # of a window of tokens, its last token included
    turns: list["_Group"] = field(default_factory=list)  # earlier turns of a dialogue, inside the prompt

    def add(self, example: Example) -> None:
        *earlier, _ = split_turns(example)
        if not self.turns:
            self.turns = [_Group(turn.prompt) for turn in earlier]
        for group, turn in zip(self.turns, earlier, strict=True):
            group.add(turn)
        for response in example.responses:
            if self.indices.setdefault(response.tobytes(), len(self.responses)) == len(self.responses):
                self.responses.append(response)
        self.examples.append(example)

    def add_window(self, example: Example) -> None:
        """Add a window of tokens. The first token of a document predicts, but is not predicted."""
        assert example.documents is not None
        window = np.concatenate([example.prompt, *example.responses])
        self.documents = [each for each in np.split(window, example.documents) if len(each) > 1]
        self.responses = [np.concatenate([each[1:] for each in self.documents])]
        self.indices = {example.responses[0].tobytes(): 0}
        self.examples.append(example)

    def responses_of(self, example: Example, first: int) -> tuple[int, ...]:
        """Numbers of an example's responses; the group's first is number first."""
        return tuple(first + self.indices[response.tobytes()] for response in example.responses)


def _groups(examples: Sequence[Example]) -> list[_Group]:
    groups: dict[bytes, _Group] = {}
    for example in examples:
        group = groups.setdefault(example.group_key, _Group(example.prompt))
        if example.documents is None:
            group.add(example)
        else:
            group.add_window(example)
    return list(groups.values())


def in_group_order(examples: Sequence[Example]) -> list[Example]:
    """Examples in the order of lay_out()."""
    return [example for group in _groups(examples) for example in group.examples]


def lay_out(
    examples: Sequence[Example],
    layout: str = "packed",
    pad_token_id: int = 0,
    *,
    with_shared: bool = False,
    feeds_last_token: bool = False,
) -> Microbatch:
    """Lay examples out for one forward pass.

    Examples with the same prompt become one group, so their order may change. Losses are sums, so this is harmless.

    Args:
        layout: "packed" or "padded".
        pad_token_id: for padded rows.
        with_shared: fill the fields named shared_.
        feeds_last_token: of responses, for a score head.
    """
    fed_groups = _groups(examples)
    groups = [each for group in fed_groups for each in (*group.turns, group)]
    assert groups
    spans, responses, numbers = _number(groups)
    # All in numpy. This code runs in a thread beside the model. Torch operations here would start more threads.
    # These slow down every operation of the model, by a third with GNU's OpenMP on two cores.
    lengths = np.array([len(response) for _, response in responses])
    in_order = [example for group in groups for example in group.examples]
    shared: dict[str, Any] = {
        "targets": _tensor([response for _, response in responses]),
        "response_index": torch.from_numpy(np.repeat(np.arange(len(responses)), lengths)),
        "response_lengths": torch.from_numpy(lengths),
        "num_responses": torch.tensor([len(group.responses) for group in groups]),
        "chosen": torch.tensor([first for first, *_ in numbers]),
        "rejected": _rejected(in_order[0], numbers),
        **_labels_and_weights(in_order),
        **_rankings(in_order, numbers),
        "groups": spans,
        "responses": responses,
        "prompt_indices": sorted({example.prompt_index for example in examples}),
        "num_turns": sum(len(group.turns) * len(group.examples) for group in fed_groups),
        "samples": lay_out_samples(in_order, numbers, lengths) if in_order[0].is_sampled else None,
    }
    if with_shared and shared["rejected"] is not None:  # sampled responses are single
        shared |= _shared_targets(np.array(numbers), lengths)
    is_packed = layout == "packed"
    rows = _packed_row(fed_groups, feeds_last_token) if is_packed else _padded_rows(fed_groups, pad_token_id)
    if not feeds_last_token:
        rows["score_index"] = None
    return Microbatch(**shared, **rows)


def _number(
    groups: Sequence[_Group],
) -> tuple[list[GroupSpan], list[tuple[np.ndarray, np.ndarray]], list[tuple[int, ...]]]:
    """The span of each group, prompt and tokens of each response, and the numbers of each example's responses."""
    spans: list[GroupSpan] = []
    responses: list[tuple[np.ndarray, np.ndarray]] = []
    numbers: list[tuple[int, ...]] = []
    num_targets = 0
    for group in groups:
        first_response, first_example, first_target = len(responses), len(numbers), num_targets
        responses += [(group.prompt, response) for response in group.responses]
        numbers += [group.responses_of(example, first_response) for example in group.examples]
        num_targets += sum(len(response) for response in group.responses)
        spans.append(
            GroupSpan(
                targets=slice(first_target, num_targets),
                responses=slice(first_response, len(responses)),
                examples=slice(first_example, len(numbers)),
            )
        )
    return spans, responses, numbers


def _rejected(first: Example, numbers: Sequence[tuple[int, ...]]) -> Tensor | None:
    """Numbers of the rejected responses of pairs, [examples]; None for other examples."""
    is_pair = first.comparisons is None and not first.is_sampled and len(numbers[0]) == 2
    return torch.tensor([second for _, second in numbers]) if is_pair else None


def _labels_and_weights(examples: Sequence[Example]) -> dict[str, Tensor | None]:
    has_labels = examples[0].label is not None
    has_weights = any(example.weight != 1 for example in examples)
    dtype = torch.float32 if examples[0].documents is None else torch.float64  # a mean over tokens, exactly
    return {
        "labels": torch.tensor([example.label for example in examples]) if has_labels else None,
        "weights": torch.tensor([example.weight for example in examples], dtype=dtype) if has_weights else None,
    }


def _shared_targets(pairs: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """The fields named shared_.

    Args:
        pairs: numbers of the chosen and the rejected response, [examples, 2].
        lengths: of the responses.
    """
    assert pairs.shape[1] == 2
    counts = np.repeat(lengths[pairs].min(axis=1), 2)
    starts = (np.cumsum(lengths) - lengths)[pairs].flatten()  # targets
    ends = np.cumsum(counts)
    index = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
    return {
        "shared_index": torch.from_numpy(index),
        "shared_lengths": torch.from_numpy(counts),
        "shared_offsets": [0, *ends[1::2].tolist()],
    }


def _rankings(examples: Sequence[Example], numbers: Sequence[tuple[int, ...]]) -> dict[str, Tensor | None]:
    comparisons = [example.comparisons for example in examples if example.comparisons is not None]
    if not comparisons:
        return {"rankings": None, "pairs": None, "margins": None, "pair_weights": None}
    num_pairs = max(len(each.pairs) for each in comparisons)
    rankings = np.full((len(numbers), max(map(len, numbers))), -1, dtype=np.int64)
    pairs = np.zeros((len(numbers), num_pairs, 2), dtype=np.int64)
    margins, weights = np.zeros((2, len(numbers), num_pairs), dtype=np.float32)
    for row, (each, of_example) in enumerate(zip(comparisons, numbers, strict=True)):
        num = len(each.pairs)
        rankings[row, : len(of_example)] = of_example
        pairs[row, :num], margins[row, :num], weights[row, :num] = each.pairs, each.margins, each.weights
    padded = {"rankings": rankings, "pairs": pairs, "margins": margins, "pair_weights": weights}
    return {name: torch.from_numpy(array) for name, array in padded.items()}


def empty_microbatch(num_responses: int, layout: str = "packed", feeds_last_token: bool = False) -> Microbatch:
    """A microbatch without examples, for a rank with fewer microbatches than others.

    It runs one token, predicts nothing, and gives every parameter a gradient of 0.

    Args:
        num_responses: per example of the batch kind, 1 or 2.
    """
    no_tokens, one_token = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    empty = slice(0, 0)
    return Microbatch(
        input_ids=one_token,
        predict_index=no_tokens,
        targets=no_tokens,
        response_index=no_tokens,
        response_lengths=no_tokens,
        num_responses=no_tokens,
        chosen=no_tokens,
        rejected=no_tokens if num_responses == 2 else None,
        labels=no_tokens.bool(),
        weights=None,
        rankings=no_tokens.view(0, 1),
        pairs=no_tokens.view(0, 1, 2),
        margins=no_tokens.view(0, 1).float(),
        pair_weights=no_tokens.view(0, 1).float(),
        groups=[GroupSpan(empty, empty, empty)],
        responses=[],
        prompt_indices=[],
        num_tokens=0,
        score_index=no_tokens if feeds_last_token else None,
        position_ids=one_token if layout == "packed" else None,
        segments=Segments([(1, 0)]) if layout == "packed" else None,
        attention_mask=None if layout == "packed" else torch.ones_like(one_token),
        shared_index=no_tokens,
        shared_lengths=no_tokens,
        shared_offsets=[0],
        samples=no_samples(),
    )


def _packed_row(groups: Sequence[_Group], feeds_last_token: bool) -> dict[str, Any]:
    tokens, positions, predict_index, score_index = [], [], [], []
    num_left_out = 0 if feeds_last_token else 1
    end = 0  # of the row so far
    segments: list[tuple[int, ...]] = []
    for group in groups:
        for document in group.documents:
            num_fed = len(document) - 1
            tokens.append(document[:-1])
            positions.append(np.arange(num_fed))
            predict_index.append(end + positions[-1])
            segments.append((1, num_fed - 1))
            end += num_fed
        if group.documents:
            score_index.append(end - 1)
            continue
        assert not group.turns or not feeds_last_token
        predict_index += [end + index for index in _predict_turns(group)]
        segments.append((len(group.prompt), *(len(response) - num_left_out for response in group.responses)))
        tokens.append(group.prompt)
        positions.append(np.arange(len(group.prompt)))
        end += len(group.prompt)
        last_of_prompt = np.array([end - 1])
        for response in group.responses:
            num_fed = len(response) - num_left_out
            start, end = end, end + num_fed
            tokens.append(response[:num_fed])
            positions.append(len(group.prompt) + np.arange(num_fed))
            predict_index += [last_of_prompt, start + np.arange(len(response) - 1)]
            score_index.append(end - 1)
    return {
        "input_ids": _tensor(tokens)[None],
        "position_ids": _tensor(positions)[None],
        "predict_index": _tensor(predict_index),
        "num_tokens": end,
        "score_index": torch.tensor(score_index),
        "segments": Segments(segments),
    }


def _predict_turns(group: _Group) -> list[np.ndarray]:
    """Positions in the prompt that predict the response of each earlier turn."""
    return [len(turn.prompt) - 1 + np.arange(len(turn.responses[0])) for turn in group.turns]


def _padded_rows(groups: Sequence[_Group], pad_token_id: int) -> dict[str, Any]:
    responses = [(group.prompt, response) for group in groups for response in group.responses]
    turns = {}  # by the row of their group's first response
    for group, row in zip(groups, accumulate((len(group.responses) for group in groups), initial=0), strict=False):
        turns[row] = _predict_turns(group)
    lengths = [len(prompt) + len(response) for prompt, response in responses]
    input_ids = np.full((len(responses), max(lengths)), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    predict_index = []
    for row, (prompt, response) in enumerate(responses):
        input_ids[row, : lengths[row]] = np.concatenate([prompt, response])
        attention_mask[row, : lengths[row]] = 1
        predict_index += [row * max(lengths) + index for index in turns.get(row, ())]
        predict_index.append(row * max(lengths) + len(prompt) - 1 + np.arange(len(response)))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "predict_index": _tensor(predict_index),
        "num_tokens": sum(lengths),
        "score_index": torch.from_numpy(np.arange(len(lengths)) * max(lengths) + np.array(lengths) - 1),
        "attention_mask": torch.from_numpy(attention_mask),
    }


def _tensor(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))


def num_fed_tokens(example: Example, layout: str = "packed", feeds_last_token: bool = False) -> int:
    """Tokens of a microbatch of this example alone, padding included.

    Packed: its prompt once, and each response, without its last token unless that is fed.
    """
    if layout == "padded":
        return len(example.responses) * (len(example.prompt) + max(map(len, example.responses)))
    num_left_out = 0 if feeds_last_token else 1
    return len(example.prompt) + sum(len(response) - num_left_out for response in example.responses)


def fed_tokens(examples: Sequence[Example], layout: str = "packed", feeds_last_token: bool = False) -> np.ndarray:
    """num_fed_tokens of each example, int64 [examples]."""
    if not isinstance(examples, ExampleTable):
        numbers = (num_fed_tokens(example, layout, feeds_last_token) for example in examples)
        return np.fromiter(numbers, np.int64, len(examples))
    prompts, responses = examples.prompt_lengths, examples.response_lengths
    if layout == "padded":
        return len(responses) * (prompts + np.max(responses, axis=0))
    num_left_out = 0 if feeds_last_token else len(responses)
    return prompts + np.sum(responses, axis=0) - num_left_out
