"""Runs of the program in processes of their own, which may be killed. They are forked from one that has imported
everything, so that a run starts at once."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import engine.checkpoint
import tests.conftest  # noqa: F401  the environment of all tests
import train
import trainers
from engine import distributed, faults
from engine.checkpoint import OPTIMIZER, WEIGHTS, checkpoints, damage, tensors_of
from engine.films import film_rows, film_tokenizer
from tests.runs import SMALL

assert trainers  # imported so that no run has to

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])

TIMINGS = ("examples_per_second", "tokens_per_second", "peak_memory_gb")
DPO = ("loss=dpo", "loss.beta=0.1")
# Fifteen steps, each saved, and an evaluation with samples after each fourth.
COMMON = (
    *SMALL, *DPO, "wandb.enabled=false", "optimizer=AdamW", "lr=1e-3", "warmup_steps=2", "n_examples=60",
    "batch_size=4", "save_every=4", "eval_every=16", "n_eval_examples=4", "eval_batch_size=4", "n_eval_model_samples=1",
    "max_length=104", "max_prompt_length=96", "token_budget=400", "minimum_log_interval_secs=0",
)  # fmt: skip
# Where a save may fail -> which pass of the point is in the second save of a process.
POINTS = {
    "mkdir": 2,
    "half_file": 3,
    "before_fsync": 3,
    "before_manifest": 2,
    "before_rename": 2,
    "before_pointer": 2,
    "during_retention": 2,
}
TWO = {  # trainers of two processes
    "FSDPTrainer": ("trainer=FSDPTrainer",),
    "TensorParallelTrainer": ("trainer=TensorParallelTrainer",),
}


def make_inputs(directory: Path) -> None:
    """What runs read, small enough that none has to wait for it."""
    film_tokenizer().save_pretrained(directory / "tokenizer")
    rows = ({key: row[key] for key in ("prompt", "chosen", "rejected")} for row in film_rows("test")[:80])
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The command of a run that goes on where it was stopped."""
    given = {override.partition("=")[0] for override in overrides}
    paths = (f"datasets=[{inputs}/pairs.jsonl]", f"model.tokenizer_name_or_path={inputs}/tokenizer")
    defaults = (*COMMON, *paths, f"cache_dir={inputs}/cache", f"local_run_dir={run_dir}", "resume=auto")
    return [*(default for default in defaults if default.partition("=")[0] not in given), *overrides]


def _run(arguments: Sequence[str], output: str, environment: dict[str, str], fault: str, prepare: Callable) -> None:
    """`python train.py *arguments` in a process that was forked for it."""
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(f"{output}.{name}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    faults.ARMED = fault
    prepare()
    sys.argv = ["train.py", *arguments]
    distributed.exit_process(train.main())


def nothing() -> None: ...


class Process:
    """A run on one process, or on several ranks.

    Args:
        arguments: of train.py.
        output: what is printed goes to output.out and output.err, of later ranks to output-<rank>.out.
        fault: what TRAINER_FAULT would be, on all ranks.
        prepare: called in each process before the run.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        num: int = 1,
        fault: str = "",
        prepare: Callable[[], None] = nothing,
    ):
        self.output = output
        self.begun = time.monotonic()
        self._ranks = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for rank in range(num):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num),
                           "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            path = f"{output}-{rank}" if rank else str(output)
            given = (list(arguments), path, environment if num > 1 else {}, fault, prepare)
            self._ranks.append(FORKS.Process(target=_run, args=given))
        for process in self._ranks:
            process.start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def out(self) -> str:
        return self.output.with_name(f"{self.output.name}.out").read_text()

    @property
    def err(self) -> str:
        return self.output.with_name(f"{self.output.name}.err").read_text()

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self._ranks)

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all that still run."""
        for process in self._ranks if rank is None else [self._ranks[rank]]:
            if process.is_alive() and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self._ranks:
            process.join()

    def wait(self, timeout: float = 120) -> int:
        """Wait until all ranks have ended; returns the exit status of the first that did not end well. When one was
        killed, the others are killed too, as a launcher would."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self._ranks):
            assert time.monotonic() < end, f"it hangs: {self.err}"
            if any(process.exitcode == -signal.SIGKILL for process in self._ranks):
                self.kill()
            for process in self._ranks:
                process.join(0.01)
        statuses = [process.exitcode for process in self._ranks if process.exitcode]
        return min(statuses, key=lambda status: status != -signal.SIGKILL, default=0)  # others may say they lost it

    def wait_until(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        """Wait until a condition holds, while the run goes on."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end and self.is_running(), self.err
            time.sleep(0.005)


def complete(arguments: Sequence[str], output: Path, num: int = 1, **kwargs: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a run."""
    with Process(arguments, output, num, **kwargs) as process:
        return process.wait(), process.out, process.err


# ---- What a run has left ----


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl has, without what differs between equal runs."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def state(checkpoint: Path) -> dict[str, Any]:
    """training_state.json of a checkpoint, without what differs between equal runs."""
    found = json.loads((checkpoint / "training_state.json").read_text())
    del found["log_sizes"]  # timings have more or fewer digits
    return found


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    """Two runs have logged the same, and saved the same to the last bit; and nothing else is left."""
    assert rows(ours) == rows(theirs)
    samples = [(run_dir / "samples.jsonl").read_text() for run_dir in (ours, theirs)]
    assert samples[0] == samples[1]
    newest = [(run_dir / "LATEST").resolve() for run_dir in (ours, theirs)]
    assert newest[0].name == newest[1].name == checkpoints(ours)[-1].name
    assert state(newest[0]) == state(newest[1])
    for kind in (WEIGHTS, OPTIMIZER):
        found, expected = (dict(tensors_of(checkpoint, kind)) for checkpoint in newest)
        assert expected and found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert_whole(ours)
    assert temporaries(ours) == []


def assert_whole(run_dir: Path) -> None:
    """Every checkpoint of a run is as it was written, and LATEST is one of them, if there are any."""
    assert {path.name: damage(path) for path in checkpoints(run_dir)} == dict.fromkeys(
        path.name for path in checkpoints(run_dir)
    )
    latest = run_dir / "LATEST"
    assert latest.exists() == latest.is_symlink()


def temporaries(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob(".*"))


def saved(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(run_dir)]


@contextlib.contextmanager
def small_disk(directory: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own, in memory; skips the test where that is not permitted."""
    import subprocess

    import pytest

    directory.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def interrupt_randomly(
    arguments: Sequence[str],
    run_dir: Path,
    most: int,
    chance: random.Random,
    num: int = 1,
    seconds: float = 0.4,
    number: int = signal.SIGKILL,
) -> int:
    """Run a command whose run_dir is given until it comes to its end, and send it a signal up to so many times before:
    mostly in its steps and saves, up to so many seconds after they began, sometimes in its start. Returns how often."""
    output = run_dir.with_name(f"{run_dir.name}-output")
    log, times = run_dir / "metrics.jsonl", 0
    while True:
        with Process(arguments, output, num) as process:
            if times < most:
                before = _changed(log)
                starts = chance.random() < 0.2
                while not starts and process.is_running() and _changed(log) == before:
                    time.sleep(0.002)
                end = time.monotonic() + chance.uniform(0, seconds)
                while process.is_running() and time.monotonic() < end:
                    time.sleep(0.002)
                if process.is_running():
                    process.send(number, rank=chance.randrange(num))
            status = process.wait()
        assert_whole(run_dir)
        if status == 0:
            return times
        assert status in (-number, 128 + number), (status, process.err)
        times += 1


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def damaged_copies(path: Path, how: str, num: int, chance: random.Random) -> Iterator[int]:
    """Damage a file at num random places, one after another; yields each, and in the end puts the file right.

    Args:
        how: flip (a bit) or truncate.
    """
    whole = path.read_bytes()
    for _ in range(num):
        place = chance.randrange(len(whole) * 8 if how == "flip" else len(whole))
        if how == "flip":
            content = bytearray(whole)
            content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)
        else:
            path.write_bytes(whole[:place])
        yield place
    path.write_bytes(whole)


def _believe_in_room() -> None:
    """Let a save find out for itself that there is no room."""
    engine.checkpoint._check_room = lambda target, num_bytes: None


def fail_on_a_full_disk(inputs: Path, run_dir: Path, num_free: int, whole: Path) -> None:
    """A run on a small disk that has so many bytes left, which it fills; and then goes on with more room.

    It needs about 2.5 times what its last checkpoint takes, as two are kept, and the others have no policy.pt.
    """
    disk, output = run_dir.parent, inputs / f"{run_dir.name}-output"
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - num_free)))
    status, _, err = complete(command(inputs, run_dir), output, prepare=_believe_in_room)
    assert status == 6 and err.count("\n") == 1 and err.startswith("error[STORAGE] "), (num_free, status, err)
    assert_whole(run_dir)
    assert temporaries(run_dir) == [], num_free
    ballast.unlink()
    status, _, err = complete(command(inputs, run_dir), output)
    assert status == 0, err
    assert_equal_runs(run_dir, whole)
    shutil.rmtree(run_dir)


def fail_at_each_point(
    inputs: Path, run_dir: Path, overrides: tuple[str, ...], num: int, what: str, points: tuple[str, ...]
) -> None:
    """A run that fails at each point of its second save, and goes on from the first."""
    output = run_dir.with_name(f"{run_dir.name}-output")
    for point in points:
        before = saved(run_dir)
        fault = f"{point}#{POINTS[point]}={'half' if (point, what) == ('half_file', 'kill') else what}"
        status, _, err = complete(command(inputs, run_dir, *overrides), output, num, fault=fault)
        assert saved(run_dir)[-1:] != before[-1:], fault  # the first was saved
        assert_whole(run_dir)
        if what == "kill":
            assert status == -signal.SIGKILL, (fault, err)
        else:
            assert status == 6 and err.startswith("error[STORAGE] "), (fault, status, err)
            assert "could not be written ([Errno 28] No space left on device)" in err, err
            assert not list(run_dir.glob(".step-*")), fault
    status, _, err = complete(command(inputs, run_dir, *overrides), output, num)
    assert status == 0, err
