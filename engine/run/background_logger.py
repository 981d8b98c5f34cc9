"""A logger in a thread of its own, so it can neither delay nor fail a run."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

Metrics = Mapping[str, float]
WriteLine = Callable[[str], None]

MAX_QUEUED = 1000  # calls waiting for a logger; further ones are dropped
CLOSE_SECONDS = 10.0  # the time to finish at the end of a run


class Logger(Protocol):
    """Takes the metrics and samples of a run."""

    def log(self, metrics: Metrics, step: int) -> None: ...
    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, is_evaluation: bool) -> None: ...
    def close(self, is_done: bool) -> None: ...


class BackgroundLogger:
    """Runs a logger in the background. Its calls never block, and its errors end only the logger.

    The thread starts with the first call. The imports of a logger would slow down the start of the run.

    Args:
        name: shown in messages.
        build: makes the logger; gets a function for lines to the user.
        write: prints a line.
    """

    def __init__(self, name: str, build: Callable[[WriteLine], Logger], write: WriteLine):
        self._name = name
        self._write = write
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(MAX_QUEUED)  # None: close
        self._num_dropped = 0
        self._is_done = False
        self._is_abandoned = False
        self._lock = threading.Lock()  # of _is_abandoned
        # A daemon: the process ends without waiting for it.
        self._thread = threading.Thread(target=self._run, args=(build,), name=f"logger {name}", daemon=True)
        self._is_started = False

    def _run(self, build: Callable[[WriteLine], Logger]) -> None:
        try:
            logger = build(self._write_unless_abandoned)
            while (call := self._calls.get()) is not None:
                call(logger)
            logger.close(self._is_done)
        except BaseException as error:  # whatever a logger raises, the run continues
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._write_unless_abandoned(f"{self._name}: logging stopped, the run continues ({reason})")

    def _write_unless_abandoned(self, line: str) -> None:
        with self._lock:
            if not self._is_abandoned:
                self._write(line)

    def _call(self, call: Callable[[Logger], None]) -> None:
        if not self._is_started:
            self._is_started = True
            self._thread.start()
        if not self._thread.is_alive():  # it has failed, with a message
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._num_dropped:
                self._write(f"{self._name}: too slow; entries beyond its queue are dropped, the run continues")
            self._num_dropped += 1

    def log(self, metrics: Metrics, step: int) -> None:
        self._call(lambda logger: logger.log(metrics, step))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, is_evaluation: bool) -> None:
        self._call(lambda logger: logger.log_samples(rows, step, is_evaluation))

    def close(self, is_done: bool) -> None:
        """Let the logger finish; abandon it after CLOSE_SECONDS."""
        self._is_done = is_done
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Full):
                self._calls.put(None, timeout=0.1)
                self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._is_abandoned = True
        if self._thread.is_alive():
            self._write(f"{self._name}: not finished in {CLOSE_SECONDS:g} s, abandoned; metrics.jsonl is complete")
        if self._num_dropped:
            self._write(f"{self._name}: {self._num_dropped:,} entries were dropped; metrics.jsonl has them")
