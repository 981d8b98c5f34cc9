"""Words for messages about settings and options."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from utils import clipped


def shown(value: Any) -> str:
    """A value as YAML: null and true, not None and True."""
    return clipped(json.dumps(value, ensure_ascii=False, default=str), 500)


def bracketed(hint: str) -> str:
    return f" ({hint})" if hint else ""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of names, if any is similar."""
    lowered = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1)
    return lowered[matches[0]] if matches else None


def did_you_mean(guess: str | None) -> str:
    return f"did you mean {guess}?" if guess else ""
