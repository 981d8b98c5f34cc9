"""The jobs of a sweep, and what each leaves for the table at its end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.placement.worker import STOPPED
from engine.settings.schema import Settings
from utils import EXIT_STATUS, write_atomically


@dataclass
class Job:
    """One run of a sweep.

    Args:
        overrides: its part of the command line.
        settings: with names; None for a wrong config, or a plan.
        status: the exit status; None before the end.
        run_dir: of its run; None without one.
    """

    number: int
    overrides: Sequence[str] = field(default=())
    settings: Settings | None = None
    status: int | None = None
    run_dir: Path | None = None

    @property
    def label(self) -> str:
        return f"job {self.number}"

    @property
    def outcome(self) -> str:
        """How it ended, in few words."""
        if self.status is None:
            return "not run"
        return {0: "done"}.get(self.status, "stopped" if self.status in STOPPED else f"failed ({self.status})")


def first_failure(jobs: Sequence[Job]) -> int:
    """The exit status of a sweep: that of its first failed job, or 0."""
    return next((job.status for job in jobs if job.status), 0)


# ---- Jobs in other processes and machines ----


def write_result(job: Job, directory: Path) -> None:
    """Leave the result of a job in the directory of its sweep."""
    result = {"status": job.status, "run_dir": None if job.run_dir is None else str(job.run_dir.absolute())}
    write_atomically(_result_file(directory, job.number), json.dumps(result).encode())


def read_result(number: int, overrides: Sequence[str], directory: Path) -> Job:
    """A job that ran elsewhere. One without a result has failed."""
    job = Job(number, overrides, status=EXIT_STATUS["DISTRIBUTED"])
    try:
        result: Any = json.loads(_result_file(directory, number).read_text(encoding="utf-8"))
        status, run_dir = result["status"], result["run_dir"]
    except (OSError, ValueError, KeyError, TypeError):  # the process or its machine has died
        return job
    if isinstance(status, int):
        job.status = status
    job.run_dir = Path(run_dir) if isinstance(run_dir, str) else None
    return job


def _result_file(directory: Path, number: int) -> Path:
    return directory / "jobs" / f"{number}.json"
