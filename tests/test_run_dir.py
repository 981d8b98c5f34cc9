"""Run directories: their places, their leftovers, and runs that race for one."""

import errno
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from engine.data.token_store import TokenStoreWriter, open_store
from engine.run import run_files
from engine.run.run_dir import default_cache_dir, derive_names
from engine.run.run_files import locked
from engine.settings.schema import Settings
from tests.configs import make_settings
from tests.runs import Program
from trainers import BasicTrainer, Batch, Step
from utils import UserError, write_atomically

DPO = ("loss=dpo", "loss.beta=0.1")


# ---- A disk without links ----


def test_a_mounted_bucket_takes_no_links(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is saved and resumes without them."""

    def refuse(path: Path, target: str, *_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        directory = f"local_run_dir={program.directory / 'run'}"
        first = program.ok(*DPO, directory, "n_examples=4", "keep_best=loss/eval")
        assert f"{first.dir} takes no links: LATEST is step-4\n" in first.out and "BEST is step-" in first.out
        again = program.ok(
            *DPO, directory, "n_examples=8", "keep_best=loss/eval", "resume=auto", "resume_allow=[n_examples]"
        )
    assert [row["counters/examples"] for row in again.steps] == [4, 8]
    assert not any(path.is_symlink() for path in first.dir.iterdir())


# ---- A complete run ----


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "config.yaml"}


def test_a_complete_run_says_so_and_writes_nothing(program: Program) -> None:
    directory = f"local_run_dir={program.directory / 'run'}"
    first = program.ok(directory, "n_examples=4", "tensorboard=true")
    before = contents(first.dir)
    assert any("tfevents" in path.name for path in before)
    again = program.ok(directory, "n_examples=4", "tensorboard=true", "resume=auto")
    assert again.out.count("the run is complete, after 4 examples: nothing is left to train; n_examples or") == 1
    assert contents(first.dir) == before
    extended = program.ok(directory, "n_examples=8", "tensorboard=true", "resume=auto", "resume_allow=[n_examples]")
    assert "is complete" not in extended.out and [row["counters/examples"] for row in extended.steps] == [4, 8]


# ---- A run that fails before training ----


@pytest.mark.parametrize(
    "overrides, status",
    [
        (("datasets=[broken.jsonl]",), 3),
        (("model.archive=nowhere",), 4),
        (("model.archive=empty",), 4),
        (("peft=lora", "peft.full_modules=[nothing]"), 2),  # after base/ is saved
        (("max_length=10000", "max_prompt_length=100"), 2),
        (("freeze.patterns=[nothing]",), 2),
    ],
)
def test_a_run_that_fails_before_training_leaves_no_directory(
    program: Program, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], status: int
) -> None:
    monkeypatch.chdir(program.directory)
    Path("broken.jsonl").write_text("{")
    Path("empty").mkdir()
    before = sorted(program.directory.rglob("*"))
    for directory in ((), ("local_run_dir=runs/new/a",)):
        failed = program(*overrides, *directory)
        assert failed.status == status and failed.err.count("\n") == 1, failed.err
        assert sorted(program.directory.rglob("*")) == before


def test_a_failed_run_spares_directories_that_existed(program: Program) -> None:
    run_dir = program.directory / "mine" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / ".notes").write_text("mine")
    for name in ("run", "other"):
        failed = program(f"local_run_dir={run_dir.parent / name}", "freeze.patterns=[nothing]")
        assert failed.status == 2 and not (run_dir / "crash.log").exists()
    assert (run_dir / ".notes").read_text() == "mine" and os.listdir(run_dir.parent) == ["run"]
    program.ok(f"local_run_dir={run_dir}", "n_examples=4")  # it may start there again


def test_a_run_that_fails_while_training_keeps_its_directory(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(trainer: BasicTrainer, batch: Batch) -> Step:
        raise UserError("DATA", "a problem", "a fix")

    monkeypatch.setattr(BasicTrainer, "step", fail)
    failed = program(f"local_run_dir={program.directory / 'run'}")
    assert failed.status == 3
    assert "in fail" in (program.directory / "run" / "crash.log").read_text()


# ---- The cache ----


def names(settings: Settings) -> str:
    return derive_names(settings)["cache_dir"]


def test_every_working_directory_has_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    found = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.add(names(make_settings("local_dirs=[.cache]")))
        assert names(make_settings("cache_dir=mine")) == "mine"
    assert found == {str(tmp_path / "user" / "preference-trainer")}
    assert not (tmp_path / "user").exists()  # nothing is made before it is used
    assert names(make_settings(f"local_dirs=[{tmp_path}]")).startswith(f"{tmp_path}/")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir(Path(".cache/me")) == tmp_path / "home" / ".cache" / "preference-trainer"


@pytest.mark.parametrize("value", ["relative", "/dev/null/cache"])
def test_an_unusable_cache_directory_of_the_user_is_not_taken(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache_dir(Path(".cache/me")) == Path(".cache/me/cache")


def test_the_log_names_the_cache(program: Program) -> None:
    run = program.ok("n_examples=4", f"cache_dir={program.directory / 'mine'}")
    assert f"cache directory: {program.directory}/mine\n" in run.out


def test_the_default_cache_is_used(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two working directories; the second one encodes and computes nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(program.directory / "user"))
    outputs = []
    for name in ("one", "two"):
        (program.directory / name).mkdir()
        monkeypatch.chdir(program.directory / name)
        outputs.append(program.ok(*DPO, "n_examples=4", "local_dirs=[.cache]", "cache_dir=null").out)
        assert os.listdir(".") == [".cache"] and [path.name for path in Path(".cache").glob("*/*")] != ["cache"]
    cache = program.directory / "user" / "preference-trainer"
    assert all(f"cache directory: {cache}\n" in out for out in outputs)
    (reference,) = (cache / "reference").glob("*.sqlite")
    assert [f"all log-probs are in {reference}" in out for out in outputs] == [False, True]


# ---- Several runs at once ----


def together(number: int, work: object) -> list[object]:
    """Results, or errors, of calls in threads that start at once."""
    barrier, results = threading.Barrier(number), []

    def call() -> None:
        barrier.wait(10)
        try:
            results.append(work())  # type: ignore[operator]
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_one_of_several_runs_gets_the_directory(tmp_path: Path) -> None:
    for attempt in range(20):
        run_dir, are_done = tmp_path / "runs" / str(attempt), threading.Barrier(8)

        def use(run_dir: Path = run_dir, are_done: threading.Barrier = are_done) -> str:
            try:
                with locked(run_dir):
                    are_done.wait(10)
                    return "used"
            except UserError as error:
                are_done.wait(10)
                return error.what

        outcomes = sorted(map(str, together(8, use)))
        assert outcomes == [f"local_run_dir: {run_dir} is in use by another process"] * 7 + ["used"]


def test_a_directory_removed_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed run removes its directory while another one is opening it."""
    lock, removals = run_files._lock, iter([True, True, False, False])

    def lock_a_removed_one(run_dir: Path, descriptor: int) -> None:
        if next(removals):
            run_dir.rmdir()
        lock(run_dir, descriptor)

    monkeypatch.setattr(run_files, "_lock", lock_a_removed_one)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
        with pytest.raises(UserError, match="in use by another process"), locked(tmp_path / "run"):
            pytest.fail("two runs use one directory")
        assert (tmp_path / "run").is_dir()


def test_a_removed_run_directory_ends_the_run(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made again."""
    run_dir, step = program.directory / "run", BasicTrainer.step

    def remove(trainer: BasicTrainer, batch: Batch) -> Step:
        if trainer.counters["updates"] == 2:
            trainer.log_finished_save(wait=True)
            shutil.rmtree(run_dir)
        return step(trainer, batch)

    monkeypatch.setattr(BasicTrainer, "step", remove)
    failed = program(f"local_run_dir={run_dir}", "save_every=4")
    assert failed.status == 6 and failed.err.count("\n") == 1, failed.err
    assert failed.err.startswith(f"error[STORAGE] {run_dir}/metrics.jsonl cannot be written (the directory is gone)")
    assert not run_dir.exists()


def test_several_runs_write_one_store_of_the_token_cache(tmp_path: Path) -> None:
    """Their temporaries differ, also on machines that share a disk, where process ids repeat."""
    path, tokens = tmp_path / "tokens" / "key", np.arange(200_000, dtype=np.int32)

    def write_store() -> None:
        with TokenStoreWriter(path, 200_000, "key", show_progress=False) as writer:
            writer.add_stream(tokens, np.array([100_000, 100_000]))

    assert together(8, write_store) == [None] * 8
    store = open_store(path, "key")
    assert store is not None and np.array_equal(store.tokens, tokens)
    assert os.listdir(path.parent) == [path.name]


def test_several_writers_leave_one_whole_file(tmp_path: Path) -> None:
    data = [bytes([number]) * 2**20 for number in range(8)]
    left = iter(data)
    assert together(8, lambda: write_atomically(tmp_path / "config.yaml", next(left))) == [None] * 8
    assert (tmp_path / "config.yaml").read_bytes() in data and len(os.listdir(tmp_path)) == 1


def test_a_resumed_run_removes_the_temporaries_of_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", lambda path, missing_ok: None)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "config.yaml", b"")
    assert len(os.listdir(tmp_path)) == 1
    run_files.remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == []
