"""A worker as its launcher sees it: the process, its report, and the end of its stderr."""

import codecs
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from engine.placement.worker_link import Failure
from process_start import LINK_VARIABLE, holding_signals
from utils import EXIT_STATUS

KEPT_STDERR = 2**16  # bytes
STOPPED = [128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]  # a stopped run is saved


class Worker:
    """Starts and watches the process of one rank.

    Args:
        num: the number of workers.
        text: written to the worker's standard input.
        rendezvous: a listening socket for rank 0.
        environment: variables over those of this process.
        prefix: before each line of rank 0's output. Empty: a terminal gets the output directly.

    Attributes:
        reported: the report of the worker's error, as bytes.
        stderr: the last bytes of stderr of ranks other than 0.
        ended: when the process ended.
        hang_reason: set for a worker killed because it was hanging.
    """

    def __init__(
        self,
        rank: int,
        num: int,
        command: Sequence[str | Path],
        text: bytes,
        rendezvous: socket.socket,
        environment: Mapping[str, str],
        prefix: str = "",
    ):
        self.rank, self._prefix = rank, prefix
        self.reported = b""
        self.stderr = b""
        self.ended = math.inf
        self.hang_reason: str | None = None
        self.was_killed = False
        self._report, report_end = os.pipe()
        rendezvous_fd = rendezvous.fileno() if rank == 0 else None
        link = {"launcher_pid": os.getpid(), "report_fd": report_end, "rendezvous_fd": rendezvous_fd}
        environment = {
            "OMP_NUM_THREADS": str(max(1, num_cores() // num)),  # by default, each worker would use all cores
            **os.environ,
            **environment,
            "RANK": str(rank),
            "WORLD_SIZE": str(num),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(num),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(rendezvous.getsockname()[1]),
            LINK_VARIABLE: json.dumps(link),
        }
        try:
            with holding_signals():  # until the worker can handle them: Python would print a traceback
                self.process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=self._output_for(sys.stdout) if rank == 0 else subprocess.DEVNULL,
                    stderr=self._output_for(sys.stderr) if rank == 0 else subprocess.PIPE,
                    pass_fds=[end for end in (report_end, rendezvous_fd) if end is not None],
                    start_new_session=True,  # signals come from the launcher, not from the terminal
                )
        finally:
            os.close(report_end)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin:
            self.process.stdin.write(text)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Read the worker's output through selector."""
        selector.register(self._report, selectors.EVENT_READ, self._keep_report)
        if self.process.stdout:
            writer = decoded_writer(sys.stdout, self._prefix)
            selector.register(self.process.stdout.fileno(), selectors.EVENT_READ, writer)
        if self.process.stderr:
            keep = decoded_writer(sys.stderr, self._prefix) if self.rank == 0 else self._keep_stderr
            selector.register(self.process.stderr.fileno(), selectors.EVENT_READ, keep)

    def _output_for(self, stream: TextIO) -> int:
        return subprocess.PIPE if self._prefix else output_for(stream)

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
        """Whether a signal ended it, and not one from this launcher."""
        return (self.process.returncode or 0) < 0 and not self.was_killed

    def kill_hanging(self) -> None:
        """Kill a worker still running long after another one has failed."""
        if not self.reported:
            self.hang_reason = "is stopped" if self.is_stopped() else "does not respond"
        self.kill()

    def kill(self) -> None:
        """Kill the worker and its child processes."""
        self.was_killed |= self.process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self, selector: selectors.BaseSelector) -> None:
        self.kill()
        self.process.wait()
        streams = [stream for stream in (self.process.stdout, self.process.stderr) if stream]
        for descriptor in (self._report, *(stream.fileno() for stream in streams)):
            with suppress(KeyError):  # read to its end
                selector.unregister(descriptor)
        os.close(self._report)
        for stream in streams:
            stream.close()

    def failure(self) -> Failure | None:
        """The error that ended the worker, or soon will; None without one, or if this launcher killed it."""
        with suppress(ValueError):  # an incomplete report
            return Failure(**json.loads(self.reported))
        status = self.process.returncode or 0
        if self.died():
            name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
            fix = "the system's log may say why (often out of memory); then continue with resume="
            line = f"error[DISTRIBUTED] rank {self.rank} was killed by {name}; fix: {fix}"
            return Failure(line, EXIT_STATUS["DISTRIBUTED"], False, self.ended)
        if status > 0 and status not in STOPPED:
            line = f"error[INTERNAL] rank {self.rank} ended with status {status} and no report; fix: see its messages"
            return Failure(line, 1, False, self.ended)
        return None


def output_for(stream: TextIO) -> int:
    """The descriptor of stream, so a worker writes to the terminal directly; a pipe if stream has none."""
    try:
        return stream.fileno()
    except (OSError, ValueError):  # captured, as in tests and notebooks
        return subprocess.PIPE


def decoded_writer(stream: TextIO, prefix: str = "") -> Callable[[bytes], Any]:
    """A function that writes bytes to stream as text; with a prefix, whole lines only."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""

    def write_lines(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + decoder.decode(data)).split("\n")
        stream.write("".join(f"{prefix}{line}\n" for line in lines))

    return write_lines if prefix else lambda data: stream.write(decoder.decode(data))


def num_cores() -> int:
    """The number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def process_state(pid: int) -> str:
    """R, S, D, T, Z, ... as in proc(5); empty if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
