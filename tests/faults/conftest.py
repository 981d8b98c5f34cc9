"""Runs that nothing happened to, for tests of those to which something does."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what runs read, and their caches."""
    from tests.faults.processes import make_inputs

    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def run_whole(inputs: Path, name: str, num: int, *overrides: str) -> Path:
    from tests.faults.processes import command, complete

    status, _, err = complete(command(inputs, inputs / name, *overrides), inputs / "output", num)
    assert status == 0, err
    return inputs / name


@pytest.fixture(scope="session")
def whole(inputs: Path) -> Path:
    """The directory of a run."""
    return run_whole(inputs, "whole", 1)


@pytest.fixture(scope="session")
def whole_on_two(inputs: Path) -> Path:
    """The directory of a run of FSDPTrainer on two ranks."""
    return run_whole(inputs, "whole-on-two", 2, "trainer=FSDPTrainer")
