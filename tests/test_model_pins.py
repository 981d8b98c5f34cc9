"""Runs built on checkpoints of other runs: these are found once, pinned, and missed by name."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

import chat
import export
from engine.models.archives import MANIFEST_FILE, STATE_FILE, checkpoints, find_corruption, manifest_bytes
from engine.run import model_pins
from engine.run.checkpoint_writer import CheckpointWriter, Contents
from engine.run.model_pins import pin_all, pins_of, users_of
from tests.runs import Program, Run
from tests.test_peft import DPO, LLAMA, LORA, SHORT

EXTENDED = ("n_examples=16", "keep_checkpoints=1", "resume=auto", "resume_allow=[n_examples]")


def run(program: Program, *overrides: str) -> Run:
    return program.ok(*LLAMA, "save_every=4", *overrides, defaults=SHORT)


def sft(program: Program, *overrides: str) -> Run:
    return run(program, "loss=sft", f"local_run_dir={program.directory}/sft", *overrides)


def dpo(program: Program, *overrides: str, name: str = "dpo") -> Run:
    return run(program, *DPO, f"local_run_dir={program.directory}/{name}", *overrides)


def refused(program: Program, *overrides: str) -> str:
    """A DPO run's one-line error."""
    directory = f"local_run_dir={program.directory}/dpo"
    failed = program(*LLAMA, "save_every=4", *DPO, directory, *overrides, defaults=SHORT)
    assert failed.status == 4 and failed.err.count("\n") == 1, failed.err
    return failed.err


def saved(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(run_dir)]


@pytest.mark.slow
@pytest.mark.parametrize("peft", [LORA, ()])
def test_an_extended_run_keeps_the_checkpoint_that_another_run_needs(
    program: Program, peft: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = sft(program)
    archive = f"model.archive={start.dir}"
    first = dpo(program, *peft, archive, "n_examples=4")
    assert f"model.archive: {start.dir} stands for {start.dir}/step-8\n" in first.out
    extended = sft(program, *EXTENDED)
    kept = f"kept {start.dir}/step-8 beyond keep_checkpoints, as {first.dir} builds on it\n"
    assert saved(start.dir) == ["step-8", "step-16"] and extended.out.count(kept) == 1
    assert find_corruption(start.dir / "step-8") is None
    resumed = dpo(program, *peft, archive, "n_examples=8", "resume=auto", "resume_allow=[n_examples]")
    assert f"model.archive: {start.dir} stands for {start.dir}/step-8 since the start of the run\n" in resumed.out
    assert f"resumed from {first.dir}/step-4" in resumed.out
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", f"from={first.dir}", f"to={program.directory}/model"])
        assert export.main() == 0
    shutil.rmtree(first.dir)
    sft(program, *EXTENDED[1:], "n_examples=24")
    assert saved(start.dir) == ["step-24"] and not list(start.dir.glob("*.used-by"))


def test_adapters_on_adapters_pin_the_adapter_and_its_base(program: Program) -> None:
    start = sft(program)
    first = dpo(program, *LORA, f"model.archive={start.dir}/LATEST")
    second = dpo(program, *LORA, f"model.archive={first.dir}", name="second")
    assert users_of(start.dir / "step-8") == sorted([str(first.dir), str(second.dir)], key=_pin_name)
    assert users_of(first.dir / "step-8") == [str(second.dir)]
    shutil.rmtree(first.dir)
    assert users_of(start.dir / "step-8") == [str(second.dir)]


def _pin_name(run_dir: str) -> str:
    return model_pins.content_hash([run_dir])


def test_a_link_as_the_models_name_is_recorded_as_its_checkpoint(program: Program) -> None:
    """An adapter on LATEST would have another base when that moves."""
    start = sft(program)
    model = ("model=blank_model", f"model.name_or_path={start.dir}/LATEST")
    adapters = program.ok(*DPO, *LORA, *model, defaults=SHORT)
    config = json.loads((adapters.dir / "LATEST" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{start.dir}/step-8"
    assert users_of(start.dir / "step-8") == [str(adapters.dir)]


# ---- A model that is gone ----


def test_a_deleted_base_is_named_with_its_remedy(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = sft(program, "keep_checkpoints=null")
    archive = f"model.archive={start.dir}/step-8"
    first = dpo(program, *LORA, archive, "n_examples=4")
    base, copy = start.dir / "step-8", program.directory / "copy"
    base.rename(copy)
    named = f"{base} does not exist, and {first.dir}/step-4/adapter_config.json names it as the base model of"
    for command, arguments in (
        (export, ["export.py", f"from={first.dir}", f"to={program.directory}/model"]),
        (chat, ["chat.py", f"model={first.dir}", "prompt=Hello"]),
    ):
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        assert command.main() == 4
        err = capsys.readouterr().err.splitlines()[-1]
        assert named in err and "step-4 beside it has other weights" in err
        assert err.endswith("fix: give it as base=PATH (a copy or an export of it), or put it back")
    resumed = ("n_examples=8", "resume=auto", "resume_allow=[n_examples]")
    message = refused(program, *LORA, archive, *resumed)
    assert f"resume: {base} does not exist, and the run started from it by {archive}" in message
    assert "give it with model.archive=COPY resume_allow=[model.archive] (a copy or an export of it)" in message
    message = refused(program, *LORA, f"model.archive={first.dir}", "plan=true")
    assert named in message and message.startswith("error[CHECKPOINT] model.archive: ")
    message = refused(program, *LORA, archive, "plan=true")
    assert f"model.archive: {base} does not exist (step-4 beside it has other weights)" in message
    monkeypatch.setattr(
        sys, "argv", ["export.py", f"from={first.dir}", f"to={program.directory}/model", f"base={copy}"]
    )
    assert export.main() == 0
    again = dpo(program, *LORA, f"model.archive={copy}", *resumed[:2], "resume_allow=[n_examples,model.archive]")
    assert f"resumed from {first.dir}/step-4" in again.out


# ---- Pins ----


def write_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / STATE_FILE).write_text("{}")
    (path / MANIFEST_FILE).write_bytes(manifest_bytes({"format": 1, "checkpoint": path.name, "files": {}}))
    return path


def test_runs_pin_at_the_same_time(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "sft" / "step-8")
    runs = [tmp_path / f"run-{number}" for number in range(16)]
    barrier = threading.Barrier(len(runs))

    def pin(run_dir: Path) -> None:
        run_dir.mkdir()
        barrier.wait(10)
        pin_all([str(checkpoint)], run_dir)

    threads = [threading.Thread(target=pin, args=[run_dir]) for run_dir in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(users_of(checkpoint)) == sorted(map(str, runs))


def test_pins_hold_for_runs_that_are_moved_together(tmp_path: Path) -> None:
    checkpoint, user = tmp_path / "runs" / "sft" / "step-8", tmp_path / "runs" / "dpo"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).touch()
    user.mkdir()
    pin_all([str(checkpoint)], user)
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "sft" / "step-8"
    assert users_of(moved) == [str(tmp_path / "moved" / "dpo")]
    pin_all([str(moved)], tmp_path / "moved" / "dpo")
    assert users_of(moved) == [str(tmp_path / "moved" / "dpo")]
    shutil.rmtree(tmp_path / "moved" / "dpo")
    assert users_of(moved) == []


def test_a_pin_in_doubt_keeps_its_checkpoint(tmp_path: Path) -> None:
    """A damaged pin does; a run of its own never pins itself."""
    checkpoint = write_checkpoint(tmp_path / "sft" / "step-8")
    pin_all([str(checkpoint)], tmp_path / "sft")
    assert users_of(checkpoint) == []
    pins_of(checkpoint).mkdir()
    (pins_of(checkpoint) / "a.json").write_text("{")
    assert users_of(checkpoint) == [f"the run named in {pins_of(checkpoint)}/a.json"]


def test_a_read_only_checkpoint_is_used_with_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "sft" / "step-8")

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(model_pins, "write_atomically", refuse)
    pin_all([str(checkpoint)], tmp_path / "dpo")
    assert f"note: {checkpoint} cannot be marked as used (Read-only file system): keep it" in capsys.readouterr().out


def test_a_checkpoint_pinned_during_its_removal_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin comes between the look for pins and the removal."""
    answers = iter([[], ["/runs/dpo"]])
    monkeypatch.setattr("engine.run.checkpoint_writer.users_of", lambda path: next(answers))
    writer = CheckpointWriter(tmp_path, keep=1)
    for number in (4, 8):
        writer.start(number, Contents(), lambda directory: (directory / STATE_FILE).write_text("{}"))  # type: ignore[arg-type]
        writer.finished(wait=True)
    assert saved(tmp_path) == ["step-4", "step-8"] and find_corruption(tmp_path / "step-4") is None
