"""A sharded checkpoint is complete or absent, and every rank learns the outcome."""

import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from engine.models.archives import STATE_FILE, find_corruption
from engine.run import checkpoint_writer
from engine.run.checkpoint_writer import CheckpointWriter, Contents
from tests.ranks import on_ranks
from utils import UserError


def write_state(directory: Path) -> None:
    (directory / STATE_FILE).write_text("{}")


def save(run_dir: Path, number: int) -> str:
    """Save once; returns the outcome as one rank sees it."""
    writer, contents = CheckpointWriter(run_dir, keep=None), Contents()
    contents.add("model", {"one": torch.ones(50), "two": torch.ones(50)}, {})
    writer.start(number, contents, write_state)
    try:
        return str(writer.finished(wait=True))
    except UserError as error:
        return f"{error.code}: {error.what}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def saves(run_dir: Path) -> list[str]:
    """Outcomes of three saves; on rank 1 the second fails and the third is slow."""
    outcomes, write = [save(run_dir, 1)], checkpoint_writer.save_file
    is_second = dist.get_rank() == 1
    with patch.object(checkpoint_writer, "save_file", side_effect=MemoryError("no room") if is_second else write):
        outcomes.append(save(run_dir, 2))
    dist.barrier()
    outcomes.append(str(sorted(path.name for path in run_dir.iterdir())))
    dist.barrier()

    def slowly(*arguments: object, **options: object) -> None:
        time.sleep(0.5)
        write(*arguments, **options)  # type: ignore[arg-type]

    with patch.object(checkpoint_writer, "save_file", slowly if is_second else write):
        outcomes.append(save(run_dir, 3))
    return outcomes


@pytest.mark.alone
def test_every_rank_learns_the_outcome_of_a_save(tmp_path: Path) -> None:
    first, second = on_ranks(2, saves, tmp_path)
    left = "['LATEST', 'step-1']"
    assert first == [f"{tmp_path}/step-1", "RuntimeError: rank 1: MemoryError: no room", left, f"{tmp_path}/step-3"]
    assert second == [f"{tmp_path}/step-1", "MemoryError: no room", left, f"{tmp_path}/step-3"]
    assert find_corruption(tmp_path / "step-3") is None
