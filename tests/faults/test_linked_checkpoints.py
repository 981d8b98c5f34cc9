"""Checkpoints moved to another disk, with links in their place."""

import json
import os
import shutil
from pathlib import Path

import pytest

from engine.export.run_record import read_run
from engine.export.saved_models import find_saved
from engine.models.archives import checkpoints, find_checkpoint
from engine.run.run_files import rewind
from tests.quick import slow_except
from tests.runs import Program, Run

LOGS = ("metrics.jsonl", "samples.jsonl")
STEPS = (
    "batch_size=4", "save_every=4", "eval_every=4", "sample_during_eval=true", "n_eval_model_samples=1",
    "max_length=96", "max_prompt_length=80",
)  # fmt: skip


def move_checkpoints(run_dir: Path, disk: Path, prefix: str = "") -> None:
    """Move all checkpoints to disk, and leave links to them."""
    disk.mkdir()
    for path in checkpoints(run_dir):
        shutil.move(path, disk / f"{prefix}{path.name}")
        path.symlink_to(disk / f"{prefix}{path.name}")


def train(program: Program, *overrides: str) -> Run:
    return program.ok(*STEPS, f"local_run_dir={program.directory / 'run'}", *overrides)


@pytest.mark.parametrize("prefix", slow_except(["", "a-"], "a-"))
def test_a_linked_checkpoint_is_the_runs_own(program: Program, prefix: str) -> None:
    """It resumes in place, keeps its logs, and removes links alone."""
    first = train(program, "n_examples=8")
    disk = program.directory / "disk"
    move_checkpoints(first.dir, disk, prefix)
    before = {name: (first.dir / name).read_bytes() for name in LOGS}
    resumed = train(program, "n_examples=16", "resume=auto", "resume_allow=[n_examples]")
    assert f"resumed from {first.dir}/step-8, after 8 examples" in resumed.out
    assert all((first.dir / name).read_bytes().startswith(content) for name, content in before.items())
    assert [row["counters/examples"] for row in resumed.steps] == [4, 8, 12, 16]
    assert (first.dir / "config.yaml").read_text().startswith("# The settings of a run of train.py\n")
    assert os.readlink(first.dir / "LATEST") == "step-16"
    assert sorted(os.listdir(disk)) == [f"{prefix}step-4", f"{prefix}step-8"]
    assert sorted(path.name for path in first.dir.iterdir() if "step" in path.name) == ["step-12", "step-16"]
    for name in ("step-4", "step-8"):
        notice = f"removed {first.dir}/{name}; its files in {disk}/{prefix}{name} stay, as it was a link\n"
        assert resumed.out.count(notice) == 1


def test_the_files_behind_a_link_are_the_runs_checkpoint(program: Program) -> None:
    first = train(program, "n_examples=4")
    move_checkpoints(first.dir, program.directory / "disk")
    resumed = train(program, "n_examples=8", f"resume={program.directory}/disk/step-4", "resume_allow=[n_examples]")
    assert f"resumed from {first.dir}/step-4" in resumed.out
    assert [row["counters/examples"] for row in resumed.steps] == [4, 8]


def test_an_export_of_a_linked_checkpoint_has_the_record_of_its_run(program: Program) -> None:
    first = train(program, "n_examples=4")
    move_checkpoints(first.dir, program.directory / "disk")
    (program.directory / "model").symlink_to(first.dir / "LATEST")
    for name in (first.dir, first.dir / "LATEST", first.dir / "step-4", program.directory / "model"):
        found = find_saved(str(name))
        assert found == first.dir / "step-4" == find_checkpoint(name)
        assert read_run(found, lambda names: None).config["n_examples"] == 4


def test_links_to_a_missing_disk_are_named(program: Program) -> None:
    first = train(program, "n_examples=8")
    disk = program.directory / "disk"
    move_checkpoints(first.dir, disk)
    disk.rename(program.directory / "away")
    before = {name: (first.dir / name).read_bytes() for name in LOGS}
    refused = program(*STEPS, f"local_run_dir={first.dir}", "n_examples=8", "resume=auto")
    assert refused.status == 4 and refused.err.count("\n") == 1
    assert f"step-8 is damaged (it is a link to {disk}/step-8, which does not exist)" in refused.err
    assert before == {name: (first.dir / name).read_bytes() for name in LOGS}
    (program.directory / "away").rename(disk)
    (first.dir / "step-8").unlink()
    (first.dir / "step-8").symlink_to(disk / "nowhere")
    resumed = train(program, "n_examples=8", "resume=auto")
    assert f"resumed from {first.dir}/step-4" in resumed.out
    assert not (first.dir / "step-8").is_symlink() and find_checkpoint(first.dir) == first.dir / "step-8"


def rows(*counters: int, key: str = "counters/examples") -> bytes:
    return "".join(json.dumps({key: counter}) + "\n" for counter in counters).encode()


@pytest.mark.parametrize(
    "at_save, later, is_cut",
    [
        (rows(4, 8), rows(8, 12), True),
        (rows(4, 8), rows(12) + b'{"counters/exa', True),  # a row torn by a crash
        (b"", rows(12, 16, key="examples"), True),  # samples
        (rows(4, 8), rows(12, 4), False),
        (rows(4, 8)[:-3], rows(12), False),  # another log: the checkpoint's ended with a row
        (b"", b'{"loss": 1}\n', False),
    ],
)
def test_only_later_rows_are_cut(tmp_path: Path, capsys, at_save: bytes, later: bytes, is_cut: bool) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(at_save + later)
    rewind(tmp_path, {"metrics.jsonl": len(at_save)}, num_examples=8)
    assert log.read_bytes() == (at_save if is_cut else at_save + later)
    assert ("stay, as not all are later than the checkpoint" in capsys.readouterr().out) != is_cut
