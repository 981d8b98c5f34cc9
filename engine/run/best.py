"""The best checkpoint of a run, by keep_best."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.data.examples import Example, fingerprint
from engine.run.run_files import update_link
from engine.settings.choices import BestMetric, is_better
from utils import UserError


class BestCheckpoint:
    """Keeps track of the saved checkpoint with the best evaluation.

    Attributes:
        record: metric, value, checkpoint and a hash of the evaluated examples; empty without one.
    """

    def __init__(self, metric: BestMetric | None, examples: Iterable[Example]):
        self._metric = metric
        self._evaluated = fingerprint(examples) if metric else None
        self.record: dict[str, Any] = {}

    def resume(self, record: dict[str, Any], run_dir: Path, is_first_rank: bool) -> None:
        """Continue from the record of a checkpoint, if it is comparable.

        It needs the same metric, the same examples, and its checkpoint.
        """
        if record.get("metric") != self._metric or not (run_dir / record.get("checkpoint", "")).is_dir():
            return
        if record and record.get("evaluated", self._evaluated) != self._evaluated:  # old records have no hash
            print("keep_best: the comparison starts anew, as the evaluation has other examples than before the resume")
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
        self.record = {"metric": self._metric, "value": value, "checkpoint": checkpoint, "evaluated": self._evaluated}
        return True
