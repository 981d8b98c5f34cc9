"""Split a batch into microbatches by a token budget."""

import math
from collections.abc import Sequence
from dataclasses import replace

from engine.data.examples import Example
from engine.data.parts import cut_responses

Extent = tuple[int, int]  # tokens of a row, rows


def split_batch(
    examples: Sequence[Example],
    num_parts: int,
    token_budget: int,
    layout: str = "packed",
    feeds_last_token: bool = False,
    cuts_examples: bool = False,
) -> list[list[Example]]:
    """Split a batch into num_parts microbatches of at most token_budget tokens.

    - More than num_parts where the budget needs it, or the minimum required.
    - The examples of a prompt stay together and share it, unless together they exceed the budget.
    - An example over the budget is a microbatch of its own. With cuts_examples, its responses are divided.
    - Longest first, each goes where it leaves the largest microbatch smallest. So all are about equally full.
    """
    if cuts_examples:
        examples = [part for each in examples for part in _cut(each, token_budget, layout, feeds_last_token)]
    groups = _group_by_prompt(examples, token_budget, layout, feeds_last_token)
    extents = [_extent(group, layout, feeds_last_token) for group in groups]
    sizes = [math.prod(extent) for extent in extents]
    too_long = [[index] for index in range(len(groups)) if sizes[index] > token_budget]
    longest_first = sorted((i for i in range(len(groups)) if sizes[i] <= token_budget), key=lambda i: -sizes[i])
    fewest = max(num_parts - len(too_long), math.ceil(sum(sizes[i] for i in longest_first) / token_budget))
    microbatches: list[list[int]] = []
    for num_microbatches in range(min(fewest, len(longest_first)), len(longest_first) + 1):
        microbatches, largest = _distribute(longest_first, extents, num_microbatches, layout)
        if largest <= token_budget:
            break
    in_order = sorted(sorted(indices) for indices in (*microbatches, *too_long))
    return [[example for index in indices for example in groups[index]] for indices in in_order]


def split_for_ranks(
    num_ranks: int,
    examples: Sequence[Example],
    num_parts: int,
    token_budget: int,
    layout: str = "packed",
    feeds_last_token: bool = False,
    cuts_examples: bool = False,
) -> list[list[Example]]:
    """Split a batch into about num_parts microbatches for each of num_ranks ranks.

    Every rank gets the same number, all about equally full. With too few examples, some microbatches are empty.
    """
    how = (token_budget, layout, feeds_last_token, cuts_examples)
    microbatches = split_batch(examples, num_ranks * num_parts, *how)
    num_required = math.ceil(len(microbatches) / num_ranks) * num_ranks
    if len(microbatches) < num_required:
        microbatches = split_batch(examples, num_required, *how)
        num_required = math.ceil(len(microbatches) / num_ranks) * num_ranks
    return microbatches + [[] for _ in range(num_required - len(microbatches))]


def _cut(example: Example, token_budget: int, layout: str, feeds_last_token: bool) -> list[Example]:
    """Cut the responses of an example into parts within the budget, where possible."""

    def is_too_large(start: int, end: int) -> bool:
        responses = replace(example, responses=example.responses[start:end])
        return math.prod(_extent([responses], layout, feeds_last_token)) > token_budget

    starts = [0]
    if not is_too_large(0, len(example.responses)):
        return [example]
    for end in range(2, len(example.responses) + 1):
        if is_too_large(starts[-1], end):
            starts.append(end - 1)
    return cut_responses(example, starts) if len(starts) > 1 else [example]


def _group_by_prompt(
    examples: Sequence[Example], token_budget: int, layout: str, feeds_last_token: bool
) -> list[list[Example]]:
    """Group examples by prompt, within the budget where possible."""
    by_prompt: dict[bytes, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.group_key, []).append(example)
    groups: list[list[Example]] = []
    for examples_of_prompt in by_prompt.values():
        groups.append([])
        for example in examples_of_prompt:
            extent = _extent([*groups[-1], example], layout, feeds_last_token)
            if groups[-1] and math.prod(extent) > token_budget:
                groups.append([])
            groups[-1].append(example)
    return groups


def _distribute(
    longest_first: Sequence[int], extents: Sequence[Extent], num_microbatches: int, layout: str
) -> tuple[list[list[int]], int]:
    """Distribute groups over microbatches, each to where it leaves the smallest.

    Args:
        longest_first: indices of the groups.
        extents: of each group.

    Returns:
        the indices in each microbatch, and the tokens of the largest.
    """
    microbatches: list[list[int]] = [[] for _ in range(num_microbatches)]
    filled: list[Extent] = [(0, 0)] * num_microbatches
    for index in longest_first:
        joined = [_join(extent, extents[index], layout) for extent in filled]
        sizes = [math.prod(extent) for extent in joined]
        smallest = sizes.index(min(sizes))
        microbatches[smallest].append(index)
        filled[smallest] = joined[smallest]
    return microbatches, max(map(math.prod, filled), default=0)


def _extent(group: Sequence[Example], layout: str, feeds_last_token: bool) -> Extent:
    if layout == "packed":
        return _num_packed(group, feeds_last_token), 1
    row_lengths = [len(example.prompt) + len(response) for example in group for response in example.responses]
    return max(row_lengths, default=0), len(row_lengths)


def _join(first: Extent, second: Extent, layout: str) -> Extent:
    """The extent of two groups in one microbatch."""
    if layout == "packed":
        return first[0] + second[0], 1
    return max(first[0], second[0]), first[1] + second[1]


def _num_packed(group: Sequence[Example], feeds_last_token: bool) -> int:
    """Tokens of one prompt's examples in a packed row.

    Each distinct response counts once.
    """
    responses = {response.tobytes(): len(response) for example in group for response in example.responses}
    num_left_out = 0 if feeds_last_token else len(responses)
    return len(group[0].prompt) + sum(responses.values()) - num_left_out
