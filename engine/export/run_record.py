"""How a saved model was trained, from its checkpoint and run directory."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.models.archives import STATE_FILE
from utils import UserError


@dataclass
class RunRecord:
    """The training of a checkpoint; empty for other directories.

    Args:
        config: the run's config.yaml.
        num_examples: trained on before this checkpoint.
        metrics: of the last evaluation before this checkpoint.
        chat_template: of the training data: hh, llama2, chatml, a Jinja file, or None for the tokenizer's own.
    """

    config: dict[str, Any] = field(default_factory=dict)
    num_examples: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    chat_template: str | None = None


def read_run(directory: Path, chat_form: Callable[[Sequence[str]], str | None]) -> RunRecord:
    """Read the record of a checkpoint directory.

    Args:
        chat_form: names of data sets -> their common chat template, or None. It decides where the config names no
            template.

    Raises:
        UserError: CHECKPOINT if a file of the run cannot be read.
    """
    record = RunRecord()
    run_dir = directory.parent
    try:
        if not (directory / STATE_FILE).is_file():
            return record
        record.num_examples = json.loads((directory / STATE_FILE).read_text())["counters"]["examples"]
        if (run_dir / "config.yaml").is_file():
            record.config = yaml.safe_load((run_dir / "config.yaml").read_text())
            template = record.config.get("chat_template")
            record.chat_template = chat_form(record.config.get("datasets") or []) if template is None else template
        if (run_dir / "metrics.jsonl").is_file():
            for line in (run_dir / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                if "loss/eval" in row and row["counters/examples"] <= record.num_examples:
                    record.metrics = row
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        problem = f"the run of {directory} cannot be read ({type(error).__name__}: {error})"
        raise UserError("CHECKPOINT", problem, "give another checkpoint") from error
    return record
