"""What a run that goes on may not do: learn otherwise, from another reference, or log twice."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.processes import assert_equal_runs, command, complete, rows


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
