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
        self._text = ""

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        if not self._text:
            self._text = "|" + "|".join(rows[0]) + "|\n" + "|---" * len(rows[0]) + "|\n"
        for row in rows:
            self._text += "|" + "|".join(as_markdown(str(value)) for value in row.values()) + "|\n"
        self._writer.add_text("samples", self._text, step)

    def close(self, is_done: bool) -> None:
        self._writer.close()


def as_markdown(text: str) -> str:
    """Escape text for a cell of a Markdown table: it contains no markup, HTML or links."""
    return "<br>".join(re.sub(r"[!-/:-@[-`{-~]", lambda mark: f"&#{ord(mark[0])};", line) for line in text.splitlines())
