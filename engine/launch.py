"""Starts a run's workers on this machine, watches over them, and ends them all when one fails. Needs no torch.

A worker is this program again. It gets its config on its standard input, as a config may hold secrets, and its rank in
the environment. It reports the error that ended it through a pipe, so that of all that is lost with one worker only the
cause is shown.
"""

import codecs
import ctypes
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from utils import EXIT_STATUS, StopRequest

PROGRAM = Path(__file__).resolve().parent.parent / "train.py"
LINK = "TRAIN_WORKER"  # the variable with what a worker must know of its launcher
# What the others have to end by themselves, and say why, after one has failed: time to close logs. Less where all that
# has failed have lost others, as then one of those that go on is likely to hang.
SETTLE_SECONDS = 6
SETTLE_SECONDS_HANGING = 2
KEPT_STDERR = 2**16  # bytes
STOPPED = [128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]  # what was reached is saved
PR_SET_PDEATHSIG = 1


@dataclass
class Failure:
    """What ended a worker.

    Args:
        line: the error, in one line.
        status: the exit status that goes with it.
        is_consequence: whether it says no more than that other ranks were lost.
        time: when it happened, on the clock that all processes of a machine share.
    """

    line: str
    status: int
    is_consequence: bool
    time: float = field(default_factory=time.monotonic)


def of_rank(rank: int, line: str) -> str:
    """An error line that names the rank it is from."""
    return line.replace("] ", f"] rank {rank}: ", 1)


# ---- In a worker ----


def is_worker() -> bool:
    return LINK in os.environ


def attach() -> DictConfig:
    """Tie this worker's life to its launcher's; returns the config to run."""
    launcher = json.loads(os.environ[LINK])["launcher_pid"]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it was gone before the line above
        os._exit(1)
    config = OmegaConf.create(sys.stdin.buffer.read().decode())
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)  # as Hydra does: a key that is not there is an error
    return config


def report(failure: Failure) -> None:
    """Tell the launcher what ended this worker."""
    with suppress(OSError):  # of a launcher that is gone
        os.write(json.loads(os.environ[LINK])["report_fd"], json.dumps(asdict(failure)).encode() + b"\n")


def rendezvous_socket() -> int | None:
    """The descriptor of the listening socket that rank 0 was handed for the rendezvous; None on other ranks."""
    return json.loads(os.environ[LINK])["rendezvous_fd"]


# ---- In the launcher ----


class Worker:
    """A worker as its launcher sees it: the process, what it has reported, and the end of its stderr."""

    def __init__(self, rank: int, num: int, command: Sequence[str | Path], config: bytes, rendezvous: socket.socket):
        self.rank = rank
        self.reported = b""
        self.stderr = b""
        self.ended = math.inf
        self.hangs: str | None = None  # how, if it had to be killed
        self.was_killed = False
        self._report, report_end = os.pipe()
        rendezvous_fd = rendezvous.fileno() if rank == 0 else None
        link = {"launcher_pid": os.getpid(), "report_fd": report_end, "rendezvous_fd": rendezvous_fd}
        environment = {
            "OMP_NUM_THREADS": str(max(1, num_cores() // num)),  # else each would take them all
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(num),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(num),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(rendezvous.getsockname()[1]),
            LINK: json.dumps(link),
        }
        try:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=descriptor(sys.stdout) if rank == 0 else subprocess.DEVNULL,
                stderr=descriptor(sys.stderr) if rank == 0 else subprocess.PIPE,
                pass_fds=[end for end in (report_end, rendezvous_fd) if end is not None],
                start_new_session=True,  # signals come from the launcher, not from the terminal
            )
        finally:
            os.close(report_end)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin:
            self.process.stdin.write(config)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have what the worker writes read by selector."""
        selector.register(self._report, selectors.EVENT_READ, self._keep_report)
        if self.process.stdout:
            selector.register(self.process.stdout.fileno(), selectors.EVENT_READ, writer(sys.stdout))
        if self.process.stderr:
            keep = writer(sys.stderr) if self.rank == 0 else self._keep_stderr
            selector.register(self.process.stderr.fileno(), selectors.EVENT_READ, keep)

    def _keep_report(self, data: bytes) -> None:
        self.reported += data

    def _keep_stderr(self, data: bytes) -> None:
        self.stderr = (self.stderr + data)[-KEPT_STDERR:]

    def is_running(self) -> bool:
        if self.process.poll() is None:
            return True
        self.ended = min(self.ended, time.monotonic())
        return False

    def is_stopped(self) -> bool:
        return process_state(self.process.pid) in ("T", "t")

    def died(self) -> bool:
        """Whether a signal ended it that was not from here."""
        return (self.process.returncode or 0) < 0 and not self.was_killed

    def give_up(self) -> None:
        """Kill a worker that goes on after others have failed."""
        if not self.reported:
            self.hangs = "is stopped" if self.is_stopped() else "does not answer"
        self.kill()

    def kill(self) -> None:
        """Kill the worker and the processes that it has started."""
        self.was_killed |= self.process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self.process.wait()
        os.close(self._report)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()

    def failure(self) -> Failure | None:
        """What ended the worker, or is about to; None if nothing did, or this launcher."""
        with suppress(ValueError):  # of a report that was not written to its end
            return Failure(**json.loads(self.reported))
        status = self.process.returncode or 0
        if self.died():
            name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
            fix = "the system's log may say why (often memory that ran out); then continue with resume="
            line = f"error[DISTRIBUTED] rank {self.rank} was killed by {name}; fix: {fix}"
            return Failure(line, EXIT_STATUS["DISTRIBUTED"], False, self.ended)
        if status > 0 and status not in STOPPED:
            line = f"error[INTERNAL] rank {self.rank} ended with status {status} and no report; fix: see its messages"
            return Failure(line, 1, False, self.ended)
        return None


def descriptor(stream: TextIO) -> int:
    """The descriptor behind stream, so that a worker may write to it (and to a terminal) itself; else a pipe."""
    try:
        return stream.fileno()
    except (OSError, ValueError):  # captured, as in tests and notebooks
        return subprocess.PIPE


def writer(stream: TextIO) -> Callable[[bytes], Any]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda data: stream.write(decoder.decode(data))


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def process_state(pid: int) -> str:
    """R, S, D, T, Z, ... as in proc(5); empty if it cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def launch(config: DictConfig, num: int, command: Sequence[str | Path] = (sys.executable, PROGRAM)) -> int:
    """Run config in num workers of this machine, print the error that ended them, if any; returns the exit status.

    No worker outlives this call, nor the process that makes it. A failure ends the run: what has not ended by itself
    SETTLE_SECONDS after the first one is killed.

    Args:
        config: composed, with all names derived; the workers get it as it is.
        num: how many workers; they are the ranks 0 to num - 1.
        command: what a worker is; it must call attach() first, and report() the error that ends it.
    """
    workers: list[Worker] = []
    text = OmegaConf.to_yaml(config).encode()  # what comes from the environment stays a name, as in what is written
    sys.stdout.flush()

    def forward(number: int) -> None:
        for worker in workers:
            worker.process.send_signal(number)

    def kill(number: int) -> None:
        for worker in workers:
            worker.kill()

    with StopRequest(forward, kill) as stop, selectors.DefaultSelector() as selector:
        try:
            # Rank 0 gets the socket itself: a free port that is only named might be taken by the time it listens.
            with socket.create_server(("127.0.0.1", 0), backlog=num) as rendezvous:
                for rank in range(num):
                    worker = Worker(rank, num, command, text, rendezvous)
                    workers.append(worker)
                    worker.register(selector)
                    if stop.signal is not None:
                        worker.process.send_signal(stop.signal)
            supervise(workers, selector)
        finally:
            for worker in workers:
                worker.close()
    reported = [worker.failure() for worker in workers if worker.reported]
    if stop.signal is not None and not any(failure and not failure.is_consequence for failure in reported):
        return 128 + stop.signal if any(worker.process.returncode for worker in workers) else 0
    return conclude(workers)


def supervise(workers: Sequence[Worker], selector: selectors.BaseSelector) -> None:
    """Wait until all workers have ended; after a failure not for long."""
    failed_at = math.inf
    while True:
        read(selector, 0.1)
        running = [worker for worker in workers if worker.is_running()]
        if not running:
            break
        failures = [failure for worker in workers if (failure := worker.failure())]
        if failures:
            failed_at = min(failed_at, time.monotonic())
            is_hanging = all(failure.is_consequence for failure in failures)
            is_over = time.monotonic() > failed_at + (SETTLE_SECONDS_HANGING if is_hanging else SETTLE_SECONDS)
            if is_over or all(worker.is_stopped() for worker in running):
                for worker in running:
                    worker.give_up()
    while read(selector, 0):  # what was written at the end
        pass


def read(selector: selectors.BaseSelector, timeout: float) -> bool:
    """Read what there is, or comes within timeout seconds; returns whether it was anything."""
    ready = selector.select(timeout)
    for key, _ in ready:
        data = os.read(key.fd, KEPT_STDERR)
        if data:
            key.data(data)
        else:
            selector.unregister(key.fd)
    return bool(ready)


def conclude(workers: Sequence[Worker]) -> int:
    """Print the error that ended workers, if one did, in one line that names the first rank that failed by itself;
    returns the exit status."""
    failures = {worker: failure for worker in workers if (failure := worker.failure())}
    if not failures:
        return max(worker.process.returncode or 0 for worker in workers)
    hanging = [worker for worker in workers if worker.hangs]
    if any(worker.hangs == "is stopped" for worker in hanging):
        hanging = [worker for worker in hanging if worker.hangs == "is stopped"]
        for worker, failure in failures.items():  # NCCL ends a process so that has waited in vain
            failure.is_consequence |= worker.died() and worker.process.returncode == -signal.SIGABRT

    first, failure = min(failures.items(), key=lambda item: (item[1].is_consequence, item[1].time))
    line = failure.line
    if failure.is_consequence and hanging:
        ranks = ", ".join(str(worker.rank) for worker in hanging)
        line = (
            f"error[DISTRIBUTED] rank {ranks} {hanging[0].hangs}, and rank {first.rank} has waited in vain; fix: find"
            " out what holds it up, or raise collective_timeout if it is only slow; then continue with resume="
        )
        failure.status = EXIT_STATUS["DISTRIBUTED"]
    elif first.reported:
        is_everyones = len(failures) == len(workers) and all(other.line == line for other in failures.values())
        line = line if is_everyones else of_rank(first.rank, line)
    if first.stderr and (failure.status == 1 or first.died()):
        print(first.stderr.decode(errors="replace").rstrip(), file=sys.stderr)
    print(line, file=sys.stderr)
    return failure.status


def count_gpus() -> int:
    """How many GPUs torch would see. Only where there may be some is torch asked, in a process of its own."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    result = subprocess.run(command, capture_output=True, text=True)
    return int(result.stdout) if result.returncode == 0 else 0
