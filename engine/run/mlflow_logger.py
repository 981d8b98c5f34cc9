"""A logger for MLflow."""

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.run.background_logger import Metrics, WriteLine
from engine.settings.schema import Settings
from engine.settings.secrets import public

MAX_VALUE_LENGTH = 500  # of a setting, in characters; config.yaml has the longer ones in full
MAX_PARAMETERS = 100  # of a request


class MLflow:
    """An MLflow run: on the given server, or in a database in the run directory."""

    def __init__(self, settings: Settings, run_dir: Path, write: WriteLine):
        # Reports on usage go to MLflow's makers. A run connects only to the server that it is given.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # else it tells how it makes its database
        self._write = write
        self._error = MlflowException
        self._metric = Metric
        self._keeps_files = True
        uri = settings.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        folder = run_dir.resolve() / "mlflow"
        files = None if uri else (folder / "files").as_uri()  # a server has a place of its own for files
        if not uri:
            folder.mkdir(exist_ok=True)
        self._client = MlflowClient(uri or f"sqlite:///{folder / 'mlflow.db'}")
        self._run_id = self._open_run(settings, run_dir / "mlflow-id", files)
        values = public(settings.source)
        known = self._client.get_run(self._run_id).data.params  # MLflow refuses other values for them
        parameters = [Param(key, text[:MAX_VALUE_LENGTH]) for key, text in flatten(values).items() if key not in known]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self._client.log_batch(self._run_id, params=parameters[start : start + MAX_PARAMETERS])
        self._keep_file(lambda: self._client.log_dict(self._run_id, values, "config.yaml"))

    def _open_run(self, settings: Settings, id_file: Path, files: str | None) -> str:
        """The id of the run in MLflow. A run resumed in place continues its own."""
        if settings.resume is not None and id_file.exists():
            with suppress(self._error):  # it is on another server
                run_id = id_file.read_text()
                self._client.update_run(run_id, status="RUNNING")
                return run_id
        name = settings.mlflow.experiment
        try:  # first, so that two runs of a sweep may do it at once
            experiment = self._client.create_experiment(name, artifact_location=files)
        except self._error:
            found = self._client.get_experiment_by_name(name)
            if found is None:  # it could not be made
                raise
            experiment = found.experiment_id
        run_id = self._client.create_run(experiment, run_name=settings.exp_name).info.run_id
        id_file.write_text(run_id)
        return run_id

    def log(self, metrics: Metrics, step: int) -> None:
        now = int(time.time() * 1000)  # ms
        entries = [self._metric(re.sub(r"[^/\w.\- :]", "_", name), metrics[name], now, step) for name in metrics]
        self._client.log_batch(self._run_id, metrics=entries)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, is_evaluation: bool) -> None:
        folder = "samples" if is_evaluation else "training_samples"
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}  # as MLflow's own tables
        self._keep_file(lambda: self._client.log_dict(self._run_id, table, f"{folder}/{step:09}.json"))

    def _keep_file(self, send: Callable[[], None]) -> None:
        """Store a file. Without a place for files, the metrics continue."""
        if not self._keeps_files:
            return
        try:
            send()
        except Exception as error:  # of the libraries of the server's storage
            self._keeps_files = False
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._write(f"mlflow: no samples are logged, as the server's storage fails ({reason})")

    def close(self, is_done: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if is_done else "FAILED")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as texts by dotted key."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = str(value)
    return flat
