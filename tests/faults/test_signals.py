"""SIGTERM and SIGINT: the step is finished and saved; a second signal ends the run at once."""

import itertools
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import process_start
from engine.placement import process_group
from engine.run.evaluation import Evaluator
from engine.step.microbatches import MicrobatchRunner
from engine.step.reference import LiveReference
from tests.faults.processes import Process, assert_checkpoints_intact, assert_equal_runs, command, complete, rows, saved
from tests.quick import slow_except
from trainers import BasicTrainer, Batch, Step
from utils import StopRequest

ROOT = Path(__file__).resolve().parent.parent.parent
FSDP = ("trainer=FSDPTrainer",)
SLOW = pytest.mark.slow
step = BasicTrainer.step


def signal_in_step(update: int, signal_number: int, on_rank: int) -> None:
    """Send this process a signal during a step."""

    def signalled(trainer: BasicTrainer, batch: Batch) -> Step:
        if trainer.counters["updates"] == update - 1 and trainer.placement.rank == on_rank:
            os.kill(os.getpid(), signal_number)
        return step(trainer, batch)

    BasicTrainer.step = signalled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("signal_number", "update"),
    slow_except([(signal.SIGTERM, 3), (signal.SIGINT, 4)], signal.SIGTERM),  # an evaluation follows the fourth
)
def test_a_signal_ends_the_run_after_its_step(
    inputs: Path, uninterrupted_run: Path, tmp_path: Path, signal_number: int, update: int
) -> None:
    run_dir = tmp_path / "run"
    prepare = partial(signal_in_step, update, signal_number, 0)
    arguments = command(inputs, run_dir, "save_every=1000")
    status, out, err = complete(arguments, tmp_path / "output", prepare=prepare)
    assert status == 128 + signal_number, err
    assert f"{signal.Signals(signal_number).name}: saving after this step" in err
    assert saved(run_dir) == [f"step-{4 * update}"] and rows(run_dir)[-1]["counters/updates"] == update
    assert_checkpoints_intact(run_dir)
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {run_dir}/step-{4 * update}" in out, err
    assert_equal_runs(run_dir, uninterrupted_run)


def close_terminal(is_ignored: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    signal_in_step(3, signal.SIGHUP, 0)


@pytest.mark.parametrize("is_ignored", slow_except([False, True], False))
def test_a_terminal_that_closes_ends_the_run_but_not_under_nohup(
    inputs: Path, uninterrupted_run: Path, tmp_path: Path, is_ignored: bool
) -> None:
    run_dir = tmp_path / "run"
    status, _, err = complete(
        command(inputs, run_dir), tmp_path / "output", prepare=partial(close_terminal, is_ignored)
    )
    assert status == (0 if is_ignored else 129), err
    if not is_ignored:
        assert saved(run_dir)[-1] == "step-12"
        assert complete(command(inputs, run_dir), tmp_path / "output")[0] == 0
    assert_equal_runs(run_dir, uninterrupted_run)


def signal_in_evaluation(update: int, on_rank: int) -> None:
    """Send this process SIGTERM during the evaluation after a step."""
    evaluate, run_microbatch = BasicTrainer.evaluate, MicrobatchRunner.loss
    evaluating: list[BasicTrainer] = []

    def noting(trainer: BasicTrainer) -> bool:
        evaluating[:] = [trainer]
        return evaluate(trainer)

    def signalled(runner: MicrobatchRunner, *arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            (trainer,) = evaluating
            if trainer.counters["updates"] == update and trainer.placement.rank == on_rank:
                if trainer.stop.signal is None:
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    raise AssertionError("it continues the evaluation")
        return run_microbatch(runner, *arguments)

    BasicTrainer.evaluate = noting  # type: ignore[method-assign, assignment]
    MicrobatchRunner.loss = signalled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "num_ranks, update",
    slow_except([(1, 0), (1, 8), (1, 15), (2, 8)], (1, 8)),  # before the first step, between steps, after the last
)
def test_a_signal_ends_an_evaluation(
    tmp_path: Path, request: pytest.FixtureRequest, num_ranks: int, update: int
) -> None:
    """An aborted evaluation is rerun on resume."""
    inputs, uninterrupted_run = (
        request.getfixturevalue(name)
        for name in ("inputs", "uninterrupted_run" if num_ranks == 1 else "uninterrupted_run_on_two")
    )
    run_dir, overrides = tmp_path / "run", () if num_ranks == 1 else FSDP
    arguments = command(inputs, run_dir, *overrides, "eval_batch_size=1")
    prepare = partial(signal_in_evaluation, update, num_ranks - 1)
    status, _, err = complete(arguments, tmp_path / "output", num_ranks, prepare=prepare)
    assert status == 128 + signal.SIGTERM, err
    assert saved(run_dir)[-1] == f"step-{4 * update}"
    logged = rows(run_dir) if update else []
    assert not any("loss/eval" in row for row in logged if row["counters/updates"] == update)
    assert_checkpoints_intact(run_dir)
    arguments = command(inputs, run_dir, *overrides)
    status, out, err = complete(arguments, tmp_path / "output", num_ranks)
    assert status == 0 and f"resumed from {run_dir}/step-{4 * update}" in out, err
    assert_equal_runs(run_dir, uninterrupted_run)


def uninterrupted_on(num_ranks: int, request: pytest.FixtureRequest) -> tuple[Path, Path, tuple[str, ...]]:
    """The inputs, the run directory and the overrides of an uninterrupted run on one rank or two."""
    suffix, overrides = ("", ()) if num_ranks == 1 else ("_on_two", FSDP)
    return request.getfixturevalue("inputs"), request.getfixturevalue(f"uninterrupted_run{suffix}"), overrides


def signal_in_sampling(update: int, on_rank: int) -> None:
    """Send this process SIGTERM while responses are sampled."""
    sample = Evaluator.sample_policy

    def signalled(evaluator: Evaluator, num_examples: int, *arguments: Any) -> Any:
        if num_examples == 4 * update and process_group.world().rank == on_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(evaluator, num_examples, *arguments)

    Evaluator.sample_policy = signalled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=SLOW)])
def test_a_signal_while_sampling_ends_the_run_after_it(
    tmp_path: Path, request: pytest.FixtureRequest, num_ranks: int
) -> None:
    """The samples are complete: they are logged, and not sampled again."""
    inputs, uninterrupted, overrides = uninterrupted_on(num_ranks, request)
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, *overrides)
    prepare = partial(signal_in_sampling, 8, num_ranks - 1)
    status, _, err = complete(arguments, tmp_path / "output", num_ranks, prepare=prepare)
    assert status == 128 + signal.SIGTERM, err
    sampled = [json.loads(line)["examples"] for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert saved(run_dir)[-1] in ("step-32", "step-36") and sampled[-1] == 32  # after the next step at the latest
    status, _, err = complete(arguments, tmp_path / "output", num_ranks)
    assert status == 0, err
    assert_equal_runs(run_dir, uninterrupted)


def signal_in_fill(num_batches: int) -> None:
    """Send this process SIGTERM while the reference's log-probs are computed, as train.py prepares it."""
    process_start.begin()
    logps, num_done = LiveReference.logps, itertools.count()

    def signalled(reference: LiveReference, batch: Any) -> Tensor:
        if next(num_done) == num_batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return logps(reference, batch)

    LiveReference.logps = signalled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=SLOW)])
def test_a_signal_while_the_reference_is_computed(
    tmp_path: Path, request: pytest.FixtureRequest, num_ranks: int
) -> None:
    inputs, uninterrupted, overrides = uninterrupted_on(num_ranks, request)
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    arguments = command(inputs, run_dir, *overrides, f"cache_dir={cache}")
    prepare = partial(signal_in_fill, 3)
    status, _, err = complete(arguments, tmp_path / "output", num_ranks, prepare=prepare)
    assert status == 128 + signal.SIGTERM, err
    assert err == "stopped by SIGTERM outside training: nothing to save\n"
    assert saved(run_dir) == [] and not (run_dir / "crash.log").exists()
    status, out, err = complete(arguments, tmp_path / "output", num_ranks)
    assert status == 0, err
    computed = re.search(r"reference: (\d+) log-probs computed", out)
    (database,) = (cache / "reference").glob("*.sqlite")
    with closing(sqlite3.connect(database)) as connection:
        (num_all,) = connection.execute("SELECT count(*) FROM logps").fetchone()
    assert computed and 0 < int(computed[1]) < num_all  # the others were kept
    assert_equal_runs(run_dir, uninterrupted)


def handles(pid: int, signal_number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) >> signal_number - 1 & 1)


@pytest.mark.parametrize(
    ("signal_number", "begun"),  # "": during the first imports; "run directory: ": while data are loaded
    slow_except([(signal.SIGTERM, "run directory: "), (signal.SIGINT, ""), (signal.SIGHUP, "")], signal.SIGINT),
)
def test_a_signal_before_training(inputs: Path, tmp_path: Path, signal_number: int, begun: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "train.py", *command(inputs, tmp_path / "run", f"cache_dir={tmp_path}/cache")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not handles(process.pid, signal.SIGHUP):  # the last handler that the program installs
        assert process.poll() is None
        time.sleep(0.001)
    while begun and not process.stdout.readline().startswith(begun):
        assert process.poll() is None
    process.send_signal(signal_number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal_number
    assert err == f"stopped by {signal.Signals(signal_number).name} outside training: nothing to save\n"


@pytest.mark.parametrize("begun", ["starting", pytest.param("waiting", marks=SLOW)])
def test_a_signal_before_workers_train(inputs: Path, tmp_path: Path, begun: str) -> None:
    """At the start of the workers, and while they wait for each other."""
    run_dir = tmp_path / "run"
    launcher = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *command(inputs, run_dir, *FSDP, "num_processes=2")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while len(children.read_text().split()) < 2 or (begun == "waiting" and not run_dir.exists()):
        assert launcher.poll() is None
        time.sleep(0.005)
    launcher.send_signal(signal.SIGINT)
    err = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 128 + signal.SIGINT, err
    assert err == "stopped by SIGINT before the first checkpoint; repeat the command\n"


def test_the_last_line_of_a_stopped_run_resumes_it(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run, of (mine)"
    arguments = [each for each in command(inputs, run_dir) if not each.startswith(("local_run_dir=", "resume="))]
    arguments += [f"local_run_dir='{run_dir}'"]
    prepare = partial(signal_in_step, 3, signal.SIGINT, 0)
    status, _, err = complete(arguments, tmp_path / "output", prepare=prepare)
    assert status == 128 + signal.SIGINT, err
    hint = err.splitlines()[-1]
    assert hint.startswith("stopped by SIGINT; to resume: ")
    resumed = shlex.split(hint.partition("to resume: ")[2])
    assert resumed[1] == "train.py" and resumed[2:] == [*arguments[:-1], arguments[-1], "resume=auto"]
    status, out, err = complete(resumed[2:], tmp_path / "output")
    assert status == 0 and f"resumed from {run_dir}/step-12" in out, err
    assert_equal_runs(run_dir, uninterrupted_run)


@pytest.mark.slow
def test_a_stopped_job_of_a_sweep_is_resumed_alone(inputs: Path, tmp_path: Path) -> None:
    arguments = [each for each in command(inputs, tmp_path) if not each.startswith(("local_run_dir=", "resume="))]
    sweep = ["seed=5,6", *arguments, "-m", f"local_dirs=[{tmp_path}]", "n_epochs=10", "n_examples=600"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *sweep],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any("loss/train" in log.read_text() for log in tmp_path.rglob("metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "job 1" not in out, err
    resumed = shlex.split(err.splitlines()[-1].partition("to resume: ")[2])[2:]
    assert "seed=5" in resumed and "-m" not in resumed and resumed[-1] == "resume=auto"
    status, out, err = complete(resumed, tmp_path / "output")
    assert status == 0 and "resumed from " in out, err
    run_dir = Path(out.splitlines()[-1].removeprefix("run_dir: "))
    assert "_seed-5_" in run_dir.name and saved(run_dir)[-1] == "step-600"


def test_a_signal_to_one_rank_stops_all(inputs: Path, uninterrupted_run_on_two: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, *FSDP)
    status, _, err = complete(arguments, tmp_path / "output", 2, prepare=partial(signal_in_step, 5, signal.SIGTERM, 1))
    assert status == 128 + signal.SIGTERM, err
    assert saved(run_dir)[-1] == "step-20"
    status, _, err = complete(arguments, tmp_path / "output", 2)
    assert status == 0, err
    assert_equal_runs(run_dir, uninterrupted_run_on_two)


@pytest.mark.parametrize("signal_number", [pytest.param(signal.SIGTERM, marks=SLOW), signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once(
    inputs: Path, uninterrupted_run: Path, tmp_path: Path, signal_number: int
) -> None:
    """It comes during the save of the first signal, delayed by a minute."""
    run_dir = tmp_path / "run"
    prepare = partial(signal_in_step, 3, signal_number, 0)
    with Process(
        command(inputs, run_dir), tmp_path / "output", fault="before_rename#3=wait", prepare=prepare
    ) as process:
        process.wait_until((run_dir / ".step-12.tmp" / "manifest.json").exists)
        time.sleep(StopRequest.MERGE_SECONDS + 0.1)
        process.send(signal_number)
        begun = time.monotonic()
        assert process.wait() == 128 + signal_number, process.err
        assert time.monotonic() - begun < 20
    assert saved(run_dir) == ["step-4", "step-8"] and (run_dir / "LATEST").resolve().name == "step-8"
    assert_checkpoints_intact(run_dir)
    status, _, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 0, err
    assert_equal_runs(run_dir, uninterrupted_run)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "all", "twice", "all, twice"])
def test_a_launched_run_is_signalled(inputs: Path, uninterrupted_run_on_two: Path, tmp_path: Path, how: str) -> None:
    """A real command with launcher and workers.

    Job schedulers signal the workers too. A closed terminal may signal twice."""
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, *FSDP, "num_processes=2")
    launcher = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run_dir / "metrics.jsonl").exists() and launcher.poll() is None:
        time.sleep(0.002)
    if "all" in how:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGTERM)
    launcher.send_signal(signal.SIGTERM)
    if "twice" in how:
        time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
    err = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 128 + signal.SIGTERM, err
    assert err.splitlines()[-1].endswith(f" num_processes=2 local_run_dir={run_dir} resume=auto"), err
    assert err.count("to resume: ") == 1
    assert len(saved(run_dir)) > 0
    assert_checkpoints_intact(run_dir)
    assert saved(run_dir)[-1] == f"step-{rows(run_dir)[-1]['counters/examples']}"
    status, _, err = complete(command(inputs, run_dir, *FSDP), tmp_path / "output", 2)
    assert status == 0, err
    assert_equal_runs(run_dir, uninterrupted_run_on_two)


@pytest.mark.slow
def test_a_lost_terminal_loses_no_step(inputs: Path, uninterrupted_run: Path, tmp_path: Path) -> None:
    """As with `| tee`: Ctrl-C ends tee too, and nobody reads the output."""
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *command(inputs, run_dir)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not (run_dir / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.002)
    assert process.stdout is not None
    process.stdout.close()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert len(saved(run_dir)) > 0
    assert_checkpoints_intact(run_dir)
    status, _, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 0, err
    assert_equal_runs(run_dir, uninterrupted_run)
