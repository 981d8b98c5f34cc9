"""Read what a run left in its directory. Logs of a run in progress may end in a torn row."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from utils import UserError, printable

Row = dict[str, Any]

ERROR_PARTS = ("standard_error", "low", "high")  # last parts of the names of metrics about the error of another
RECORD_FILE = "run.json"  # see engine/run/run_record.py
EXAMPLES = "counters/examples"
WARNING_PARTS = ("warning", "found", "meaning", "help")


@dataclass(frozen=True)
class RunLog:
    """The logs of a run.

    Args:
        directory: of the run.
        settings: values by dotted key.
        record: command and counts of the data; empty for a run of an older version.
        rows: of metrics.jsonl.
        samples, histograms, warnings: of these logs.
    """

    directory: Path
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    rows: list[Row]
    samples: list[Row]
    histograms: list[Row]
    warnings: list[Row]

    @property
    def name(self) -> str:
        return printable(self.directory.name)

    @cached_property
    def evaluations(self) -> list[Row]:
        """Rows of evaluations."""
        return [row for row in self.rows if "learning_rate" not in row]

    @property
    def num_examples(self) -> int:
        """Trained on so far."""
        return int(self.rows[-1][EXAMPLES]) if self.rows else 0

    def series(self, metric: str) -> list[tuple[float, float]]:
        """Examples and values of a metric, in the order of the log."""
        # Six digits: smaller changes are noise of floats, and would fill a chart of a constant.
        return [(row[EXAMPLES], float(f"{row[metric]:.6g}")) for row in self.rows if is_number(row.get(metric))]

    def errors(self, metric: str) -> list[tuple[float, float, float]]:
        """Examples, and the metric's interval, or it less and plus its standard error, where it has one."""
        name, low, high = (f"{metric}/{part}" for part in ERROR_PARTS)
        found = []
        for row in self.evaluations:
            if is_number(row.get(low)) and is_number(row.get(high)):
                found.append((row[EXAMPLES], row[low], row[high]))
            elif is_number(row.get(metric)) and is_number(row.get(name)):
                found.append((row[EXAMPLES], row[metric] - row[name], row[metric] + row[name]))
        return found


def read_run_log(directory: Path) -> RunLog:
    """Read the logs of a run.

    Raises:
        UserError: CONFIG, if the directory is not a run's.
    """
    config = directory / "config.yaml"
    if not config.is_file():
        problem = f"{directory} is not a run: it has no config.yaml"
        raise UserError("CONFIG", problem, "give the directory that train.py printed as run_dir")
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError("CONFIG", f"{directory}: its settings cannot be read ({error})", "give another run") from error
    logs = {name: [*_rows(directory / f"{name}.jsonl")] for name in ("metrics", "samples", "histograms", "warnings")}
    return RunLog(
        directory=directory.resolve(),
        settings=dict(_leaves(settings)) if isinstance(settings, dict) else {},
        record=_record(directory / RECORD_FILE),
        rows=[row for row in logs["metrics"] if is_number(row.get(EXAMPLES))],
        samples=[row for row in logs["samples"] if is_number(row.get("examples"))],
        histograms=[row for row in logs["histograms"] if is_number(row.get(EXAMPLES)) and histograms_of(row)],
        warnings=[row for row in logs["warnings"] if {*WARNING_PARTS} <= row.keys() and is_number(row.get(EXAMPLES))],
    )


def histograms_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The histograms of a row, by role."""
    return {
        name.rpartition("/")[2]: values
        for name, values in row.items()
        if isinstance(values, dict) and {"low", "high", "counts"} <= values.keys() and values["counts"]
    }


def is_number(value: Any) -> bool:
    """Whether a value of a log can be drawn. JSON has no NaN, but Python reads it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def _record(path: Path) -> dict[str, Any]:
    """What run.json holds; nothing if it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    types = {"command": str, "data": dict}
    return {key: record[key] for key, kind in types.items() if isinstance(record.get(key), kind)}


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rows(path: Path) -> Iterator[Row]:
    """The intact rows of a log."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # torn or damaged
                continue
            if isinstance(row, dict):
                yield row
