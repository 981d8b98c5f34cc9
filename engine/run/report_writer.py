"""Write the report of a running run, in a child process that reads its logs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.run.run_warnings import METRICS_FILE
from engine.settings.schema import Settings
from utils import StopRequest

COMMAND = Path(__file__).parent.parent.parent / "report.py"
MIN_INTERVAL = 60.0  # seconds between reports
MAX_SHARE = 0.02  # of a run's time, for reports before the last
LAST_SECONDS, STOPPED_SECONDS = 60.0, 10.0  # the time for the last one: of a complete run, of a stopped one


class ReportWriter:
    """Starts report.py after evaluations and at the end. Its failure ends the reports, not the run.

    Args:
        write: prints a line.
        clock: seconds.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._write, self._clock = write, clock
        self._log = run_dir / METRICS_FILE
        has_pictures = str(settings.report == "png").lower()
        self._command = [sys.executable, str(COMMAND), str(run_dir.absolute()), f"png={has_pictures}"]
        self._child: subprocess.Popen[str] | None = None
        self._started, self._next = 0.0, -float("inf")  # times
        self._has_failed = False

    def evaluated(self) -> None:
        """Start a report, unless one is running or was made just now."""
        if self._child is not None and self._child.poll() is not None:
            self._finish(LAST_SECONDS)
        if self._child is None and self._clock() >= self._next:
            self._start()

    def close(self, is_done: bool) -> None:
        """Write the last report, and wait for it. A signal ends the wait and the report.

        Args:
            is_done: the run is complete; a stopped one waits less.
        """
        if not self._log.exists():  # the run failed before its first step
            return
        seconds = LAST_SECONDS if is_done else STOPPED_SECONDS
        deadline = self._clock() + seconds
        with StopRequest(first=self._abandon, second=self._abandon):
            self._finish(seconds)
            self._start()
            self._finish(deadline - self._clock())

    def _abandon(self, number: int) -> None:
        self._has_failed = True
        if self._child is not None:
            self._kill(self._child)

    def _start(self) -> None:
        if self._has_failed:
            return
        self._started = self._clock()
        try:
            # A session of its own: Ctrl-C stops the run, and the last report comes after it.
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            self._fail(str(error))

    def _finish(self, seconds: float) -> None:
        """Wait for a running report."""
        child = self._child
        if child is None:
            return
        try:
            _, errors = child.communicate(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            self._kill(child)
            child.communicate()
            self._fail(f"not finished in {seconds:.0f} s")
            return
        finally:
            self._child = None
        now = self._clock()
        self._next = max(self._started + MIN_INTERVAL, now + (now - self._started) / MAX_SHARE)
        if child.returncode and not self._has_failed:
            self._fail((errors.strip().splitlines() or [f"status {child.returncode}"])[-1])

    def _kill(self, child: "subprocess.Popen[str]") -> None:
        """End a report, and the process that draws for it."""
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def _fail(self, reason: str) -> None:
        self._has_failed = True
        self._write(f"report: not written, the run continues ({reason})")
