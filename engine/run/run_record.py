"""Record how a run was started, and the counts of its data, for its report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.settings.schema import Settings
from engine.settings.secrets import redact
from utils import write_atomically

RECORD_FILE = "run.json"  # read by engine/report/run_log.py


def write_record(run_dir: Path, settings: Settings, counts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write run.json, unless an earlier start of the run has.

    Args:
        counts: of the data, by split.
    """
    if (run_dir / RECORD_FILE).exists():
        return
    record = {"command": redact(settings.command, settings.source), "data": counts}
    write_atomically(run_dir / RECORD_FILE, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
