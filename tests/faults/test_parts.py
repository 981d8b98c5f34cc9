"""A checkpoint of several processes is whole, or not there; and each is told which, by those that know."""

import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from engine import checkpoint
from engine.checkpoint import CheckpointWriter, Contents, damage
from tests.ranks import on_ranks
from utils import UserError


def write_state(directory: Path) -> None:
    (directory / checkpoint.STATE_FILE).write_text("{}")


def save(run_dir: Path, number: int) -> str:
    """What one process is told of a save."""
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
    """Of a process whose second save fails on rank 1, and whose third is slow there."""
    told, write = [save(run_dir, 1)], checkpoint.save_file
    is_second = dist.get_rank() == 1
    with patch.object(checkpoint, "save_file", side_effect=MemoryError("no room") if is_second else write):
        told.append(save(run_dir, 2))
    dist.barrier()
    told.append(str(sorted(path.name for path in run_dir.iterdir())))
    dist.barrier()

    def slowly(*arguments: object, **options: object) -> None:
        time.sleep(0.5)
        write(*arguments, **options)  # type: ignore[arg-type]

    with patch.object(checkpoint, "save_file", slowly if is_second else write):
        told.append(save(run_dir, 3))
    return told


@pytest.mark.alone
def test_what_processes_are_told_of_their_saves(tmp_path: Path) -> None:
    first, second = on_ranks(2, saves, tmp_path)
    left = "['LATEST', 'step-1']"
    assert first == [f"{tmp_path}/step-1", "RuntimeError: rank 1: MemoryError: no room", left, f"{tmp_path}/step-3"]
    assert second == [f"{tmp_path}/step-1", "MemoryError: no room", left, f"{tmp_path}/step-3"]
    assert damage(tmp_path / "step-3") is None
