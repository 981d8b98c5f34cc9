"""The table of rules across keys."""

from collections.abc import Callable
from dataclasses import dataclass

Problem = str | None


@dataclass(frozen=True)
class Rule:
    """A rule across keys.

    Args:
        keys: the keys it reads. A broken rule is reported at the first. Those with a ? may be absent: None.
        problem: takes their values in order; returns the problem, or None.
    """

    keys: tuple[str, ...]
    problem: Callable[..., Problem]


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Callable[..., Problem]], Callable[..., Problem]]:
    """Add a function to RULES."""

    def add(function: Callable[..., Problem]) -> Callable[..., Problem]:
        RULES.append(Rule(keys, function))
        return function

    return add
