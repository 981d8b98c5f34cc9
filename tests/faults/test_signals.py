"""SIGTERM and SIGINT: the step is finished and saved, and a second one is obeyed at once."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.processes import Process, assert_equal_runs, assert_whole, command, complete, rows, saved
from trainers import BasicTrainer, Batch, Step
from utils import StopRequest

ROOT = Path(__file__).resolve().parent.parent.parent
FSDP = ("trainer=FSDPTrainer",)
SIGNALS = [signal.SIGTERM, signal.SIGINT]
step = BasicTrainer.step


def signal_in_step(update: int, number: int, on_rank: int) -> None:
    """Have each process that this is called in get a signal while it takes a step."""

    def signalled(trainer: BasicTrainer, batch: Batch) -> Step:
        if trainer.counters["updates"] == update - 1 and trainer.rank == on_rank:
            os.kill(os.getpid(), number)
        return step(trainer, batch)

    BasicTrainer.step = signalled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("update", [3, 4])  # an evaluation is due after the fourth
def test_a_signal_ends_the_run_after_its_step(
    inputs: Path, whole: Path, tmp_path: Path, number: int, update: int
) -> None:
    run_dir = tmp_path / "run"
    prepare = partial(signal_in_step, update, number, 0)
    arguments = command(inputs, run_dir, "save_every=1000")
    status, out, err = complete(arguments, tmp_path / "output", prepare=prepare)
    assert status == 128 + number, err
    assert f"{signal.Signals(number).name}: saving after this step" in err
    assert saved(run_dir) == [f"step-{4 * update}"] and rows(run_dir)[-1]["counters/updates"] == update
    assert_whole(run_dir)
    status, out, err = complete(arguments, tmp_path / "output")
    assert status == 0 and f"resumed from {run_dir}/step-{4 * update}" in out, err
    assert_equal_runs(run_dir, whole)


def hang_up(kept_away: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if kept_away else signal.SIG_DFL)
    signal_in_step(3, signal.SIGHUP, 0)


@pytest.mark.parametrize("kept_away", [False, True])
def test_a_terminal_that_closes_ends_the_run_but_not_under_nohup(
    inputs: Path, whole: Path, tmp_path: Path, kept_away: bool
) -> None:
    run_dir = tmp_path / "run"
    status, _, err = complete(command(inputs, run_dir), tmp_path / "output", prepare=partial(hang_up, kept_away))
    assert status == (0 if kept_away else 129), err
    if not kept_away:
        assert saved(run_dir)[-1] == "step-12"
        assert complete(command(inputs, run_dir), tmp_path / "output")[0] == 0
    assert_equal_runs(run_dir, whole)


def signal_in_evaluation(update: int, on_rank: int) -> None:
    """Have each process that this is called in get SIGTERM while it evaluates after a step, and take its time."""
    run_microbatch = BasicTrainer.run_microbatch

    def signalled(trainer: BasicTrainer, *arguments: Any) -> Tensor:
        if not torch.is_grad_enabled() and trainer.counters["updates"] == update and trainer.rank == on_rank:
            if trainer.stop.signal is None:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise AssertionError("it goes on evaluating")
        return run_microbatch(trainer, *arguments)

    BasicTrainer.run_microbatch = signalled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "num, update",
    [(1, 0), (1, 8), (1, 15), (2, 8)],  # before the first step, between steps, after the last
)
def test_a_signal_ends_an_evaluation(tmp_path: Path, request: pytest.FixtureRequest, num: int, update: int) -> None:
    """It is made up for when the run goes on."""
    inputs, whole = (request.getfixturevalue(name) for name in ("inputs", "whole" if num == 1 else "whole_on_two"))
    run_dir, overrides = tmp_path / "run", () if num == 1 else FSDP
    arguments = command(inputs, run_dir, *overrides, "eval_batch_size=1")
    prepare = partial(signal_in_evaluation, update, num - 1)
    status, _, err = complete(arguments, tmp_path / "output", num, prepare=prepare)
    assert status == 128 + signal.SIGTERM, err
    assert saved(run_dir)[-1] == f"step-{4 * update}"
    logged = rows(run_dir) if update else []
    assert not any("loss/eval" in row for row in logged if row["counters/updates"] == update)
    assert_whole(run_dir)
    arguments = command(inputs, run_dir, *overrides)
    status, out, err = complete(arguments, tmp_path / "output", num)
    assert status == 0 and f"resumed from {run_dir}/step-{4 * update}" in out, err
    assert_equal_runs(run_dir, whole)


def test_a_signal_to_one_rank_stops_all(inputs: Path, whole_on_two: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(inputs, run_dir, *FSDP)
    status, _, err = complete(arguments, tmp_path / "output", 2, prepare=partial(signal_in_step, 5, signal.SIGTERM, 1))
    assert status == 128 + signal.SIGTERM, err
    assert saved(run_dir)[-1] == "step-20"
    status, _, err = complete(arguments, tmp_path / "output", 2)
    assert status == 0, err
    assert_equal_runs(run_dir, whole_on_two)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_is_obeyed_at_once(inputs: Path, whole: Path, tmp_path: Path, number: int) -> None:
    """While the checkpoint that the first one has begun is being written, which takes a minute."""
    run_dir = tmp_path / "run"
    prepare = partial(signal_in_step, 3, number, 0)
    with Process(
        command(inputs, run_dir), tmp_path / "output", fault="before_rename#3=wait", prepare=prepare
    ) as process:
        process.wait_until((run_dir / ".step-12.tmp" / "manifest.json").exists)
        time.sleep(StopRequest.TOGETHER + 0.1)
        process.send(number)
        begun = time.monotonic()
        assert process.wait() == 128 + number, process.err
        assert time.monotonic() - begun < 2
    assert saved(run_dir) == ["step-4", "step-8"] and (run_dir / "LATEST").resolve().name == "step-8"
    assert_whole(run_dir)
    status, _, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 0, err
    assert_equal_runs(run_dir, whole)


@pytest.mark.parametrize("how", ["once", "all", "twice"])
def test_a_launched_run_is_signalled(inputs: Path, whole_on_two: Path, tmp_path: Path, how: str) -> None:
    """As a user would see it: the command, its launcher and the workers of that, which job schedulers signal too; a
    terminal that closes may do it twice."""
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
    if how == "all":
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGTERM)
    launcher.send_signal(signal.SIGTERM)
    if how == "twice":
        time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
    err = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 128 + signal.SIGTERM, err
    assert len(saved(run_dir)) > 0
    assert_whole(run_dir)
    assert saved(run_dir)[-1] == f"step-{rows(run_dir)[-1]['counters/examples']}"
    status, _, err = complete(command(inputs, run_dir, *FSDP), tmp_path / "output", 2)
    assert status == 0, err
    assert_equal_runs(run_dir, whole_on_two)


def test_a_terminal_that_is_gone_costs_no_step(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """As with `| tee`, which Ctrl-C ends too: nobody reads any more what the run prints, nor what the signal says."""
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
    assert_whole(run_dir)
    status, _, err = complete(command(inputs, run_dir), tmp_path / "output")
    assert status == 0, err
    assert_equal_runs(run_dir, whole)
