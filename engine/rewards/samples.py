"""Sampled responses as rewards read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.examples import PromptRow
from engine.data.special_tokens import MARK
from rewards import Sample


class MissingColumn(KeyError):
    """A reward reads a column that the row does not have."""

    def __str__(self) -> str:
        return f"the row has no column {self.args[0]!r}"


class Columns(dict[str, Any]):
    """The columns of a row, to tell a missing one from a KeyError of the reward's own."""

    def __missing__(self, name: str) -> Any:
        raise MissingColumn(name)


@dataclass(frozen=True)
class PromptSample(Sample):
    """A sample with the row of its prompt."""

    source: PromptRow = field(kw_only=True)


def samples_of(row: PromptRow, responses: Sequence[tuple[str, bool]]) -> list[PromptSample]:
    """The responses to a prompt.

    Args:
        responses: (text, whether it is truncated) of each.
    """
    prompt, columns = row.text.replace(MARK, ""), Columns(row.columns)
    return [PromptSample(prompt, text, columns, is_truncated, source=row) for text, is_truncated in responses]
