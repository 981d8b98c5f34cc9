"""Log a run: metrics.jsonl, samples.jsonl, the terminal, wandb and TensorBoard."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.run.background_logger import BackgroundLogger, Logger, Metrics
from engine.run.tensorboard_logger import TensorBoard
from engine.run.wandb_logger import Wandb
from engine.settings.schema import Settings
from engine.settings.secrets import redact
from utils import UserError, printable


class NoLoggers:
    """The loggers of all ranks but 0."""

    def train(self, metrics: dict[str, float]) -> None: ...
    def eval(self, metrics: dict[str, float]) -> None: ...
    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def print(self, text: str) -> None: ...
    def close(self, is_done: bool = True) -> None: ...


class Loggers:
    """All loggers of a run, and its progress on the terminal."""

    def __init__(self, settings: Settings, run_dir: Path, num_examples: int, first_example: int = 0):
        self._run_dir = run_dir
        self._interval = settings.minimum_log_interval_secs
        self._last = -float("inf")
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

        def write(line: str) -> None:
            self.print(redact(line, settings.source))  # errors of libraries may contain secrets

        if settings.wandb.enabled and not settings.debug:
            self._loggers.append(
                BackgroundLogger("wandb", lambda write_line: Wandb(settings, run_dir, write_line), write)
            )
        if settings.tensorboard:
            self._loggers.append(BackgroundLogger("tensorboard", lambda write_line: TensorBoard(run_dir), write))

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
        self._bar.update(examples - self._bar.n)
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        short = {"loss": "loss/train", "acc": "rewards_train/accuracies", "margin": "rewards_train/margins"}
        postfix = {name: f"{metrics[key]:.4g}" for name, key in short.items() if key in metrics}
        self._bar.set_postfix(postfix | {"tokens/s": f"{metrics['tokens_per_second']:,.0f}"})
        if self._bar.disable:
            print(f"train after {examples} examples: {format_metrics(metrics)}", flush=True)
        self._log(metrics, examples)

    def eval(self, metrics: dict[str, float]) -> None:
        """Log an evaluation."""
        examples = int(metrics["counters/examples"])
        self._write("metrics.jsonl", [metrics])
        self.print(f"eval after {examples} examples: {format_metrics(metrics)}")
        self._log(metrics, examples)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log sampled responses, and print the first.

        Args:
            rows: with the same keys each, the counter "examples" first.
        """
        self._write("samples.jsonl", rows)
        for name, value in rows[0].items():
            if isinstance(value, str):
                text = printable(value)
                self.print(f"  sample, {name}: {text if len(text) <= 160 else '... ' + text[-156:]}")
        for logger in self._loggers:
            logger.log_samples(rows, int(rows[0]["examples"]))

    def _log(self, metrics: Metrics, step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step)

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


def format_metrics(metrics: Metrics) -> str:
    """Metrics on one line, the loss first, without counters."""
    shown = {name: metrics[name] for name in sorted(metrics, key=lambda name: not name.startswith("loss/"))}
    shown = {name: value for name, value in shown.items() if not name.startswith("counters/")}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
