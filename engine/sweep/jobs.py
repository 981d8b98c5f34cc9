"""The jobs of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.placement.worker import STOPPED
from engine.settings.schema import Settings


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
