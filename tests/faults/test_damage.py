"""A checkpoint that is not as it was written is noticed, named, and never used."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint import MANIFEST_FILE, STATE_FILE, checkpoints, damage, find_checkpoint
from engine.saved_models import find_saved
from tests.faults.processes import assert_equal_runs, command, complete, damaged_copies, saved
from utils import UserError


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """A run with the checkpoints step-56 and step-60."""
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def digest(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


def flip(path: Path, bit: int = 77) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_each_file_of_a_checkpoint_is_guarded(stopped: Path, how: str) -> None:
    """All of them, policy.pt and the tokenizer's included; LATEST guards itself, as a name that is not there."""
    checkpoint = checkpoints(stopped)[-1]
    assert damage(checkpoint) is None
    files = sorted(checkpoint.iterdir())
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".pt"}
    chance = random.Random(0)
    for path in files:
        for where in damaged_copies(path, how, 5, chance):
            assert damage(checkpoint), (path.name, how, where)
    assert damage(checkpoint) is None


def change_manifest(checkpoint: Path) -> Iterator[str]:
    """Manifests that were not written by this program for this checkpoint; yields what is said of each."""
    path = checkpoint / MANIFEST_FILE
    written = json.loads(path.read_text())

    def write(manifest: object) -> None:
        path.write_text(json.dumps(manifest, indent=1, sort_keys=True))

    write(written | {"format": 2})
    yield "its format is 2, not 1"
    write(written | {"checkpoint": "step-4"})
    yield "it was written as step-4"
    write({**written, "files": {name: file for name, file in written["files"].items() if name != STATE_FILE}})
    yield f"{MANIFEST_FILE} lacks {STATE_FILE}"
    write({**written, "files": {name: file for name, file in written["files"].items() if "optimizer" not in name}})
    yield f"{MANIFEST_FILE} lacks optimizer.safetensors"
    first, *_, last = written["files"]  # two names that differ in a bit may be made the same
    path.write_text(json.dumps(written, indent=1, sort_keys=True).replace(f'"{first}"', f'"{last}"'))
    yield f"{MANIFEST_FILE} is not as it was written"
    others: list[object] = [[], {}, None, {**written, "files": []}, {**written, "files": {STATE_FILE: None}}]
    for other in others:
        write(other)
        yield "Error"
    path.write_text("{")
    yield "JSONDecodeError"
    path.unlink()
    yield "FileNotFoundError"


def test_a_manifest_must_be_that_of_the_checkpoint(stopped: Path) -> None:
    for expected in change_manifest(checkpoints(stopped)[-1]):
        assert expected in (damage(checkpoints(stopped)[-1]) or ""), expected


def test_a_missing_file_is_named(stopped: Path) -> None:
    checkpoint = checkpoints(stopped)[-1]
    for path in sorted(checkpoint.iterdir()):
        path.rename(stopped / "away")
        assert path.name in (damage(checkpoint) or "")
        (stopped / "away").rename(path)


@pytest.mark.parametrize("resume", ["auto", "run"])
def test_the_newest_whole_checkpoint_is_used(
    inputs: Path, whole: Path, stopped: Path, tmp_path: Path, resume: str
) -> None:
    """And the damaged one replaced on the way."""
    newest, older = reversed(checkpoints(stopped))
    flip(newest / "model.safetensors", 100_000)
    arguments = command(inputs, stopped, f"resume={'auto' if resume == 'auto' else stopped}")
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0, err
    assert f"{newest} is damaged (model.safetensors has another SHA-256); {older} is taken" in out
    assert f"resumed from {older}" in out
    assert_equal_runs(stopped, whole)


def test_a_damaged_checkpoint_does_not_count_as_one_to_keep(
    inputs: Path, whole: Path, stopped: Path, tmp_path: Path
) -> None:
    """A run that goes on before it, and is stopped before it gets there, has something to go on from."""
    newest, older = reversed(checkpoints(stopped))
    late = newest.rename(stopped / "step-64")  # as if it had gone further
    status, _, err = complete(command(inputs, stopped, "keep_checkpoints=1"), tmp_path / "output")
    assert status == 0, err
    assert saved(stopped) == ["step-60", "step-64"] and damage(stopped / "step-60") is None and damage(late)
    assert not older.exists() and (stopped / "LATEST").resolve().name == "step-60"


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(inputs: Path, stopped: Path, tmp_path: Path) -> None:
    newest = checkpoints(stopped)[-1]
    (newest / "optimizer.safetensors").unlink()
    before = digest(stopped)
    for name in (newest, stopped / "LATEST"):
        status, out, err = complete(command(inputs, stopped, f"resume={name}"), tmp_path / "output")
        assert status == 4 and err.count("\n") == 1, err
        assert err.startswith(f"error[CHECKPOINT] resume: {newest} is damaged (") and "optimizer.safetensors" in err
        assert "training on" not in out
    assert digest(stopped) == before


def test_without_a_whole_checkpoint_all_are_named_and_kept(inputs: Path, stopped: Path, tmp_path: Path) -> None:
    newest, older = reversed(checkpoints(stopped))
    flip(newest / "training_state.json")
    (older / MANIFEST_FILE).unlink()
    before = digest(stopped)
    for resume in ("auto", str(stopped)):
        status, out, err = complete(command(inputs, stopped, f"resume={resume}"), tmp_path / "output")
        assert status == 4 and err.count("\n") == 1, err
        assert f"{newest} is damaged (training_state.json has another SHA-256)" in err
        assert f"{older} is damaged (FileNotFoundError" in err and "nothing was deleted" in err
        assert "training on" not in out
    assert digest(stopped) == before


def test_a_damaged_archive_is_refused(inputs: Path, stopped: Path, tmp_path: Path) -> None:
    for checkpoint in checkpoints(stopped):
        flip(checkpoint / "model.safetensors", 100_000)
    newest = checkpoints(stopped)[-1]
    for archive in (newest, stopped / "LATEST", stopped, newest / "policy.pt"):
        arguments = command(inputs, tmp_path / "new", f"model.archive={archive}")
        if archive.name == "policy.pt":
            flip(archive, 200_000)
        status, _, err = complete(arguments, tmp_path / "output")
        assert status == 4 and err.count("\n") == 1, (archive, status, err)
        assert err.startswith("error[CHECKPOINT] model.archive: ") and "is damaged (" in err, err
    with pytest.raises(UserError, match=r"the model: .* is damaged"):
        find_saved(str(stopped))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "step-8").mkdir()
    with pytest.raises(UserError, match=r"step-8 is damaged \(FileNotFoundError"):
        find_checkpoint(tmp_path)
