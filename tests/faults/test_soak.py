"""The long form of tests/faults."""

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_soak() -> None:
    """See benchmarks/soak.py for its faults and their number."""
    assert soak.main([]) == 0
