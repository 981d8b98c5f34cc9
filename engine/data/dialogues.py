"""Dialogues in one example: earlier responses are learned inside the prompt of the last one."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from engine.data.examples import Example, ExampleDraft


class Turn(NamedTuple):
    """An earlier response of a dialogue.

    Args:
        num_prompt: tokens of the prompt before it.
        response: int32 [response tokens], with EOS. All but its last token stand in the prompt of the example.
        weight: scales its loss.
    """

    num_prompt: int
    response: np.ndarray
    weight: float = 1.0


def split_turns(example: "Example") -> "list[Example]":
    """Each learned response of a dialogue as an example of its own, the last one last."""
    if not example.turns:
        return [example]
    earlier = [
        replace(example, prompt=example.prompt[: turn.num_prompt], responses=(turn.response,), weight=turn.weight)
        for turn in example.turns
    ]
    return [replace(each, turns=()) for each in (*earlier, example)]


def count_turns(examples: "Iterable[Example]") -> int:
    """Number of losses of examples: one each, and one for every earlier turn."""
    return sum(1 + len(example.turns) for example in examples)


def continues(example: "Example", earlier: "Example") -> bool:
    """Whether the prompt of an example begins with an earlier turn and at least one more token.

    The last token of the earlier response is only a target, so it does not count.
    """
    (response,), start = earlier.responses, len(earlier.prompt)
    end = start + len(response) - 1
    return (
        len(example.prompt) > end
        and np.array_equal(example.prompt[:start], earlier.prompt)
        and np.array_equal(example.prompt[start:end], response[:-1])
    )


class DialogueRows:
    """Finds the turn before each example, and numbers the rows of a table.

    Args:
        drafts: of all examples.
    """

    def __init__(self, drafts: "Sequence[ExampleDraft]"):
        self._continued = {draft.previous for draft in drafts if draft.previous is not None}
        self._open: dict[int, tuple[int, Example]] = {}  # by the number of their draft
        self._num_rows = 0

    def add(
        self, number: int, draft: "ExampleDraft", example: "Example | None"
    ) -> "tuple[int, Example] | tuple[None, None]":
        """Row and example of the turn before, if the prompt of this example begins with it.

        Args:
            number: of the draft.
            example: None if it is dropped.
        """
        earlier = None if draft.previous is None else self._open.pop(draft.previous, None)
        if example is None:
            return None, None
        if number in self._continued:
            self._open[number] = self._num_rows, example
        self._num_rows += 1
        return earlier if earlier is not None and continues(example, earlier[1]) else (None, None)
