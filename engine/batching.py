"""Which examples make a batch, and how examples are laid out in the rows that the model runs over.

A packed microbatch is one row of tokens without padding, made of groups: a prompt and its responses laid end to end,
[P | R1 | R2 | ...]. Every response attends to its prompt and to itself and starts at position len(P), so a prompt is
run once however many responses share it. A response's last token predicts nothing and is not fed; its first token is
predicted by the prompt's last position. The padded layout, one row per response, gives the same log-probs.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import Segments
from engine.tokenization import Example
from utils import to_device


@dataclass(frozen=True)
class Part:
    """A run of whole groups of a microbatch: its targets, its responses and its examples."""

    targets: slice
    responses: slice
    examples: slice


@dataclass
class Microbatch:
    """Some examples of a batch, laid out for one forward pass; in every field, groups follow one another.

    rows are 1 and tokens the sum of all groups when packed; when padded, rows are responses and tokens the longest.
    """

    input_ids: Tensor  # int64 [rows, tokens]
    predict_index: Tensor  # int64 [targets], into rows * tokens: the position whose hidden state predicts the target
    targets: Tensor  # int64 [targets], the tokens of all responses
    response_index: Tensor  # int64 [targets], the response that each target belongs to, ascending
    response_lengths: Tensor  # int64 [responses]
    chosen: Tensor  # int64 [examples], the response that is chosen (the target of SFT)
    rejected: Tensor | None  # int64 [examples]; None for SFT
    groups: list[Part]
    responses: list[tuple[np.ndarray, np.ndarray]]  # prompt and response tokens of each response
    prompt_indices: list[int]  # of the prompts, in the data set
    num_tokens: int  # fed, without padding
    position_ids: Tensor | None = None  # packed: int64 [1, tokens]
    segments: Segments | None = None  # packed: who attends to whom
    attention_mask: Tensor | None = None  # padded: int64 [rows, tokens], 1 at tokens

    @property
    def num_examples(self) -> int:
        return len(self.chosen)

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch with its tensors on device."""
        tensors = {name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if device.type == "cuda" and self.segments is not None:
            self.segments.varlen(device)
        return Microbatch(**{**vars(self), **tensors})


@dataclass
class _Group:
    """Examples that share a prompt, token for token, with the distinct responses among them."""

    prompt: np.ndarray
    responses: list[np.ndarray] = field(default_factory=list)
    indices: dict[bytes, int] = field(default_factory=dict)
    examples: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, example: Example) -> None:
        for response in example.responses:
            if self.indices.setdefault(response.tobytes(), len(self.responses)) == len(self.responses):
                self.responses.append(response)
        self.examples.append(tuple(self.indices[response.tobytes()] for response in example.responses))


def _groups(examples: Sequence[Example]) -> list[_Group]:
    groups: dict[bytes, _Group] = {}
    for example in examples:
        groups.setdefault(example.prompt.tobytes(), _Group(example.prompt)).add(example)
    return list(groups.values())


def lay_out(examples: Sequence[Example], layout: str = "packed", pad_token_id: int = 0) -> Microbatch:
    """Lay examples out for one forward pass: "packed" or "padded" (which needs a pad_token_id).

    Examples with the same prompt become one group, so their order may change; losses are summed, so it does not matter.
    """
    groups = _groups(examples)
    assert groups
    parts: list[Part] = []
    responses: list[tuple[np.ndarray, np.ndarray]] = []
    pairs: list[tuple[int, ...]] = []
    num_targets = 0
    for group in groups:
        first_response, first_example, first_target = len(responses), len(pairs), num_targets
        responses += [(group.prompt, response) for response in group.responses]
        pairs += [tuple(first_response + index for index in example) for example in group.examples]
        num_targets += sum(len(response) for response in group.responses)
        parts.append(
            Part(
                targets=slice(first_target, num_targets),
                responses=slice(first_response, len(responses)),
                examples=slice(first_example, len(pairs)),
            )
        )
    # All in numpy: this runs in a thread beside the model, and a torch operation that starts threads of its own there
    # would slow down every operation of the model (by a third, with GNU's OpenMP on two cores).
    lengths = np.array([len(response) for _, response in responses])
    indices = torch.tensor(pairs)
    shared: dict[str, Any] = {
        "targets": _tensor([response for _, response in responses]),
        "response_index": torch.from_numpy(np.repeat(np.arange(len(responses)), lengths)),
        "response_lengths": torch.from_numpy(lengths),
        "chosen": indices[:, 0].contiguous(),
        "rejected": indices[:, 1].contiguous() if indices.shape[1] == 2 else None,
        "groups": parts,
        "responses": responses,
        "prompt_indices": sorted({example.prompt_index for example in examples}),
    }
    rows = _packed_row(groups) if layout == "packed" else _padded_rows(responses, pad_token_id)
    return Microbatch(**shared, **rows)


def lay_out_nothing(num_responses: int, layout: str = "packed") -> Microbatch:
    """A microbatch without examples, for a process that has none left while others have: it runs one token, predicts
    nothing, and gives every parameter a gradient of 0.

    Args:
        num_responses: of an example, had there been any: 1 or 2.
    """
    none, one = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    nothing = slice(0, 0)
    return Microbatch(
        input_ids=one,
        predict_index=none,
        targets=none,
        response_index=none,
        response_lengths=none,
        chosen=none,
        rejected=none if num_responses == 2 else None,
        groups=[Part(nothing, nothing, nothing)],
        responses=[],
        prompt_indices=[],
        num_tokens=0,
        position_ids=one if layout == "packed" else None,
        segments=Segments([(1, 0)]) if layout == "packed" else None,
        attention_mask=None if layout == "packed" else torch.ones_like(one),
    )


def _packed_row(groups: Sequence[_Group]) -> dict[str, Any]:
    tokens, positions, predict_index = [], [], []
    end = 0  # of what has been laid out
    for group in groups:
        tokens.append(group.prompt)
        positions.append(np.arange(len(group.prompt)))
        end += len(group.prompt)
        last_of_prompt = np.array([end - 1])
        for response in group.responses:
            start, end = end, end + len(response) - 1
            tokens.append(response[:-1])
            positions.append(len(group.prompt) + np.arange(len(response) - 1))
            predict_index += [last_of_prompt, np.arange(start, end)]
    return {
        "input_ids": _tensor(tokens)[None],
        "position_ids": _tensor(positions)[None],
        "predict_index": _tensor(predict_index),
        "num_tokens": end,
        "segments": Segments([(len(group.prompt), *(len(r) - 1 for r in group.responses)) for group in groups]),
    }


def _padded_rows(responses: Sequence[tuple[np.ndarray, np.ndarray]], pad_token_id: int) -> dict[str, Any]:
    lengths = [len(prompt) + len(response) for prompt, response in responses]
    input_ids = np.full((len(responses), max(lengths)), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    predict_index = []
    for row, (prompt, response) in enumerate(responses):
        input_ids[row, : lengths[row]] = np.concatenate([prompt, response])
        attention_mask[row, : lengths[row]] = 1
        predict_index.append(row * max(lengths) + len(prompt) - 1 + np.arange(len(response)))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "predict_index": _tensor(predict_index),
        "num_tokens": sum(lengths),
        "attention_mask": torch.from_numpy(attention_mask),
    }


def _tensor(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))


def num_fed_tokens(example: Example, layout: str = "packed") -> int:
    """Tokens that a microbatch of this example alone holds, padding included; packed: its prompt once, each response
    without its last token."""
    if layout == "padded":
        return len(example.responses) * (len(example.prompt) + max(map(len, example.responses)))
    return len(example.prompt) + sum(len(response) - 1 for response in example.responses)


def cut(examples: Sequence[Example], num_parts: int, token_budget: int, layout: str = "packed") -> list[list[Example]]:
    """Cut a batch into num_parts microbatches, or as many more as it takes for none to hold over token_budget tokens.

    The examples of a prompt stay together, so that it is fed once, unless they alone are over the budget; an example
    that is over it alone makes its own microbatch. The longest go first, each where it leaves the largest microbatch
    smallest, so that all are about equally full.
    """

    def extent(group: Sequence[Example]) -> tuple[int, int]:  # tokens of a row, rows
        if layout == "packed":
            return _num_packed(group), 1
        rows = [len(example.prompt) + len(response) for example in group for response in example.responses]
        return max(rows), len(rows)

    def joined(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
        return (one[0] + other[0], 1) if layout == "packed" else (max(one[0], other[0]), one[1] + other[1])

    by_prompt: dict[bytes, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt.tobytes(), []).append(example)
    groups: list[list[Example]] = []
    for group in by_prompt.values():
        groups.append([])
        for example in group:
            if groups[-1] and math.prod(extent([*groups[-1], example])) > token_budget:
                groups.append([])
            groups[-1].append(example)
    extents = [extent(group) for group in groups]
    sizes = [math.prod(each) for each in extents]
    too_long = [[index] for index in range(len(groups)) if sizes[index] > token_budget]
    longest_first = sorted((i for i in range(len(groups)) if sizes[i] <= token_budget), key=lambda i: -sizes[i])
    fewest = max(num_parts - len(too_long), math.ceil(sum(sizes[i] for i in longest_first) / token_budget))
    microbatches: list[list[int]] = []
    for num in range(min(fewest, len(longest_first)), len(longest_first) + 1):
        microbatches = [[] for _ in range(num)]
        filled = [(0, 0)] * num
        for index in longest_first:
            after = [joined(held, extents[index]) for held in filled]
            fed = [tokens * rows for tokens, rows in after]
            smallest = fed.index(min(fed))
            microbatches[smallest].append(index)
            filled[smallest] = after[smallest]
        if max(map(math.prod, filled), default=0) <= token_budget:
            break
    in_order = sorted(sorted(held) for held in (*microbatches, *too_long))
    return [[example for index in held for example in groups[index]] for held in in_order]


def cut_for(
    num_ranks: int, examples: Sequence[Example], num_parts: int, token_budget: int, layout: str = "packed"
) -> list[list[Example]]:
    """Cut a batch as cut does into microbatches that num_ranks processes take in turns, about num_parts each: as many
    for each, all about equally full. Where there are too few examples for that, some microbatches are empty."""
    microbatches = cut(examples, num_ranks * num_parts, token_budget, layout)
    wanted = math.ceil(len(microbatches) / num_ranks) * num_ranks
    if len(microbatches) < wanted:
        microbatches = cut(examples, wanted, token_budget, layout)
        wanted = math.ceil(len(microbatches) / num_ranks) * num_ranks
    return microbatches + [[] for _ in range(wanted - len(microbatches))]


def _num_packed(group: Sequence[Example]) -> int:
    """Tokens that a packed row holds for examples of one prompt, each distinct response once."""
    responses = {response.tobytes(): len(response) - 1 for example in group for response in example.responses}
    return len(group[0].prompt) + sum(responses.values())


def plan_batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    seed: int,
    n_epochs: int | None,
    n_examples: int | None,
    length_grouping: bool = False,
) -> Iterator[list[int]]:
    """Indices of the examples of each batch, the same for the same arguments.

    Each epoch goes over the prompts in an order of its own, drawn from seed; the examples of one prompt stay together.
    Batches run on across epochs. Ends after n_epochs or n_examples, whichever comes first; the last batch may be short.

    Args:
        length_grouping: put prompts of similar lengths into the same batch, the batches in random order; one whose
            examples are cut by the end of a batch may go on in any other.
    """
    by_prompt: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        by_prompt.setdefault(example.prompt_index, []).append(index)
    prompts = list(by_prompt.values())
    left = num_planned(len(examples), n_epochs, n_examples)
    batch: list[int] = []
    epoch = 0
    while left > 0:
        rng = random.Random(f"{seed}/{epoch}")
        rng.shuffle(prompts)
        order = [index for prompt in prompts for index in prompt]
        if length_grouping:
            order = _grouped_by_length(prompts, examples, batch_size, len(batch), rng)
        epoch += 1
        for index in order:
            batch.append(index)
            left -= 1
            if len(batch) == batch_size or left == 0:
                yield batch
                batch = []
            if left == 0:
                break


# Batches whose examples are sorted by length among each other: more make them more alike, and the order less random.
GROUPED_BATCHES = 50


def _grouped_by_length(
    prompts: Sequence[Sequence[int]], examples: Sequence[Example], batch_size: int, num_begun: int, rng: random.Random
) -> list[int]:
    """An order of the examples of prompts whose batches hold similar lengths; the first batch has num_begun already."""

    def longest(prompt: Sequence[int]) -> int:
        return max(num_fed_tokens(examples[index]) for index in prompt)

    left = list(prompts)
    begun: list[int] = []
    while num_begun and left and len(begun) < batch_size - num_begun:
        begun += left.pop(0)
    window = GROUPED_BATCHES * batch_size
    sorted_windows = (sorted(left[start : start + window], key=longest) for start in range(0, len(left), window))
    order = [index for some in sorted_windows for prompt in some for index in prompt]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    short = batches.pop() if len(order) % batch_size else []  # elsewhere it would shift all that follow it
    rng.shuffle(batches)
    return [*begun, *(index for batch in batches for index in batch), *short]


def num_planned(num_examples: int, n_epochs: int | None, n_examples: int | None) -> int:
    """How many examples a run trains on; n_epochs or n_examples may be None, not both."""
    limits = [n_examples] if n_examples is not None else []
    if n_epochs is not None:
        limits.append(n_epochs * num_examples)
    return min(limits)
