"""Runs of the program in separate processes, for tests to kill.

A fork server has imported everything already, so a run starts at once."""

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

import pytest
import torch
from transformers import LlamaForCausalLM

import engine.run.checkpoint_writer
import tests.conftest  # noqa: F401  the environment of all tests
import trainers
from engine.data.films import film_rows, film_tokenizer
from engine.models.archives import OPTIMIZER, WEIGHTS, checkpoints, find_corruption
from engine.models.weight_files import tensors_of
from engine.placement import process_group
from engine.run import fail_points
from tests.configs import composed
from tests.runs import SMALL, call_main

assert trainers and LlamaForCausalLM  # imported here, once for all runs

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload([__name__])

TIMINGS = ("examples_per_second", "tokens_per_second", "peak_memory_gb")
DPO = ("loss=dpo", "loss.beta=0.1")
# Fifteen steps, a checkpoint after each, and an evaluation with samples after every fourth.
COMMON = (
    *SMALL, *DPO, "wandb.enabled=false", "report=null", "optimizer=AdamW", "lr=1e-3", "warmup_steps=2", "n_examples=60",
    "batch_size=4", "save_every=4", "eval_every=16", "n_eval_examples=4", "eval_batch_size=4", "n_eval_model_samples=1",
    "max_length=104", "max_prompt_length=96", "token_budget=400", "minimum_log_interval_secs=0",
)  # fmt: skip
composed(*COMMON)  # fills the caches of Hydra, once for all runs
# Fail point of a save -> its pass number within the second save of a process.
POINTS = {
    "mkdir": 2,
    "half_file": 3,
    "before_fsync": 3,
    "before_manifest": 2,
    "before_rename": 2,
    "before_pointer": 2,
    "during_retention": 2,
}
TWO_RANK_TRAINERS = {  # trainer -> overrides
    "FSDPTrainer": ("trainer=FSDPTrainer",),
    "TensorParallelTrainer": ("trainer=TensorParallelTrainer",),
}


def make_inputs(directory: Path) -> None:
    """Write the tokenizer and the data of all runs; both are small."""
    film_tokenizer().save_pretrained(directory / "tokenizer")
    rows = ({key: row[key] for key in ("prompt", "chosen", "rejected")} for row in film_rows("test")[:80])
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Arguments of a run, with resume=auto."""
    override_keys = {override.partition("=")[0] for override in overrides}
    paths = (f"datasets=[{inputs}/pairs.jsonl]", f"model.tokenizer_name_or_path={inputs}/tokenizer")
    defaults = (*COMMON, *paths, f"cache_dir={inputs}/cache", f"local_run_dir={run_dir}", "resume=auto")
    return [*(default for default in defaults if default.partition("=")[0] not in override_keys), *overrides]


def _run(arguments: Sequence[str], output: str, environment: dict[str, str], fault: str, prepare: Callable) -> None:
    """`python train.py *arguments`, in a forked process."""
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(f"{output}.{name}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    fail_points.ARMED = fault
    prepare()
    with pytest.MonkeyPatch.context() as patches:
        process_group.exit_process(call_main(list(arguments), patches))


def do_nothing() -> None: ...


class Process:
    """A run on one process, or on several ranks.

    Args:
        arguments: of train.py.
        output: path of stdout and stderr, without .out and .err; later ranks add -<rank>.
        fault: the value of TRAINER_FAULT on all ranks.
        prepare: called in each process before the run.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        num_ranks: int = 1,
        fault: str = "",
        prepare: Callable[[], None] = do_nothing,
    ):
        self.output = output
        self.begun = time.monotonic()
        self._ranks = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for rank in range(num_ranks):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}  # fmt: skip
            path = f"{output}-{rank}" if rank else str(output)
            run_arguments = (list(arguments), path, environment if num_ranks > 1 else {}, fault, prepare)
            self._ranks.append(FORK_SERVER.Process(target=_run, args=run_arguments))
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

    def send(self, signal_number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all live ranks."""
        for process in self._ranks if rank is None else [self._ranks[rank]]:
            if process.is_alive() and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal_number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self._ranks:
            process.join()

    def wait(self, timeout: float = 120) -> int:
        """Wait until all ranks have ended; returns the first exit status other than 0.

        After the death of one rank the others are killed too, as by a launcher."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self._ranks):
            assert time.monotonic() < end, f"it hangs: {self.err}"
            if any(process.exitcode == -signal.SIGKILL for process in self._ranks):
                self.kill()
            for process in self._ranks:
                process.join(0.01)
        statuses = [process.exitcode for process in self._ranks if process.exitcode]
        return min(statuses, key=lambda status: status != -signal.SIGKILL, default=0)  # others may report its loss

    def wait_until(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        """Wait until a condition holds; the run must stay alive."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end and self.is_running(), self.err
            time.sleep(0.005)


def complete(arguments: Sequence[str], output: Path, num_ranks: int = 1, **kwargs: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a run."""
    with Process(arguments, output, num_ranks, **kwargs) as process:
        return process.wait(), process.out, process.err


# ---- Files of a run ----


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without timings and memory."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()

    def is_measured(key: str) -> bool:
        return key in TIMINGS or key.startswith("time/") or key == "rollout/tokens_per_second"

    return [{key: value for key, value in json.loads(line).items() if not is_measured(key)} for line in lines]


def state(checkpoint: Path) -> dict[str, Any]:
    """training_state.json of a checkpoint, without the sizes of logs."""
    found = json.loads((checkpoint / "training_state.json").read_text())
    del found["log_sizes"]  # timings vary in their number of digits
    return found


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    """Check two runs for equal logs and bitwise equal checkpoints, without leftovers."""
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
    assert_checkpoints_intact(ours)
    assert temporaries(ours) == []


def assert_checkpoints_intact(run_dir: Path) -> None:
    """Check every checkpoint of a run for corruption, and LATEST for a valid target."""
    assert {path.name: find_corruption(path) for path in checkpoints(run_dir)} == dict.fromkeys(
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
    """Mount a file system in memory; skips the test without permission to mount."""
    import subprocess

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
    max_signals: int,
    rng: random.Random,
    num_ranks: int = 1,
    seconds: float = 0.4,
    signal_number: int = signal.SIGKILL,
) -> int:
    """Run a command to its end, interrupted by up to max_signals signals; returns how many.

    Most signals come up to `seconds` after the first new log entry, during steps and saves. Some come at the start."""
    output = run_dir.with_name(f"{run_dir.name}-output")
    log, num_sent = run_dir / "metrics.jsonl", 0
    while True:
        with Process(arguments, output, num_ranks) as process:
            if num_sent < max_signals:
                before = _mtime(log)
                is_at_start = rng.random() < 0.2
                while not is_at_start and process.is_running() and _mtime(log) == before:
                    time.sleep(0.002)
                end = time.monotonic() + rng.uniform(0, seconds)
                while process.is_running() and time.monotonic() < end:
                    time.sleep(0.002)
                if process.is_running():
                    process.send(signal_number, rank=rng.randrange(num_ranks))
            status = process.wait()
        assert_checkpoints_intact(run_dir)
        if status == 0:
            return num_sent
        assert status in (-signal_number, 128 + signal_number), (status, process.err)
        num_sent += 1


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def damaged_copies(path: Path, how: str, num_places: int, rng: random.Random) -> Iterator[int]:
    """Damage a file at random places, one at a time; yields each place, and restores the file last.

    Args:
        how: flip (a bit) or truncate.
    """
    original = path.read_bytes()
    for _ in range(num_places):
        place = rng.randrange(len(original) * 8 if how == "flip" else len(original))
        if how == "flip":
            content = bytearray(original)
            content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)
        else:
            path.write_bytes(original[:place])
        yield place
    path.write_bytes(original)


def _skip_room_check() -> None:
    """Disable the check for free space before a save."""
    engine.run.checkpoint_writer._check_room = lambda target, num_bytes: None


def fail_on_a_full_disk(inputs: Path, run_dir: Path, num_free: int, expected: Path) -> None:
    """Run on a disk with num_free bytes until it is full; resume with more room.

    A run needs about 2.5 times the size of its last checkpoint: two are kept, and only the last has a policy.pt.
    """
    disk, output = run_dir.parent, inputs / f"{run_dir.name}-output"
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - num_free)))
    status, _, err = complete(command(inputs, run_dir), output, prepare=_skip_room_check)
    assert status == 6 and err.count("\n") == 1 and err.startswith("error[STORAGE] "), (num_free, status, err)
    assert_checkpoints_intact(run_dir)
    assert temporaries(run_dir) == [], num_free
    ballast.unlink()
    status, _, err = complete(command(inputs, run_dir), output)
    assert status == 0, err
    assert_equal_runs(run_dir, expected)
    shutil.rmtree(run_dir)


def fail_at_each_point(
    inputs: Path, run_dir: Path, overrides: tuple[str, ...], num_ranks: int, how: str, points: tuple[str, ...]
) -> None:
    """Let a run fail at each point of its second save, and resume from the first."""
    output = run_dir.with_name(f"{run_dir.name}-output")
    for point in points:
        before = saved(run_dir)
        fault = f"{point}#{POINTS[point]}={'half' if (point, how) == ('half_file', 'kill') else how}"
        status, _, err = complete(command(inputs, run_dir, *overrides), output, num_ranks, fault=fault)
        assert saved(run_dir)[-1:] != before[-1:], fault  # the first save succeeded
        assert_checkpoints_intact(run_dir)
        if how == "kill":
            assert status == -signal.SIGKILL, (fault, err)
        else:
            assert status == 6 and err.startswith("error[STORAGE] "), (fault, status, err)
            assert "could not be written ([Errno 28] No space left on device)" in err, err
            assert not list(run_dir.glob(".step-*")), fault
    status, _, err = complete(command(inputs, run_dir, *overrides), output, num_ranks)
    assert status == 0, err
