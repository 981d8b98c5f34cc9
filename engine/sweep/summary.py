"""The end of a sweep: a table of its jobs, and the page that compares their runs."""

import csv
import io
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from engine.report.page import number
from engine.report.run_log import Row, RunLog, is_number, read_run_log
from engine.report.writing import PAGE, write_report
from engine.settings.hydra_guard import Sweep
from engine.settings.secrets import redact
from engine.settings.sweeps import varied_values
from engine.sweep.jobs import Job, first_failure
from utils import UserError, printable, write_atomically

RESULTS = "results.csv"
# Columns of the table: those that some run has.
METRICS = (
    "loss/eval",
    "rewards_eval/accuracies",
    "rewards_eval/margins",
    "kl_eval",
    "ground_truth/policy",
    "ground_truth/win_rate",
    "rewards_eval/sampled",
)
NOT_REPORTED = "counters/"


def finish(sweep: Sweep, jobs: Sequence[Job], directory: Path) -> int:
    """Print the table of a sweep with any run, and write its page; returns its exit status.

    Args:
        directory: of the results and the page.
    """
    if not any(job.run_dir for job in jobs):
        return first_failure(jobs)
    reports = {config.get("report") for config in sweep.configs}
    try:
        summarize(jobs, sweep.varied, directory, None if reports == {None} else "png" in reports)
    except UserError as error:
        print(redact(str(error)), file=sys.stderr)
        return first_failure(jobs) or error.exit_status
    return first_failure(jobs)


def summarize(jobs: Sequence[Job], varied: Collection[str], directory: Path, pictures: bool | None) -> None:
    """Print the table of a sweep, and write results.csv and the page into its directory.

    Args:
        varied: keys that differ between jobs.
        pictures: also write PNG and SVG of the charts; None: no page.

    Raises:
        UserError: STORAGE, or the charts cannot be drawn.
    """
    logs = {job.number: read_run_log(job.run_dir) for job in jobs if job.run_dir is not None}
    values = {job.number: varied_values(job.overrides, varied) for job in jobs}
    print(f"\n{format_table(jobs, values, logs)}\n")
    try:
        write_atomically(directory / RESULTS, format_results(jobs, values, logs).encode())
        print(f"results: {directory / RESULTS}")
        compared = [log.directory for log in logs.values() if log.rows]
        if pictures is not None and len(compared) > 1:
            write_report(compared, directory / PAGE, with_pictures=pictures)
            print(f"report: {directory / PAGE}", flush=True)
    except OSError as error:
        raise UserError("STORAGE", f"sweep.dir: {directory} cannot be written ({error})", "set another") from error


def format_table(jobs: Sequence[Job], values: Mapping[int, Mapping[str, str]], logs: Mapping[int, RunLog]) -> str:
    """A line for each job: what differs, how it ended, and metrics of its last evaluation.

    Args:
        values: of the keys that differ, by number of the job.
        logs: of the jobs with a run.
    """
    keys = list(dict.fromkeys(key for each in values.values() for key in each))
    last = {job.number: last_values(logs.get(job.number)) for job in jobs}
    metrics = [metric for metric in METRICS if any(metric in row for row in last.values())]
    rows = [["job", *keys, "", *metrics]]
    for job in jobs:
        row = last[job.number]
        cells = [str(job.number), *(values[job.number].get(key, "") for key in keys), job.outcome]
        rows.append([*map(printable, cells), *(with_error(row, metric) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def format_results(jobs: Sequence[Job], values: Mapping[int, Mapping[str, str]], logs: Mapping[int, RunLog]) -> str:
    """The same as CSV, with all metrics of evaluations and the run directories."""
    keys = list(dict.fromkeys(key for each in values.values() for key in each))
    last = {job.number: last_values(logs.get(job.number)) for job in jobs}
    metrics = list(dict.fromkeys(name for row in last.values() for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *keys, "status", "run_dir", *metrics])
    for job in jobs:
        row = [last[job.number].get(metric, "") for metric in metrics]
        differing = [values[job.number].get(key, "") for key in keys]
        writer.writerow([job.number, *differing, job.status, job.run_dir or "", *row])
    return text.getvalue()


def last_values(log: RunLog | None) -> Row:
    """The last value of each metric of evaluations."""
    rows = log.evaluations if log is not None else []
    return {name: row[name] for row in rows for name in row if is_number(row[name]) and NOT_REPORTED not in name}


def with_error(row: Row, metric: str) -> str:
    """A metric with its standard error."""
    if metric not in row:
        return ""
    error = row.get(f"{metric}/standard_error")
    return number(row[metric]) + (f" ± {number(error)}" if error is not None else "")
