"""Full disks, read-only disks, and directories with other files."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.data.films import film_tokenizer
from engine.models.archives import WEIGHTS
from engine.models.weight_files import tensors_of
from engine.run.checkpoint_writer import CheckpointWriter
from engine.run.run_dir import RUN_MARK
from engine.run.run_files import locked
from tests.faults.processes import (
    Process,
    assert_checkpoints_intact,
    assert_equal_runs,
    command,
    complete,
    fail_on_a_full_disk,
    saved,
    small_disk,
)
from tests.quick import slow_except
from trainers import BasicTrainer, Batch, Step
from utils import as_os_errors


@pytest.fixture(scope="module")
def size(uninterrupted_run: Path) -> int:
    """Bytes of the last checkpoint, including its policy.pt."""
    return sum(path.stat().st_size for path in (uninterrupted_run / "LATEST").iterdir())


@pytest.mark.parametrize("num_runs", slow_except([1, 4], 1))
def test_a_full_disk_during_a_save(
    inputs: Path, uninterrupted_run: Path, size: int, tmp_path: Path, num_runs: int
) -> None:
    """The last good checkpoint stays intact, and with more room the run resumes."""
    chance = random.Random(0)
    with small_disk(tmp_path / "disk", 4 * size) as disk:
        for index in range(num_runs):
            fail_on_a_full_disk(inputs, disk / f"run-{index}", int(size * chance.uniform(0.1, 2.4)), uninterrupted_run)


def test_too_little_room_is_reported_before_writing(inputs: Path, size: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 * size) as disk:
        (disk / "ballast").write_bytes(bytes(int(1.5 * size)))
        status, _, err = complete(command(inputs, disk / "run"), tmp_path / "output")
        assert status == 6 and err.count("\n") == 1, err
        assert "/run/step-4 could not be written (it needs" in err and "MB are free)" in err
        assert not saved(disk / "run") and not list((disk / "run").glob(".*"))


def test_libraries_on_a_full_disk(tmp_path: Path) -> None:
    """Each library raises another exception; all become OSError."""
    tensors = {"weight": torch.ones(100_000)}
    writers: dict[str, Callable[[Path], Any]] = {
        "tokenizers": film_tokenizer().save_pretrained,
        "safetensors": lambda disk: save_file(tensors, disk / "weights"),
        "torch": lambda disk: torch.save(tensors, disk / "weights"),
    }
    with small_disk(tmp_path / "disk", 8192) as disk:
        for name, write in writers.items():
            with pytest.raises(OSError, match=r"No space left|torch could not write"), as_os_errors():
                write(disk)
                pytest.fail(f"{name} has found room")
            shutil.rmtree(disk, ignore_errors=True)
    with pytest.raises(KeyError), as_os_errors():  # other exceptions stay as they are
        raise KeyError("name")


@pytest.mark.parametrize("num_pages", [0, 2])
def test_a_full_disk_before_the_first_step(inputs: Path, tmp_path: Path, num_pages: int) -> None:
    """No room for config.yaml; or two pages, enough for config.yaml and run.json alone."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        (disk / "run").mkdir()
        (disk / "ballast").write_bytes(bytes(2**20 - num_pages * 4096))
        status, out, err = complete(command(inputs, disk / "run"), tmp_path / "output")
        assert status == 6 and err.count("\n") == 1, err
        assert ("training on" in out) == bool(num_pages) and not list((disk / "run").glob(".*"))


def test_a_full_disk_under_the_caches(inputs: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        (disk / "ballast").write_bytes(bytes(2**20 - 3 * 4096))
        status, _, err = complete(command(inputs, tmp_path / "run", f"cache_dir={disk}"), tmp_path / "output")
        assert status == 6 and err.count("\n") == 1, err


@pytest.mark.parametrize("has_run", [False, True])
def test_a_read_only_directory(inputs: Path, tmp_path: Path, has_run: bool) -> None:
    """Refused before a model is loaded, also for a run without a checkpoint."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        run_dir = disk / "run"
        if has_run:
            run_dir.mkdir()
            (run_dir / "config.yaml").write_text(f"{RUN_MARK}\n")
            (run_dir / "metrics.jsonl").write_text("{}\n")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        begun = time.monotonic()
        status, out, err = complete(command(inputs, run_dir), tmp_path / "output")
        assert status == 6 and err.count("\n") == 1, err
        assert err.startswith(f"error[STORAGE] local_run_dir: cannot write to {run_dir} (Read-only file system)")
        assert "training on" not in out and time.monotonic() - begun < 60


def test_a_directory_with_other_files(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "home"
    run_dir.mkdir()
    others = {name: run_dir / name for name in ("letter.txt", ".draft.tmp", ".step-4.tmp")}
    for path in others.values():
        path.write_text("mine")
    status, out, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 6 and err.count("\n") == 1, err
    assert f"{run_dir} holds other files (letter.txt)" in err and "training on" not in out
    assert all(path.read_text() == "mine" for path in others.values()) and len(list(run_dir.iterdir())) == 3


def test_a_directory_with_files_of_the_same_names(inputs: Path, tmp_path: Path) -> None:
    """config.yaml, metrics.jsonl and step-8 are common names; a run directory may hold more files."""
    run_dir = tmp_path / "project"
    (run_dir / "step-8").mkdir(parents=True)
    mine = [run_dir / name for name in ("config.yaml", "metrics.jsonl", ".draft.tmp", "step-8/letter.txt")]
    for path in mine:
        path.write_text("mine")
    status, _, err = complete(command(inputs, run_dir, "resume=null"), tmp_path / "output")
    assert status == 6 and f"{run_dir} holds other files (config.yaml, metrics.jsonl, step-8) and is no run" in err, err
    assert {path.read_text() for path in mine} == {"mine"} and len(list(run_dir.iterdir())) == 4
    draft = tmp_path / "run" / ".draft.tmp"
    draft.parent.mkdir()
    draft.write_text("mine")
    status, _, err = complete(command(inputs, tmp_path / "run", "n_examples=4"), tmp_path / "output")
    assert status == 0 and draft.read_text() == "mine", err


def test_a_run_directory_with_checkpoints_only(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(uninterrupted_run, tmp_path / "run", symlinks=True))
    for name in ("metrics.jsonl", "config.yaml", "LATEST"):
        (run_dir / name).unlink()
    status, _, err = complete(command(inputs, run_dir, "resume=null", "keep_checkpoints=1"), tmp_path / "output")
    assert status == 2 and f"{run_dir} holds a run; fix: resume=auto" in err, err
    assert saved(run_dir) == saved(uninterrupted_run)
    assert complete(command(inputs, run_dir), tmp_path / "output")[0] == 0


def test_a_file_in_place_of_the_directory(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        status, _, err = complete(command(inputs, run_dir), tmp_path / "output")
        assert status == 6 and err.count("\n") == 1 and "cannot write to" in err, err


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / "run"):
        out = capsys.readouterr().out
    assert f"warning: {tmp_path}/run cannot be locked (No locks available)" in out and out.count("\n") == 1


def test_a_directory_in_use(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    """A live run locks its directory; a kill frees it."""
    run_dir = tmp_path / "run"
    with Process(command(inputs, run_dir), tmp_path / "first", fault="before_manifest#2=wait") as process:
        process.wait_until((run_dir / ".step-8.tmp" / "training_state.json").exists)
        status, out, err = complete(command(inputs, run_dir), tmp_path / "second")
        assert status == 6 and err.count("\n") == 1, err
        assert f"{run_dir} is in use by another process" in err and "training on" not in out
        assert (run_dir / ".step-8.tmp" / "training_state.json").exists()  # the second run removed nothing
        process.send(signal.SIGKILL)
    assert_checkpoints_intact(run_dir)
    status, _, err = complete(command(inputs, run_dir), tmp_path / "second")
    assert status == 0, err
    assert_equal_runs(run_dir, uninterrupted_run)


@pytest.mark.slow
def test_two_runs_fill_one_cache(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    """Both fill the token cache and the reference cache at the same time, and train as alone."""
    cache = tmp_path / "cache"
    with contextlib.ExitStack() as stack:
        arguments = {name: command(inputs, tmp_path / name, f"cache_dir={cache}") for name in ("one", "two")}
        runs = [stack.enter_context(Process(arguments[name], tmp_path / f"{name}-output")) for name in arguments]
        assert [run.wait() for run in runs] == [0, 0], [run.err for run in runs]
    for name in arguments:
        assert_equal_runs(tmp_path / name, uninterrupted_run)
    assert len(list((cache / "tokens").glob("[!.]*"))) == 2  # train and test
    (reference,) = (cache / "reference").glob("*.sqlite")
    status, out, err = complete(command(inputs, tmp_path / "three", f"cache_dir={cache}"), tmp_path / "output")
    assert status == 0 and f"all log-probs are in {reference}" in out, err


def write_until_a_later_step() -> None:
    """Delay the save after update 10 until update 13; fails if training waits for the save."""
    write, step, is_step_done = CheckpointWriter._write, BasicTrainer.step, threading.Event()

    def writing(*arguments: Any) -> Path:
        if not is_step_done.wait(30):
            raise OSError("training waits for the disk")
        return write(*arguments)

    def stepping(trainer: BasicTrainer, batch: Batch) -> Step:
        result = step(trainer, batch)
        if trainer.counters["updates"] == 13:
            is_step_done.set()
        return result

    CheckpointWriter._write, BasicTrainer.step = writing, stepping  # type: ignore[method-assign, assignment]


@pytest.mark.slow
def test_training_does_not_wait_for_the_disk(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, "save_every=40", "keep_checkpoints=null")
    status, _, err = complete(arguments, tmp_path / "output", prepare=write_until_a_later_step)
    assert status == 0 and saved(run_dir) == ["step-40", "step-60"], err
    # The checkpoint holds the state at update 10, not the state of later steps.
    saved_state = dict(tensors_of(run_dir / "step-40", WEIGHTS))
    other = tmp_path / "other"
    assert complete(command(inputs, other, "save_every=40", "keep_checkpoints=null"), tmp_path / "output")[0] == 0
    expected = dict(tensors_of(other / "step-40", WEIGHTS))
    assert expected and all(torch.equal(saved_state[name], value) for name, value in expected.items())
