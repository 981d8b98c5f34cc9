"""Start workers on this machine, supervise them, and report the first error."""

import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
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
    workers: list[Worker] = []
    sys.stdout.flush()

    def forward(number: int) -> None:
        for worker in workers:
            worker.process.send_signal(number)

    def kill(number: int) -> None:
        for worker in workers:
            worker.kill()

    with StopRequest(forward, kill) as stop, selectors.DefaultSelector() as selector:
        try:
            # Rank 0 inherits the socket. Another process could take a free port passed by number only.
            with socket.create_server(("127.0.0.1", 0), backlog=num) as rendezvous:
                for rank in range(num):
                    worker = Worker(rank, num, command, text.encode(), rendezvous)
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
    return print_failure(workers)


def supervise(workers: Sequence[Worker], selector: selectors.BaseSelector) -> None:
    """Wait until all workers have ended. After a failure, kill those still running."""
    failed_at = math.inf
    while True:
        read_output(selector, 0.1)
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
                    worker.kill_hanging()
    while read_output(selector, 0):  # the last lines
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


def print_failure(workers: Sequence[Worker]) -> int:
    """Print the error of the first rank that failed by itself, on one line; returns the exit status."""
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
    print(line, file=sys.stderr)
    return failure.status


def add_rank(rank: int, line: str) -> str:
    """An error line with the rank of its origin."""
    return line.replace("] ", f"] rank {rank}: ", 1)


def count_gpus() -> int:
    """The number of GPUs visible to torch. It is asked in a process of its own, and only if there are GPU drivers."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    result = subprocess.run(command, capture_output=True, text=True)
    return int(result.stdout) if result.returncode == 0 else 0
