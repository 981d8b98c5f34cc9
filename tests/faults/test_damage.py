"""Damaged checkpoints are found, named, and never used."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.export.saved_models import find_saved
from engine.models.archives import MANIFEST_FILE, STATE_FILE, checkpoints, find_checkpoint, find_corruption
from engine.run.resume_check import read_state_file
from tests.faults.processes import assert_equal_runs, command, complete, damaged_copies, saved
from tests.quick import slow_except
from utils import UserError


@pytest.fixture
def stopped_run(uninterrupted_run: Path, tmp_path: Path) -> Path:
    """A run with the checkpoints step-56 and step-60."""
    return Path(shutil.copytree(uninterrupted_run, tmp_path / "run", symlinks=True))


def digest(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


def flip(path: Path, bit: int = 77) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("num_places", slow_except([1, 5], 1))
@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damage_to_any_file_of_a_checkpoint_is_found(stopped_run: Path, how: str, num_places: int) -> None:
    """Includes policy.pt and the tokenizer. A damaged LATEST names a missing checkpoint."""
    checkpoint = checkpoints(stopped_run)[-1]
    assert find_corruption(checkpoint) is None
    files = sorted(checkpoint.iterdir())
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".pt"}
    chance = random.Random(0)
    for path in files:
        for where in damaged_copies(path, how, num_places, chance):
            assert find_corruption(checkpoint), (path.name, how, where)
    assert find_corruption(checkpoint) is None


def change_manifest(checkpoint: Path) -> Iterator[str]:
    """Write wrong manifests, one at a time; yields the expected message of each."""
    path = checkpoint / MANIFEST_FILE
    written = json.loads(path.read_text())

    def write(manifest: object) -> None:
        path.write_text(json.dumps(manifest, indent=1, sort_keys=True))

    write(written | {"format": 2})
    yield "was written by a newer version (checkpoint format 2, not 1)"
    write(written | {"checkpoint": "step-4"})
    yield "it was written as step-4"
    write({**written, "files": {name: file for name, file in written["files"].items() if name != STATE_FILE}})
    yield f"{MANIFEST_FILE} lacks {STATE_FILE}"
    write({**written, "files": {name: file for name, file in written["files"].items() if "optimizer" not in name}})
    yield f"{MANIFEST_FILE} lacks optimizer.safetensors"
    first, *_, last = written["files"]  # a flipped bit may turn one name into the other
    path.write_text(json.dumps(written, indent=1, sort_keys=True).replace(f'"{first}"', f'"{last}"'))
    yield f"{MANIFEST_FILE} was changed"
    others: list[object] = [[], {}, None, {**written, "files": []}, {**written, "files": {STATE_FILE: None}}]
    for other in others:
        write(other)
        yield "Error"
    path.write_text("{")
    yield "JSONDecodeError"
    path.unlink()
    yield "FileNotFoundError"


def test_a_wrong_manifest_is_reported(stopped_run: Path) -> None:
    for expected in change_manifest(checkpoints(stopped_run)[-1]):
        assert expected in (find_corruption(checkpoints(stopped_run)[-1]) or ""), expected


def test_a_checkpoint_of_a_newer_version_is_kept(stopped_run: Path) -> None:
    """An older checkpoint in its place would let the run write over it."""
    newest = checkpoints(stopped_run)[-1]
    manifest = json.loads((newest / MANIFEST_FILE).read_text())
    (newest / MANIFEST_FILE).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UserError, match=r"step-60 was written by a newer version .*; fix: use the version"):
        find_checkpoint(stopped_run)


def test_a_missing_file_is_named(stopped_run: Path) -> None:
    checkpoint = checkpoints(stopped_run)[-1]
    for path in sorted(checkpoint.iterdir()):
        path.rename(stopped_run / "away")
        assert path.name in (find_corruption(checkpoint) or "")
        (stopped_run / "away").rename(path)


@pytest.mark.parametrize("resume", ["auto", "run"])
def test_the_newest_intact_checkpoint_is_used(
    inputs: Path, uninterrupted_run: Path, stopped_run: Path, tmp_path: Path, resume: str
) -> None:
    """The damaged checkpoint is replaced when the run gets there."""
    newest, older = reversed(checkpoints(stopped_run))
    flip(newest / "model.safetensors", 100_000)
    arguments = command(inputs, stopped_run, f"resume={'auto' if resume == 'auto' else stopped_run}")
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0, err
    assert f"{newest} is damaged (model.safetensors has another SHA-256); using {older}" in out
    assert f"resumed from {older}" in out
    assert_equal_runs(stopped_run, uninterrupted_run)


def test_a_damaged_checkpoint_does_not_count_as_kept(
    inputs: Path, uninterrupted_run: Path, stopped_run: Path, tmp_path: Path
) -> None:
    """A run resumed from an older checkpoint keeps its own new ones."""
    newest, older = reversed(checkpoints(stopped_run))
    late = newest.rename(stopped_run / "step-64")  # as if from a later step
    status, _, err = complete(command(inputs, stopped_run, "keep_checkpoints=1"), tmp_path / "output")
    assert status == 0, err
    assert (
        saved(stopped_run) == ["step-60", "step-64"]
        and find_corruption(stopped_run / "step-60") is None
        and find_corruption(late)
    )
    assert not older.exists() and (stopped_run / "LATEST").resolve().name == "step-60"


def test_a_damaged_checkpoint_named_by_resume_is_refused(inputs: Path, stopped_run: Path, tmp_path: Path) -> None:
    newest = checkpoints(stopped_run)[-1]
    (newest / "optimizer.safetensors").unlink()
    before = digest(stopped_run)
    for name in (newest, stopped_run / "LATEST"):
        status, out, err = complete(command(inputs, stopped_run, f"resume={name}"), tmp_path / "output")
        assert status == 4 and err.count("\n") == 1, err
        assert err.startswith(f"error[CHECKPOINT] resume: {newest} is damaged (") and "optimizer.safetensors" in err
        assert "training on" not in out
    assert digest(stopped_run) == before


def test_without_an_intact_checkpoint_all_are_named_and_kept(inputs: Path, stopped_run: Path, tmp_path: Path) -> None:
    newest, older = reversed(checkpoints(stopped_run))
    flip(newest / "training_state.json")
    (older / MANIFEST_FILE).unlink()
    before = digest(stopped_run)
    for resume in ("auto", str(stopped_run)):
        status, out, err = complete(command(inputs, stopped_run, f"resume={resume}"), tmp_path / "output")
        assert status == 4 and err.count("\n") == 1, err
        assert f"{newest} is damaged (training_state.json has another SHA-256)" in err
        assert f"{older} is damaged (FileNotFoundError" in err and "nothing was deleted" in err
        assert "training on" not in out
    assert digest(stopped_run) == before


def test_a_damaged_archive_is_refused(inputs: Path, stopped_run: Path, tmp_path: Path) -> None:
    for checkpoint in checkpoints(stopped_run):
        flip(checkpoint / "model.safetensors", 100_000)
    newest = checkpoints(stopped_run)[-1]
    for archive in (newest, stopped_run / "LATEST", stopped_run, newest / "policy.pt"):
        arguments = command(inputs, tmp_path / "new", f"model.archive={archive}")
        if archive.name == "policy.pt":
            flip(archive, 200_000)
        status, _, err = complete(arguments, tmp_path / "output")
        assert status == 4 and err.count("\n") == 1, (archive, status, err)
        assert err.startswith("error[CHECKPOINT] model.archive: ") and "is damaged (" in err, err
    with pytest.raises(UserError, match=r"the model: .* is damaged"):
        find_saved(str(stopped_run))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"counters": []}, "counters: "),
        ({"counters": {"examples": "8", "updates": 2, "skipped": 0}}, "counters.examples: "),
        ({"counters": {"examples": 10**30, "updates": 2, "skipped": 0}}, "counters.examples: "),
        ({"log_sizes": {"metrics.jsonl": -1}}, "log_sizes.metrics.jsonl: "),
        ({"settings": 1}, "settings: "),
        ({"settings": {}}, "settings.optimizer: "),
        ({"best": {"metric": "loss/eval", "value": 1.0, "checkpoint": "../step-4"}}, "best."),
        ({"best": {"metric": "loss/eval", "value": 1.0, "checkpoint": ".."}}, "best."),
        ({"best": {"value": 1.0}}, "best."),
        ({"token_budget": None}, "token_budget: "),
        ({"token_budget": 0}, "token_budget: "),
        ({"evaluation_due": "no"}, "evaluation_due: "),
    ],
)
def test_a_training_state_of_another_shape_is_refused(stopped_run: Path, changes: dict, problem: str) -> None:
    checkpoint = checkpoints(stopped_run)[-1]
    written = json.loads((checkpoint / STATE_FILE).read_text())
    assert read_state_file(checkpoint) == written
    optional = {"chat_template", "reference", "base"}  # added later, or without a reference or adapter
    (checkpoint / STATE_FILE).write_text(json.dumps({key: written[key] for key in written.keys() - optional}))
    read_state_file(checkpoint)
    (checkpoint / STATE_FILE).write_text(json.dumps(written | changes))
    with pytest.raises(UserError, match=rf"{STATE_FILE}: {problem}.*; fix: resume from another one") as caught:
        read_state_file(checkpoint)
    assert caught.value.exit_status == 4


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "[" * 100_000])
def test_a_training_state_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{STATE_FILE}: ") as caught:
        read_state_file(tmp_path)
    assert caught.value.exit_status == 4


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "step-8").mkdir()
    with pytest.raises(UserError, match=r"step-8 is damaged \(FileNotFoundError"):
        find_checkpoint(tmp_path)
