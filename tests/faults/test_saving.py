"""The order of a save: nothing older goes, and LATEST does not move, before the new checkpoint is safely on disk."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models.archives import STATE_FILE, WEIGHTS, checkpoints
from engine.run import checkpoint_writer
from engine.run.checkpoint_writer import CheckpointWriter, Contents
from utils import UserError, install_directory, write_atomically


def write_state(directory: Path) -> None:
    (directory / STATE_FILE).write_text("{}")


def save(writer: CheckpointWriter, number: int) -> Path | None:
    contents = Contents()
    contents.add(WEIGHTS, {"weight": torch.ones(50)}, {})
    writer.start(number, contents, write_state)
    return writer.finished(wait=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(system call, path) of each fsync, rename and removal of a directory, in order."""
    recorded: list[tuple[str, str]] = []

    def record(module: Any, name: str, path_of: Any) -> None:
        original = getattr(module, name)

        def recording(*arguments: Any, **options: Any) -> Any:
            recorded.append((name, path_of(*arguments)))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, recording)

    record(os, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    record(os, "replace", lambda source, target: str(target))
    record(os, "rename", lambda source, target: str(target))
    record(shutil, "rmtree", lambda path, *others: str(path))
    record(Path, "rename", lambda source, target: str(target))
    record(Path, "replace", lambda source, target: str(target))
    return recorded


def names_before(calls: list[tuple[str, str]], call: str, path: Path) -> set[str]:
    """Names of the files and directories flushed before a call."""
    index = calls.index((call, str(path)))
    return {Path(flushed).name for name, flushed in calls[:index] if name == "fsync"}


def test_every_file_of_a_checkpoint_is_flushed_before_its_rename(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    target = save(CheckpointWriter(tmp_path, keep=None), 4)
    assert target == tmp_path / "step-4"
    flushed = names_before(calls, "rename", target)
    files = {path.name for path in target.iterdir()}
    assert files == {"model.safetensors", STATE_FILE, "manifest.json"}
    # The manifest is flushed under its temporary name; then the directory that holds all names.
    assert {"model.safetensors", STATE_FILE, ".step-4.tmp", "metrics.jsonl"} <= flushed
    assert any(name.startswith(".manifest.json.") for name in flushed)
    renamed = calls.index(("rename", str(target)))
    after = [path for name, path in calls[renamed:] if name == "fsync"]
    assert after[:1] == [str(tmp_path)]  # the new name itself


def test_an_atomic_write_is_flushed_before_its_rename(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    write_atomically(tmp_path / "a.json", b"{}")
    (flushed,) = names_before(calls, "replace", tmp_path / "a.json")
    assert flushed.startswith(".a.json.")


def test_an_installed_directory_is_flushed_before_its_rename(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / ".base.tmp" / "inner").mkdir(parents=True)
    (tmp_path / ".base.tmp" / "inner" / "file").write_text("x")
    install_directory(tmp_path / ".base.tmp", tmp_path / "base")
    assert names_before(calls, "rename", tmp_path / "base") == {".base.tmp", "inner", "file"}
    assert calls[-1] == ("fsync", str(tmp_path))


def test_a_checkpoint_is_read_back_before_latest_moves_and_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that returns other bytes than were written costs no older checkpoint."""
    writer = CheckpointWriter(tmp_path, keep=1)
    save(writer, 1)
    before = [path.name for path in sorted((tmp_path / "step-1").iterdir())]
    find_corruption = checkpoint_writer.find_corruption

    def on_a_bad_disk(checkpoint: Path) -> str | None:
        with open(checkpoint / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        return find_corruption(checkpoint)

    monkeypatch.setattr(checkpoint_writer, "find_corruption", on_a_bad_disk)
    with pytest.raises(UserError, match="step-2 could not be written \\(it reads back differently") as raised:
        save(writer, 2)
    assert raised.value.exit_status == 6
    assert os.readlink(tmp_path / "LATEST") == "step-1"
    assert [path.name for path in sorted((tmp_path / "step-1").iterdir())] == before
    monkeypatch.setattr(checkpoint_writer, "find_corruption", find_corruption)
    save(writer, 3)
    assert os.readlink(tmp_path / "LATEST") == "step-3"
    assert "step-1" not in {path.name for path in checkpoints(tmp_path)}


def test_files_of_a_subdirectory_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    """A tokenizer with several chat templates keeps them in a folder."""

    def write_rest(directory: Path) -> None:
        write_state(directory)
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")

    writer, contents = CheckpointWriter(tmp_path, keep=None), Contents()
    contents.add(WEIGHTS, {"weight": torch.ones(50)}, {})
    writer.start(4, contents, write_rest)
    checkpoint = writer.finished(wait=True)
    assert checkpoint is not None and checkpoint_writer.find_corruption(checkpoint) is None
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("{{ message }}")
    assert "tool_use.jinja has" in (checkpoint_writer.find_corruption(checkpoint) or "")
