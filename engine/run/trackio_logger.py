"""A logger for Trackio."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

from engine.run.background_logger import Metrics
from engine.settings.schema import Settings
from engine.settings.secrets import public


class Trackio:
    """A Trackio run on this machine, in Trackio's own folder."""

    def __init__(self, settings: Settings, run_dir: Path):
        import trackio

        id_file = run_dir / "trackio-id"  # a run resumed in place continues its Trackio run
        if settings.resume is None or not id_file.exists():
            id_file.write_text(token_hex(16))
        self._table = trackio.Table
        self._evaluated: list[list[Any]] = []
        # Not trackio.init: that finds a run by its name, and two runs may share one.
        self._run = trackio.Run(
            url=None,
            client=None,
            project=settings.trackio.project,
            name=settings.exp_name,
            run_id=id_file.read_text(),
            config=public(settings.source),
        )

    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, is_evaluation: bool) -> None:
        columns, data = list(rows[0]), [list(row.values()) for row in rows]
        if not is_evaluation:  # other prompts each time, so a table each time
            self._run.log({"training_samples": self._table(columns=columns, data=data)}, step=step)
            return
        # A logged table cannot grow, so each evaluation logs all rows again under the same name.
        self._evaluated += data
        self._run.log({"samples": self._table(columns=columns, data=self._evaluated)}, step=step)

    def close(self, is_done: bool) -> None:
        self._run.finish()
