"""Uninterrupted runs: the expected results of runs with faults."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the data, tokenizer and caches of runs."""
    from tests.faults.processes import make_inputs

    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def run_to_end(inputs: Path, name: str, num_ranks: int, *overrides: str) -> Path:
    from tests.faults.processes import command, complete

    status, _, err = complete(command(inputs, inputs / name, *overrides), inputs / "output", num_ranks)
    assert status == 0, err
    return inputs / name


@pytest.fixture(scope="session")
def uninterrupted_run(inputs: Path) -> Path:
    """Directory of a run on one process."""
    return run_to_end(inputs, "uninterrupted", 1)


@pytest.fixture(scope="session")
def uninterrupted_run_on_two(inputs: Path) -> Path:
    """Directory of a run of FSDPTrainer on two ranks."""
    return run_to_end(inputs, "uninterrupted-on-two", 2, "trainer=FSDPTrainer")
