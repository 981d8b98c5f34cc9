"""What a run that goes on may not do: learn otherwise, from another reference, or log twice."""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import CheckpointWriter, damage
from tests.faults.processes import assert_equal_runs, assert_whole, command, complete, rows, saved, temporaries
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


def test_a_learning_rate_that_changed_in_the_environment(inputs: Path, tmp_path: Path) -> None:
    """The same command is another run."""
    arguments = command(inputs, tmp_path / "run", "n_examples=8", "lr='${oc.decode:${oc.env:MY_LR}}'")
    for value, expected in (("1e-3", 0), ("1e-1", 2), ("0.001", 0)):
        prepare = partial(set_variable, "MY_LR", value)
        status, _, err = complete(arguments, tmp_path / "output", prepare=prepare)
        assert status == expected, err
        assert status == 0 or "lr was 0.001 and is 0.1;" in err


@pytest.mark.parametrize("trainer", ["BasicTrainer", "package"])
def test_another_optimizer_starts_anew(inputs: Path, tmp_path: Path, trainer: str) -> None:
    arguments = [f"trainer={trainer}"]
    if trainer == "package":
        arguments = ["trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "tensor_parallel_size=2"]
    begun = command(inputs, tmp_path / "run", *arguments, "n_examples=8", "optimizer=RMSprop")
    assert complete(begun, tmp_path / "output")[0] == 0
    for optimizer in ("AdamW", "SGD"):  # the second has no state to save
        changes = ("n_examples=16", f"optimizer={optimizer}", "resume_allow=[n_examples,optimizer]")
        branch = (f"resume={tmp_path / 'run' / 'step-8'}", f"local_run_dir={tmp_path / optimizer}")
        permitted = command(inputs, tmp_path / optimizer, *arguments, *changes, *branch)
        status, out, err = complete(permitted, tmp_path / "output")
        assert status == 0, err
        assert f"optimizer: {optimizer} starts anew, as it cannot go on from the state of RMSprop\n" in out
        assert rows(tmp_path / optimizer)[-1]["counters/examples"] == 16


def test_another_reference_under_the_same_name(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """The policy comes from the checkpoint, but a reference is where the run was started from."""
    start = tmp_path / "start"
    start.mkdir()
    for path in (whole / "LATEST").iterdir():
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


def test_rows_after_the_checkpoint_are_not_repeated(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Nor is half a row left, nor a row that a disk has lost made up."""
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, "save_every=28")
    assert complete(arguments, tmp_path / "output", fault="mkdir#2=kill")[0] == -9
    assert rows(run_dir)[-1]["counters/examples"] == 56
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"loss/train": 0.6')
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {run_dir}/step-28" in out, err
    assert_equal_runs(run_dir, whole)
    (run_dir / "metrics.jsonl").write_text("")
    assert complete(arguments, tmp_path / "output")[0] == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == b""


def test_a_run_that_is_over_stays_as_it_is(inputs: Path, whole: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != "config.yaml"}
    status, out, err = complete(command(inputs, whole), tmp_path / "output")
    assert status == 0 and f"resumed from {whole}/step-60" in out, err
    assert len(before) > 10 and before == {path: path.read_bytes() for path in before}
    assert_equal_runs(whole, whole)


def test_the_best_checkpoint_is_known_though_a_kill_came_before_the_link(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, "keep_best=loss/eval", "save_every=16", "n_examples=48", "lr=1e-4")
    assert complete(arguments, tmp_path / "output", fault="before_pointer#3=kill")[0] == -9
    losses = [row["loss/eval"] for row in rows(run_dir) if row.get("loss/eval") and row["counters/examples"]]
    assert len(losses) == 3 and losses[-1] == min(losses)
    assert (run_dir / "BEST").resolve().name in ("step-16", "step-32")
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {run_dir}/step-48" in out, err
    assert (run_dir / "BEST").resolve().name == "step-48"


def fail_while_a_slow_disk_is_written_to() -> None:
    write, step = CheckpointWriter._write, BasicTrainer.step

    def slow(*arguments: Any) -> Path:
        time.sleep(1)
        return write(*arguments)

    def failing(trainer: BasicTrainer, batch: Batch) -> Step:
        if trainer.counters["updates"] == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step(trainer, batch)

    CheckpointWriter._write, BasicTrainer.step = slow, failing  # type: ignore[method-assign, assignment]


def test_what_was_being_saved_when_the_run_failed_is_there(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, "save_every=12")
    status, _, err = complete(arguments, tmp_path / "output", prepare=fail_while_a_slow_disk_is_written_to)
    assert status == 1 and "illegal memory access" in err
    assert saved(run_dir) == ["step-12"]
    assert_whole(run_dir)


# ---- Where a run goes on from ----


@pytest.mark.parametrize("again", ["auto", "the same"])
def test_a_branch_that_is_killed_before_it_has_saved(inputs: Path, whole: Path, tmp_path: Path, again: str) -> None:
    """It goes on from where it branched off, never from the start; and by either command when it was killed twice."""
    origin, run_dir = whole / "step-56", tmp_path / "branch"
    arguments = command(inputs, run_dir, "n_examples=64", "resume_allow=[n_examples]", f"resume={origin}")
    assert complete(arguments, tmp_path / "output", fault="mkdir#1=kill")[0] == -9
    assert rows(run_dir) and not saved(run_dir)
    if again == "auto":
        arguments = [argument for argument in arguments if "resume=" not in argument] + ["resume=auto"]
    assert complete(arguments, tmp_path / "output", fault="mkdir#1=kill")[0] == -9
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {origin}, after 56 examples" in out, err
    assert rows(run_dir)[0]["counters/examples"] == 60 and saved(run_dir) == ["step-60", "step-64"]
    assert_whole(run_dir)
    status, out, err = complete(arguments, tmp_path / "output")
    if again == "auto":
        assert status == 0 and f"resumed from {run_dir}/step-64" in out, err
    else:
        assert status == 2 and f"{run_dir} holds a run; fix: resume=auto" in err, err


def test_a_branch_whose_start_is_gone(inputs: Path, whole: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True)) / "step-56"
    arguments = command(inputs, tmp_path / "branch", f"resume={origin}")
    assert complete(arguments, tmp_path / "output", fault="mkdir#1=kill")[0] == -9
    shutil.rmtree(origin)
    before = rows(tmp_path / "branch")
    status, _, err = complete(command(inputs, tmp_path / "branch"), tmp_path / "output")
    assert status == 4 and f"{origin}, which it went on from, is not there" in err and err.count("\n") == 1
    assert rows(tmp_path / "branch") == before


def test_checkpoints_that_are_gone(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """A run that has lost them does not start anew unless it is told to; one that never had any says that it does."""
    run_dir = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    for name in saved(run_dir):
        shutil.rmtree(run_dir / name)
    before = rows(run_dir)
    status, _, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 4 and f"{run_dir}/LATEST is a link to step-60, but there is no checkpoint" in err, err
    assert err.count("\n") == 1 and rows(run_dir) == before
    (run_dir / "LATEST").unlink()
    status, out, err = complete(command(inputs, run_dir, "n_examples=4"), tmp_path / "output")
    assert status == 0 and f"there is no checkpoint in {run_dir}, so the run starts anew" in out, err


def test_a_mistyped_checkpoint_makes_no_directory(inputs: Path, whole: Path, tmp_path: Path) -> None:
    for name in ("stpe-56", "step-57", "LATESt", "run/LATEST"):
        arguments = [part for part in command(inputs, tmp_path) if not part.startswith(("local_run_dir", "resume"))]
        for more in ((), (f"local_run_dir={tmp_path}/branch",)):
            status, _, err = complete([*arguments, f"resume={whole}/{name}", *more], tmp_path / "output")
            assert status == 4 and f"resume: no checkpoint in {whole}/{name};" in err, err
        assert not (whole / name).exists() and not (whole / "run").exists() and not (tmp_path / "branch").exists()


def test_a_copy_without_links(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """LATEST and BEST are links again; a directory of that name which is no copy is left alone."""
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.copytree(run_dir / "step-56", run_dir / "BEST")
    assert complete(command(inputs, run_dir), tmp_path / "output")[0] == 0
    assert [os.readlink(run_dir / name) for name in ("LATEST", "BEST")] == ["step-60", "step-56"]
    assert_equal_runs(run_dir, whole)
    (run_dir / "BEST").unlink()
    shutil.copytree(run_dir / "step-56", run_dir / "BEST")
    (run_dir / "step-56" / "model.safetensors").write_bytes(b"damaged")  # the copy is the only whole one
    status, out, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 6 and f"{run_dir}/BEST should be a link" in err and "training on" not in out, err
    assert damage(run_dir / "BEST") is None


def test_what_a_killed_run_had_begun_is_removed(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert complete(command(inputs, run_dir, "n_examples=8"), tmp_path / "output", fault="mkdir#2=kill")[0] == -9
    for name in (".step-8.tmp", ".base.tmp"):
        (run_dir / name).mkdir(exist_ok=True)
    for name in (".config.yaml.4711.tmp", ".nonfinite-3.json.4711.tmp", ".letter.tmp"):
        (run_dir / name).touch()
    (run_dir / ".BEST.tmp").symlink_to("step-4")
    assert complete(command(inputs, run_dir, "n_examples=8"), tmp_path / "output")[0] == 0
    assert temporaries(run_dir) == [".letter.tmp"]
