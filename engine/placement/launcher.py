"""Start workers on this machine, supervise them, and report the first error."""

import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.placement.worker import KEPT_STDERR, Worker
from utils import EXIT_STATUS, StopRequest

PROGRAM = Path(__file__).resolve().parents[2] / "train.py"
# After a failure, the time for the other workers to end by themselves: they close logs and report their own errors.
SETTLE_SECONDS = 6
SETTLE_SECONDS_HANGING = 2  # if all failures are consequences: a running worker probably hangs


def launch(text: str, num: int, command: Sequence[str | Path] = (sys.executable, PROGRAM)) -> int:
    """Run num workers on this machine, print their error, if any, and return the exit status.

    No worker outlives this call or this process. After a failure, the others have SETTLE_SECONDS to end.

    Args:
        text: for the workers' standard input: settings, as they may hold secrets.
        num: the number of workers, ranks 0 to num - 1.
        command: starts a worker. It must call attach() first, and report() the error that ends it.
    """
    workers = WorkerGroup()
    sys.stdout.flush()
    with StopRequest(workers.forward, workers.kill) as stop, selectors.DefaultSelector() as selector:
        try:
            workers.start(text, num, command, selector, stop)
            while workers.are_running():
                read_output(selector, 0.1)
            read_rest(selector)
        finally:
            workers.close(selector)
    return workers.status(stop.signal)


class WorkerGroup:
    """The workers of one run.

    Args:
        label: of the run among others, in its error line; empty for one alone.
        environment: variables of the workers, over those of this process.
        is_prefixed: the label is before each line of its output too, as others write at the same time.
    """

    def __init__(self, label: str = "", environment: Mapping[str, str] | None = None, is_prefixed: bool = False):
        self.workers: list[Worker] = []
        self._label, self._environment = label, environment or {}
        self._prefix = f"{label}: " if is_prefixed else ""
        self._failed_at = math.inf

    def start(
        self,
        text: str,
        num: int,
        command: Sequence[str | Path],
        selector: selectors.BaseSelector,
        stop: StopRequest,
    ) -> None:
        """Start num workers. A signal noted in the meantime reaches all of them."""
        # Rank 0 inherits the socket. Another process could take a free port passed by number only.
        with socket.create_server(("127.0.0.1", 0), backlog=num) as rendezvous:
            for rank in range(num):
                worker = Worker(rank, num, command, text.encode(), rendezvous, self._environment, self._prefix)
                self.workers.append(worker)
                worker.register(selector)
                if stop.signal is not None:
                    worker.process.send_signal(stop.signal)

    def forward(self, number: int) -> None:
        """Send a signal to every worker."""
        for worker in self.workers:
            worker.process.send_signal(number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        for worker in self.workers:
            worker.kill()

    def close(self, selector: selectors.BaseSelector) -> None:
        """Kill what still runs, and close all pipes."""
        for worker in self.workers:
            worker.close(selector)

    def are_running(self) -> bool:
        """Whether any worker runs. Some time after a failure, those still running are killed."""
        running = [worker for worker in self.workers if worker.is_running()]
        failures = [failure for worker in self.workers if (failure := worker.failure())]
        if running and failures:
            self._failed_at = min(self._failed_at, time.monotonic())
            is_hanging = all(failure.is_consequence for failure in failures)
            seconds = SETTLE_SECONDS_HANGING if is_hanging else SETTLE_SECONDS
            is_over = time.monotonic() > self._failed_at + seconds
            if is_over or all(worker.is_stopped() for worker in running):
                for worker in running:
                    worker.kill_hanging()
        return bool(running)

    def status(self, stopped_by: int | None) -> int:
        """The exit status of ended workers; prints their error, if any.

        Args:
            stopped_by: the signal forwarded to them.
        """
        reported = [worker.failure() for worker in self.workers if worker.reported]
        if stopped_by is not None and not any(failure and not failure.is_consequence for failure in reported):
            return 128 + stopped_by if any(worker.process.returncode for worker in self.workers) else 0
        return print_failure(self.workers, self._label)


def read_rest(selector: selectors.BaseSelector) -> None:
    """Read the last lines of ended workers."""
    while read_output(selector, 0):
        pass


def read_output(selector: selectors.BaseSelector, timeout: float) -> bool:
    """Read output available within timeout seconds; returns whether there was any."""
    ready = selector.select(timeout)
    for key, _ in ready:
        data = os.read(key.fd, KEPT_STDERR)
        if data:
            key.data(data)
        else:
            selector.unregister(key.fd)
    return bool(ready)


def print_failure(workers: Sequence[Worker], label: str = "") -> int:
    """Print the error of the first rank that failed by itself, on one line; returns the exit status.

    Args:
        label: of the run among others.
    """
    failures = {worker: failure for worker in workers if (failure := worker.failure())}
    if not failures:
        return max(worker.process.returncode or 0 for worker in workers)
    hanging = [worker for worker in workers if worker.hang_reason]
    if any(worker.hang_reason == "is stopped" for worker in hanging):
        hanging = [worker for worker in hanging if worker.hang_reason == "is stopped"]
        for worker, failure in failures.items():  # NCCL aborts a process after a timeout
            failure.is_consequence |= worker.died() and worker.process.returncode == -signal.SIGABRT

    first, failure = min(failures.items(), key=lambda item: (item[1].is_consequence, item[1].time))
    line = failure.line
    if failure.is_consequence and hanging:
        ranks = ", ".join(str(worker.rank) for worker in hanging)
        line = (
            f"error[DISTRIBUTED] rank {ranks} {hanging[0].hang_reason}, and rank {first.rank} timed out waiting; fix:"
            " find the cause, or raise collective_timeout if the rank is only slow; then continue with resume="
        )
        failure.status = EXIT_STATUS["DISTRIBUTED"]
    elif first.reported:
        is_everyones = len(failures) == len(workers) and all(other.line == line for other in failures.values())
        line = line if is_everyones else add_rank(first.rank, line)
    if first.stderr and (failure.status == 1 or first.died()):
        print(first.stderr.decode(errors="replace").rstrip(), file=sys.stderr)
    print(add_label(label, line) if label else line, file=sys.stderr)
    return failure.status


def add_rank(rank: int, line: str) -> str:
    """An error line with the rank of its origin."""
    return add_label(f"rank {rank}", line)


def add_label(label: str, line: str) -> str:
    """An error line with its origin."""
    return line.replace("] ", f"] {label}: ", 1)


def count_gpus() -> int:
    """The number of GPUs visible to torch. It is asked in a process of its own, and only if there are GPU drivers."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    result = subprocess.run(command, capture_output=True, text=True)
    return int(result.stdout) if result.returncode == 0 else 0
