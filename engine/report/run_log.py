"""Read what a run left in its directory. Logs of a run in progress may end in a torn row."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from utils import UserError

Row = dict[str, Any]

RECORD_FILE = "run.json"  # see engine/run/run_record.py
EXAMPLES = "counters/examples"


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
        return self.directory.name

    @cached_property
    def steps(self) -> list[Row]:
        """Rows of training steps."""
        return [row for row in self.rows if "learning_rate" in row]

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
        return [
            (row[EXAMPLES], float(f"{row[metric]:.6g}"))
            for row in self.rows
            if isinstance(row.get(metric), int | float)
        ]

    def errors(self, metric: str) -> list[tuple[float, float, float]]:
        """Examples, and the metric less and plus its standard error, where it has one."""
        name = f"{metric}/standard_error"
        return [
            (row[EXAMPLES], row[metric] - row[name], row[metric] + row[name])
            for row in self.evaluations
            if metric in row and name in row
        ]

    def last(self, metric: str) -> float | None:
        """The last value of a metric."""
        return next((row[metric] for row in reversed(self.rows) if isinstance(row.get(metric), int | float)), None)


def read_run_log(directory: Path) -> RunLog:
    """Read the logs of a run.

    Raises:
        UserError: CONFIG, if the directory is not a run's.
    """
    config = directory / "config.yaml"
    if not config.is_file():
        problem = f"{directory} is not a run: it has no config.yaml"
        raise UserError("CONFIG", problem, "give the directory that train.py printed as run_dir")
    record = directory / RECORD_FILE
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        facts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError("CONFIG", f"{directory}: its settings cannot be read ({error})", "give another run") from error
    return RunLog(
        directory=directory.resolve(),
        settings=dict(_leaves(settings)) if isinstance(settings, dict) else {},
        record=facts,
        rows=[row for row in _rows(directory / "metrics.jsonl") if EXAMPLES in row],
        samples=[row for row in _rows(directory / "samples.jsonl") if "examples" in row],
        histograms=[*_rows(directory / "histograms.jsonl")],
        warnings=[*_rows(directory / "warnings.jsonl")],
    )


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
            except ValueError:  # torn
                continue
            if isinstance(row, dict):
                yield row
