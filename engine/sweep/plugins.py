"""A sweep whose jobs run in processes of a plugin of Hydra: its directory, and the results of its jobs."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.placement.launcher import PROGRAM
from engine.sweep.jobs import Job
from utils import EXIT_STATUS, UserError, write_atomically

RESULTS = "jobs"  # a directory in that of the sweep
RECORD = "multirun.yaml"  # Hydra's record of a sweep


def prepare_directory(directory: Path) -> None:
    """Make the directory of a sweep, and let its jobs import this program from anywhere.

    The plugin and Hydra write the command and the settings there: it is for this user alone.

    Raises:
        UserError: STORAGE.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / RECORD).exists():
            raise UserError("STORAGE", f"sweep.dir: {directory} holds other files", "set a new or empty directory")
        directory.chmod(0o700)
        shutil.rmtree(directory / RESULTS, ignore_errors=True)  # of an earlier sweep
    except OSError as error:
        raise UserError("STORAGE", f"sweep.dir: {directory} cannot be made ({error})", "set another") from error
    places = [str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))


def output_place(plugin: str, directory: Path) -> str:
    """Where the output of the jobs goes."""
    return "this terminal" if plugin == "joblib" else str(directory / ".submitit")


def have_begun(directory: Path) -> bool:
    """Whether any job has left a result."""
    return (directory / RESULTS).is_dir()


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
    return directory / RESULTS / f"{number}.json"
