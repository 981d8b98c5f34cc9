"""A logger for TensorBoard."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.run.background_logger import Metrics


class TensorBoard:
    """TensorBoard files in run_dir/tensorboard."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir / "tensorboard")
        self._evaluated: list[Mapping[str, Any]] = []

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, is_evaluation: bool) -> None:
        if not is_evaluation:  # other prompts each time, so a table each time
            self._writer.add_text("training_samples", as_table(rows), step)
            return
        self._evaluated += rows
        self._writer.add_text("samples", as_table(self._evaluated), step)

    def close(self, is_done: bool) -> None:
        self._writer.close()


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, with the columns of the first."""
    lines = ["|".join(rows[0]), "|".join("---" for _ in rows[0])]
    lines += ["|".join(as_markdown(str(value)) for value in row.values()) for row in rows]
    return "".join(f"|{line}|\n" for line in lines)


def as_markdown(text: str) -> str:
    """Escape text for a cell of a Markdown table: it contains no markup, HTML or links."""
    return "<br>".join(re.sub(r"[!-/:-@[-`{-~]", lambda mark: f"&#{ord(mark[0])};", line) for line in text.splitlines())
