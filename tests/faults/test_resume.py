"""A resumed run keeps its settings and its reference, and logs each step once."""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.archives import find_corruption
from engine.run.checkpoint_writer import CheckpointWriter
from tests.faults.processes import (
    assert_checkpoints_intact,
    assert_equal_runs,
    command,
    complete,
    rows,
    saved,
    temporaries,
)
from tests.quick import slow_except
from trainers import BasicTrainer, Batch, Step


def test_a_changed_learning_rate(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert complete(command(inputs, run_dir, "n_examples=8"), tmp_path / "output")[0] == 0
    config = (run_dir / "config.yaml").read_text()
    before = rows(run_dir)
    status, _, err = complete(command(inputs, run_dir, "n_examples=8", "lr=1e-4"), tmp_path / "output")
    assert status == 2 and err.count("\n") == 1
    assert "lr was 0.001 and is 0.0001" in err and "resume_allow=[lr]" in err
    assert (run_dir / "config.yaml").read_text() == config and rows(run_dir) == before
    permitted = command(inputs, run_dir, "n_examples=16", "lr=1e-4", "resume_allow=[lr,n_examples]")
    status, _, err = complete(permitted, tmp_path / "output")
    assert status == 0, err
    assert rows(run_dir)[: len(before)] == before
    assert rows(run_dir)[-1]["counters/examples"] == 16
    assert max(row["learning_rate"] for row in rows(run_dir)[len(before) :] if "learning_rate" in row) < 2e-4


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


@pytest.mark.slow
def test_a_learning_rate_changed_by_the_environment(inputs: Path, tmp_path: Path) -> None:
    """The same command gives other settings."""
    arguments = command(inputs, tmp_path / "run", "n_examples=8", "lr='${oc.decode:${oc.env:MY_LR}}'")
    for value, expected in (("1e-3", 0), ("1e-1", 2), ("0.001", 0)):
        prepare = partial(set_variable, "MY_LR", value)
        status, _, err = complete(arguments, tmp_path / "output", prepare=prepare)
        assert status == expected, err
        assert status == 0 or "lr was 0.001 and is 0.1;" in err


@pytest.mark.parametrize("trainer", slow_except(["BasicTrainer", "package"], "BasicTrainer"))
def test_another_optimizer_resets_its_state(inputs: Path, tmp_path: Path, trainer: str) -> None:
    arguments = [f"trainer={trainer}"]
    if trainer == "package":
        arguments = ["trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "tensor_parallel_size=2"]
    begun = command(inputs, tmp_path / "run", *arguments, "n_examples=8", "optimizer=RMSprop")
    assert complete(begun, tmp_path / "output")[0] == 0
    for optimizer in ("AdamW", "SGD"):  # SGD has no state to save
        changes = ("n_examples=16", f"optimizer={optimizer}", "resume_allow=[n_examples,optimizer]")
        branch = (f"resume={tmp_path / 'run' / 'step-8'}", f"local_run_dir={tmp_path / optimizer}")
        permitted = command(inputs, tmp_path / optimizer, *arguments, *changes, *branch)
        status, out, err = complete(permitted, tmp_path / "output")
        assert status == 0, err
        assert f"optimizer: the state of {optimizer} is reset, as the checkpoint holds the state of RMSprop\n" in out
        assert rows(tmp_path / optimizer)[-1]["counters/examples"] == 16


def test_another_reference_under_the_same_name(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    """The policy comes from the checkpoint, the reference from the start of the run."""
    start = tmp_path / "start"
    start.mkdir()
    for path in (uninterrupted_run / "LATEST").iterdir():
        if path.name not in ("manifest.json", "training_state.json", "optimizer.safetensors", "policy.pt"):
            (start / path.name).write_bytes(path.read_bytes())
    arguments = command(inputs, tmp_path / "run", f"model.archive={start}", "n_examples=8")
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0, err
    before = rows(tmp_path / "run")
    weights = load_file(start / "model.safetensors")
    name = sorted(weights)[0]
    save_file(
        weights | {name: weights[name] + torch.eye(*weights[name].shape)}, start / "model.safetensors", {"format": "pt"}
    )
    status, out, err = complete([*arguments, "n_epochs=1"], tmp_path / "output")
    assert status == 4 and err.count("\n") == 1, (out, err)
    assert "the reference of the run at" in err and "had other weights" in err
    assert rows(tmp_path / "run") == before
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and "resumed from" in out, err


def test_rows_after_the_checkpoint_are_not_repeated(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    """Half a row is removed; lost rows are not invented."""
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, "save_every=28")
    assert complete(arguments, tmp_path / "output", fault="mkdir#2=kill")[0] == -9
    assert rows(run_dir)[-1]["counters/examples"] == 56
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"loss/train": 0.6')
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {run_dir}/step-28" in out, err
    assert_equal_runs(run_dir, uninterrupted_run)
    (run_dir / "metrics.jsonl").write_text("")
    assert complete(arguments, tmp_path / "output")[0] == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == b""


def test_a_finished_run_stays_unchanged(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    before = {
        path: path.read_bytes()
        for path in uninterrupted_run.rglob("*")
        if path.is_file() and path.name != "config.yaml"
    }
    status, out, err = complete(command(inputs, uninterrupted_run), tmp_path / "output")
    assert status == 0 and f"resumed from {uninterrupted_run}/step-60" in out, err
    assert len(before) > 10 and before == {path: path.read_bytes() for path in before}
    assert_equal_runs(uninterrupted_run, uninterrupted_run)


@pytest.mark.slow
def test_a_kill_before_the_best_link_loses_no_best_checkpoint(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, "keep_best=loss/eval", "save_every=16", "n_examples=48", "lr=1e-4")
    assert complete(arguments, tmp_path / "output", fault="before_pointer#3=kill")[0] == -9
    losses = [row["loss/eval"] for row in rows(run_dir) if row.get("loss/eval") and row["counters/examples"]]
    assert len(losses) == 3 and losses[-1] == min(losses)
    assert (run_dir / "BEST").resolve().name in ("step-16", "step-32")
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {run_dir}/step-48" in out, err
    assert (run_dir / "BEST").resolve().name == "step-48"


def fail_during_a_slow_save() -> None:
    write, step = CheckpointWriter._write, BasicTrainer.step

    def slow(*arguments: Any) -> Path:
        time.sleep(1)
        return write(*arguments)

    def failing(trainer: BasicTrainer, batch: Batch) -> Step:
        if trainer.counters["updates"] == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step(trainer, batch)

    CheckpointWriter._write, BasicTrainer.step = slow, failing  # type: ignore[method-assign, assignment]


def test_a_save_in_progress_survives_a_failed_run(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, "save_every=12")
    status, _, err = complete(arguments, tmp_path / "output", prepare=fail_during_a_slow_save)
    assert status == 1 and "illegal memory access" in err
    assert saved(run_dir) == ["step-12"]
    assert_checkpoints_intact(run_dir)


# ---- The checkpoint to resume from ----


@pytest.mark.parametrize("how", slow_except(["auto", "the same"], "auto"))
def test_a_branch_killed_before_its_first_save(inputs: Path, uninterrupted_run: Path, tmp_path: Path, how: str) -> None:
    """It resumes from its origin, never from scratch; after two kills with either command."""
    origin, run_dir = uninterrupted_run / "step-56", tmp_path / "branch"
    arguments = command(inputs, run_dir, "n_examples=64", "resume_allow=[n_examples]", f"resume={origin}")
    assert complete(arguments, tmp_path / "output", fault="mkdir#1=kill")[0] == -9
    assert rows(run_dir) and not saved(run_dir)
    if how == "auto":
        arguments = [argument for argument in arguments if "resume=" not in argument] + ["resume=auto"]
    assert complete(arguments, tmp_path / "output", fault="mkdir#1=kill")[0] == -9
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {origin}, after 56 examples" in out, err
    assert rows(run_dir)[0]["counters/examples"] == 60 and saved(run_dir) == ["step-60", "step-64"]
    assert_checkpoints_intact(run_dir)
    status, out, err = complete(arguments, tmp_path / "output")
    if how == "auto":
        assert status == 0 and f"resumed from {run_dir}/step-64" in out, err
    else:
        assert status == 2 and f"{run_dir} holds a run; fix: resume=auto" in err, err


@pytest.mark.slow
def test_a_branch_with_a_deleted_origin(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(uninterrupted_run, tmp_path / "run", symlinks=True)) / "step-56"
    arguments = command(inputs, tmp_path / "branch", f"resume={origin}")
    assert complete(arguments, tmp_path / "output", fault="mkdir#1=kill")[0] == -9
    shutil.rmtree(origin)
    before = rows(tmp_path / "branch")
    status, _, err = complete(command(inputs, tmp_path / "branch"), tmp_path / "output")
    assert status == 4 and f"{origin}, its starting point, does not exist" in err and err.count("\n") == 1
    assert rows(tmp_path / "branch") == before


def test_deleted_checkpoints(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    """A run with lost checkpoints is refused; a run without any starts from scratch, with a notice."""
    run_dir = Path(shutil.copytree(uninterrupted_run, tmp_path / "run", symlinks=True))
    for name in saved(run_dir):
        shutil.rmtree(run_dir / name)
    before = rows(run_dir)
    status, _, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 4 and f"{run_dir}/LATEST is a link to step-60, but there is no checkpoint" in err, err
    assert err.count("\n") == 1 and rows(run_dir) == before
    (run_dir / "LATEST").unlink()
    status, out, err = complete(command(inputs, run_dir, "n_examples=4"), tmp_path / "output")
    assert status == 0 and f"there is no checkpoint in {run_dir}, so the run starts from scratch" in out, err


def test_a_mistyped_checkpoint_makes_no_directory(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    branch = f"local_run_dir={tmp_path}/branch"
    for name, more in (("stpe-56", []), ("step-57", [branch]), ("LATESt", [branch]), ("run/LATEST", [])):
        arguments = [part for part in command(inputs, tmp_path) if not part.startswith(("local_run_dir", "resume"))]
        status, _, err = complete([*arguments, f"resume={uninterrupted_run}/{name}", *more], tmp_path / "output")
        assert status == 4 and f"resume: no checkpoint in {uninterrupted_run}/{name};" in err, err
        assert (
            not (uninterrupted_run / name).exists()
            and not (uninterrupted_run / "run").exists()
            and not (tmp_path / "branch").exists()
        )


def test_a_copy_without_links(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    """Copies become links again; a directory with other content is left alone."""
    run_dir = Path(shutil.copytree(uninterrupted_run, tmp_path / "run"))
    shutil.copytree(run_dir / "step-56", run_dir / "BEST")
    assert complete(command(inputs, run_dir), tmp_path / "output")[0] == 0
    assert [os.readlink(run_dir / name) for name in ("LATEST", "BEST")] == ["step-60", "step-56"]
    assert_equal_runs(run_dir, uninterrupted_run)
    (run_dir / "BEST").unlink()
    shutil.copytree(run_dir / "step-56", run_dir / "BEST")
    (run_dir / "step-56" / "model.safetensors").write_bytes(b"damaged")  # the copy is the only intact one
    status, out, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 6 and f"{run_dir}/BEST should be a link" in err and "training on" not in out, err
    assert find_corruption(run_dir / "BEST") is None


def test_temporary_files_of_a_killed_run_are_removed(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert complete(command(inputs, run_dir, "n_examples=8"), tmp_path / "output", fault="mkdir#2=kill")[0] == -9
    for name in (".step-8.tmp", ".base.tmp"):
        (run_dir / name).mkdir(exist_ok=True)
    for name in (".config.yaml.4711.tmp", ".started_from.json.1.tmp", ".nonfinite-3.json.4711.tmp", ".letter.tmp"):
        (run_dir / name).touch()
    (run_dir / ".BEST.tmp").symlink_to("step-4")
    assert complete(command(inputs, run_dir, "n_examples=8"), tmp_path / "output")[0] == 0
    assert temporaries(run_dir) == [".letter.tmp"]
