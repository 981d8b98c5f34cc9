"""Parts of examples of sampled responses, where an example is too large for a microbatch."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

from engine.data.examples import Example, Rollout


class Part(NamedTuple):
    """What an example is a part of.

    Args:
        whole: the example with all responses.
        number: of the part, 0 for the first.
    """

    whole: Example
    number: int


def cut_responses(example: Example, starts: Sequence[int]) -> list[Example]:
    """Parts of an example of sampled responses.

    Args:
        starts: the first response of each part.
    """
    parts = []
    for number, (start, end) in enumerate(pairwise([*starts, len(example.responses)])):
        rollout = example.rollout
        if rollout is not None:
            values = {each.name: getattr(rollout, each.name) for each in fields(rollout)}
            cut: dict[str, Any] = {name: None if each is None else each[start:end] for name, each in values.items()}
            rollout = Rollout(**cut)
        responses = example.responses[start:end]
        parts.append(replace(example, responses=responses, rollout=rollout, part=Part(example, number)))
    return parts


def join_parts(examples: Iterable[Example]) -> list[Example]:
    """Examples, with a whole in place of its parts. A batch may hold an example twice, where an epoch ends in it."""
    first_parts = [example for example in examples if example.part is None or example.part.number == 0]
    return [example if example.part is None else example.part.whole for example in first_parts]
