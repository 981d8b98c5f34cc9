"""Choose the cases of a parametrization for `make test`; `make soak` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Mark all cases slow, except the quick ones.

    Args:
        cases: values of one parameter, or tuples of several.
        quick: cases without the mark; the first value of a tuple is enough.
    """
    marked: list[Any] = []
    missing = [*quick]
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        is_quick = case in quick or values[0] in quick
        missing = [each for each in missing if each != case and each != values[0]]
        marked.append(case if is_quick else pytest.param(*values, marks=pytest.mark.slow))
    assert not missing, f"no case is {missing}"
    return marked
