"""Log a run: files of its directory, the terminal, the report, and wandb and the like."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.run.background_logger import BackgroundLogger, Logger, Metrics, WriteLine
from engine.run.mlflow_logger import MLflow
from engine.run.report_writer import ReportWriter
from engine.run.run_warnings import WARNINGS_FILE, RunWarnings, describe
from engine.run.tensorboard_logger import TensorBoard
from engine.run.trackio_logger import Trackio
from engine.run.wandb_logger import Wandb
from engine.settings.schema import Settings
from engine.settings.secrets import redact
from utils import UserError, duration, printable

LINE_LENGTH = 200  # of a printed line
# Parts of the names of metrics, in the order of a printed line.
TELLING = (
    "loss/", "objective/scores", "accuracies", "margins", "desirable", "kl_", "kl/", "ground_truth/", "learning_rate",
    "grad_norm", "tokens_per_second", "peak_memory", "skipped", "rewards", "logratios", "logps",
)  # fmt: skip


class NoLoggers:
    """The loggers of all ranks but 0."""

    def train(self, metrics: dict[str, float]) -> None: ...
    def eval(self, metrics: dict[str, float]) -> None: ...
    def samples(self, rows: Sequence[Mapping[str, Any]], *, is_shown: bool = True) -> None: ...
    def histograms(self, row: Mapping[str, Any]) -> None: ...
    def print(self, text: str) -> None: ...
    def close(self, is_done: bool = True) -> None: ...


class Loggers:
    """All loggers of a run, and its progress on the terminal."""

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        num_examples: int,
        num_updates: int,
        first_example: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run_dir = run_dir
        self._num_examples = num_examples
        self._clock = clock
        self._first: tuple[int, float] | None = None  # examples and seconds at the first step of this process
        self._interval = settings.minimum_log_interval_secs
        self._last = self._last_table = -float("inf")
        self._lock = threading.RLock()  # of the terminal; reentrant, as a signal handler may print too
        on_terminal = sys.stderr.isatty()
        terminal = shutil.get_terminal_size()  # tqdm shows nothing on a terminal of unknown size
        self._bar = tqdm(
            total=num_examples,
            initial=first_example,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            disable=not on_terminal,
            ncols=terminal.columns,
            nrows=terminal.lines,
        )
        self._loggers: list[Logger] = []
        self._warnings = RunWarnings(settings, num_examples, num_updates, run_dir)

        def write(line: str) -> None:
            self.print(redact(line, settings.source))  # errors of libraries may contain secrets

        def start(name: str, build: Callable[[WriteLine], Logger]) -> None:
            self._loggers.append(BackgroundLogger(name, build, write))

        if settings.wandb.enabled and not settings.debug:
            start("wandb", lambda write_line: Wandb(settings, run_dir, write_line))
        if settings.mlflow.enabled and not settings.debug:
            start("mlflow", lambda write_line: MLflow(settings, run_dir, write_line))
        if settings.trackio.enabled and not settings.debug:
            start("trackio", lambda write_line: Trackio(settings, run_dir))
        if settings.tensorboard:
            start("tensorboard", lambda write_line: TensorBoard(run_dir))
        self._report = ReportWriter(settings, run_dir, write) if settings.report and not settings.debug else None

    def print(self, text: str) -> None:
        """Print a line on stdout around the progress bar."""
        with self._lock:
            self._bar.clear()
            print(text, flush=True)
            self._bar.refresh()

    def train(self, metrics: dict[str, float]) -> None:
        """Log a training step."""
        examples = int(metrics["counters/examples"])
        self._write("metrics.jsonl", [metrics])
        self._warn(metrics)
        self._bar.update(examples - self._bar.n)
        now = self._clock()
        self._first = self._first or (examples, now)
        if now - self._last < self._interval:
            if any(name.startswith(("rollout/", "time/")) for name in metrics):  # the only row with these
                self._log(metrics, examples)
            return
        self._last = now
        short = {"loss": "loss/train", "acc": "rewards_train/accuracies", "margin": "rewards_train/margins"}
        postfix = {name: f"{metrics[key]:.4g}" for name, key in short.items() if key in metrics}
        self._bar.set_postfix(postfix | {"tokens/s": f"{metrics['tokens_per_second']:,.0f}"})
        if self._bar.disable:
            print(fit_line(f"train {self._progress(examples, now)}", metrics), flush=True)
        self._log(metrics, examples)

    def eval(self, metrics: dict[str, float]) -> None:
        """Log an evaluation."""
        examples = int(metrics["counters/examples"])
        self._write("metrics.jsonl", [metrics])
        self.print(fit_line(f"eval {self._progress(examples, self._clock())}", metrics))
        self._warn(metrics)
        self._log(metrics, examples)
        if self._report is not None:
            self._report.evaluated()

    def histograms(self, row: Mapping[str, Any]) -> None:
        """Log histograms of an evaluation, beside its counters."""
        self._write("histograms.jsonl", [row])

    def _progress(self, examples: int, now: float) -> str:
        """How far the run is, and the time left at the pace so far."""
        text = f"after {examples:,} of {self._num_examples:,} examples"
        if self._first is None or not self._first[0] < examples < self._num_examples:
            return text
        seconds = (now - self._first[1]) / (examples - self._first[0]) * (self._num_examples - examples)
        return f"{text}, {duration(seconds)} left"

    def samples(self, rows: Sequence[Mapping[str, Any]], *, is_shown: bool = True) -> None:
        """Log sampled responses, and print the first.

        Args:
            rows: with the same keys each, the counter "examples" first.
            is_shown: False for responses of training. They are not printed, and have a table of their own.
        """
        self._write("samples.jsonl", rows)
        for name, value in rows[0].items() if is_shown else ():
            if isinstance(value, str):
                text = printable(value)
                self.print(f"  sample, {name}: {text if len(text) <= 160 else '... ' + text[-156:]}")
        if not is_shown:
            now = self._clock()
            if now - self._last_table < self._interval:
                return
            self._last_table = now
        for logger in self._loggers:
            logger.log_samples(rows, int(rows[0]["examples"]), is_evaluation=is_shown)

    def _log(self, metrics: Metrics, step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step)

    def _warn(self, metrics: Metrics) -> None:
        """Write and print new warnings about a row of metrics."""
        warnings = self._warnings.see(metrics)
        if warnings:
            self._write(WARNINGS_FILE, warnings)
        for warning in warnings:
            self.print(describe(warning))

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            with open(self._run_dir / name, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            reason = error.strerror if self._run_dir.is_dir() else "the directory is gone"
            raise UserError(
                "STORAGE",
                f"{self._run_dir / name} cannot be written ({reason})",
                "make room or check the disk, then continue with resume=",
            ) from error

    def close(self, is_done: bool = True) -> None:
        """Finish all logs.

        Args:
            is_done: the run is complete.
        """
        for logger in self._loggers:
            logger.close(is_done)
        self._bar.close()
        if self._report is not None:
            self._report.close(is_done)


def fit_line(start: str, metrics: Metrics) -> str:
    """A line with as many metrics as fit, the most telling first, without counters. metrics.jsonl has all of them."""

    def rank(name: str) -> int:
        if name.endswith("standard_error"):
            return len(TELLING) + 1
        return next((i for i, part in enumerate(TELLING) if part in name), len(TELLING))

    line = f"{start}:"
    for name in sorted(metrics, key=rank):
        item = f" {name} {metrics[name]:.4g},"
        if not name.startswith("counters/") and len(line + item) <= LINE_LENGTH + 1:  # the last comma goes
            line += item
    return line[:-1]
