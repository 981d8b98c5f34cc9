"""The long form of the tests beside it."""

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_soak() -> None:
    """What it does and how much of it: benchmarks/soak.py."""
    assert soak.main([]) == 0
