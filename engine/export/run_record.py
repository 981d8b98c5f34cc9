"""How a saved model was trained, from its checkpoint and run directory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.chat_templates import JINJA
from engine.models.archives import STATE_FILE
from engine.models.records import MetricsRow, ModelState, RunConfig, parse_record, read_record
from utils import UserError


@dataclass
class RunRecord:
    """The training of a checkpoint; empty for other directories.

    Args:
        config: the run's config.yaml.
        num_examples: trained on before this checkpoint.
        metrics: of the last evaluation before this checkpoint.
        chat_template: of the training data: hh, llama2, chatml, the path of a Jinja file; None for the tokenizer's own.
        jinja: the text of that Jinja file, as the run recorded it.
        reward_mean, reward_std: of a reward model, on held-out responses; None if the checkpoint was not evaluated.
    """

    config: dict[str, Any] = field(default_factory=dict)
    num_examples: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    jinja: str | None = None
    reward_mean: float | None = None
    reward_std: float | None = None

    def template_text(self) -> str | None:
        """The recorded chat template as Jinja text; None for the tokenizer's own.

        The path in the config is never opened. Its file may be another by now, and a config may name any file.

        Raises:
            UserError: CONFIG if the run did not record the text of its Jinja file.
        """
        if self.chat_template is None or self.chat_template in JINJA:
            return JINJA.get(self.chat_template or "")
        if self.jinja is None:
            problem = f"chat_template: the run did not record the text of {self.chat_template}"
            raise UserError("CONFIG", problem, "give chat_template=FILE, hh, llama2 or chatml")
        return self.jinja


def read_run(directory: Path, chat_form: Callable[[Sequence[str]], str | None]) -> RunRecord:
    """Read the record of a checkpoint directory.

    Args:
        chat_form: names of data sets -> their common chat template, or None. It decides where the config names no
            template.

    Raises:
        UserError: CHECKPOINT if a file of the run cannot be read.
    """
    record = RunRecord()
    run_dir, fix = directory.parent, "give another checkpoint"
    if not (directory / STATE_FILE).is_file():
        return record
    subject = f"the run of {directory}"
    state = read_record(ModelState, directory / STATE_FILE, subject, fix)
    record.num_examples, record.jinja = state["counters"]["examples"], state.get("chat_template")
    record.reward_mean, record.reward_std = state.get("reward_mean"), state.get("reward_std")
    if (run_dir / "config.yaml").is_file():
        record.config = read_record(RunConfig, run_dir / "config.yaml", subject, "restore it, or remove it")
        if not isinstance(record.config.get("datasets"), list):
            record.config.pop("datasets", None)
        template = record.config.get("chat_template")
        record.chat_template = chat_form(record.config.get("datasets", [])) if template is None else template
    if (run_dir / "metrics.jsonl").is_file():
        record.metrics = _last_evaluation(run_dir / "metrics.jsonl", state["counters"]["examples"])
    return record


def _last_evaluation(path: Path, num_examples: int) -> dict[str, float]:
    """The metrics of the last evaluation within num_examples. A row that a kill cut short is skipped."""
    metrics: dict[str, float] = {}
    try:
        *rows, _ = path.read_bytes().split(b"\n")  # what follows the last newline is cut short, or empty
    except OSError as error:
        raise UserError(
            "CHECKPOINT", f"{path} cannot be read ({error.strerror})", "restore it, or remove it"
        ) from error
    for number, text in enumerate(rows, start=1):
        try:
            row = parse_record(MetricsRow, text)
        except ValueError as error:
            problem = f"{path}: line {number} cannot be read ({error})"
            raise UserError("CHECKPOINT", problem, "remove that line") from error
        if "loss/eval" in row and row["counters/examples"] <= num_examples:
            metrics = row
    return metrics
