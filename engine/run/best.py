"""The best checkpoint of a run, by keep_best."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.data.examples import Example, fingerprint
from engine.run.resume_check import settings_of
from engine.run.run_files import update_link
from engine.settings.choices import BestMetric, is_better
from engine.settings.schema import Settings
from utils import UserError

SAMPLING = ("n_eval_model_samples", "max_length", "max_prompt_length")


def settings_of_metric(settings: Settings) -> dict[str, Any]:
    """The settings that keep_best's metric is measured with, by dotted key."""
    if settings.keep_best and settings.keep_best.startswith(("ground_truth", "kl")):  # of sampled responses
        return {key: getattr(settings, key) for key in SAMPLING}
    measured_with = {key: value for key, value in settings_of(settings).items() if key.startswith("loss.")}
    if {"kl", "whole batch"} & settings.loss.needs:  # the loss of an example depends on those beside it
        measured_with["eval_batch_size"] = settings.eval_batch_size
    return measured_with


class BestCheckpoint:
    """Keeps track of the saved checkpoint with the best evaluation.

    Args:
        measured_with: settings_of_metric().

    Attributes:
        record: metric, value, checkpoint, a hash of the evaluated examples, and measured_with; empty without one.
    """

    def __init__(self, metric: BestMetric | None, examples: Iterable[Example], measured_with: Mapping[str, Any]):
        self._metric = metric
        self._evaluated = fingerprint(examples) if metric else None
        self._measured_with = dict(measured_with)
        self.record: dict[str, Any] = {}

    def resume(
        self, record: dict[str, Any], run_settings: Mapping[str, Any], run_dir: Path, is_first_rank: bool
    ) -> None:
        """Continue from the record of a checkpoint, if it is comparable.

        It needs the same metric, the same examples and settings of the metric, and its checkpoint.

        Args:
            run_settings: of the run that saved the checkpoint, by dotted key. Old records have none of their own.
        """
        if record.get("metric") != self._metric or not (run_dir / record.get("checkpoint", "")).is_dir():
            return
        if record and record.get("evaluated", self._evaluated) != self._evaluated:  # old records have no hash
            print("keep_best: the comparison starts anew, as the evaluation has other examples than before the resume")
            return
        before = record.get("measured_with", run_settings)
        changes = [
            f"{key} was {before[key]} and is {value}"
            for key, value in self._measured_with.items()
            if key in before and before[key] != value
        ]
        if record and changes:
            print(f"keep_best: the comparison starts anew, as {', '.join(changes)}")
            return
        self.record = record
        if record and is_first_rank:  # a killed run may have saved the checkpoint but not the link
            update_link(run_dir / record["checkpoint"], "BEST")

    def update(self, metrics: Mapping[str, float], checkpoint: str) -> bool:
        """Record checkpoint if its evaluation beats all earlier ones; returns whether it does."""
        if self._metric is None:
            return False
        if self._metric not in metrics:
            found = ", ".join(sorted(metrics))
            raise UserError("CONFIG", f"keep_best: the evaluation has no {self._metric}", f"choose one of {found}")
        value = metrics[self._metric]
        if self.record and not is_better(self._metric, value, self.record["value"]):
            return False
        self.record = {
            "metric": self._metric,
            "value": value,
            "checkpoint": checkpoint,
            "evaluated": self._evaluated,
            "measured_with": self._measured_with,
        }
        return True
