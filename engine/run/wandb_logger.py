"""A logger for wandb."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.request import getproxies

from engine.run.background_logger import Metrics, WriteLine
from engine.settings.schema import Settings
from engine.settings.secrets import public, redact
from utils import is_reachable


class Wandb:
    """A wandb run. It is offline, with a notice, without an account or a network."""

    def __init__(self, settings: Settings, run_dir: Path, write: WriteLine):
        import wandb

        if "WANDB_MODE" not in os.environ:
            reason = _why_offline(wandb)
            if reason:
                write(f"wandb: {reason}, so the run is logged offline in {run_dir / 'wandb'}")
        else:
            reason = ""
        command_line = " ".join(sys.argv)
        id_file = run_dir / "wandb-id"  # a run resumed in place continues its wandb run
        if settings.resume is None or not id_file.exists():
            id_file.write_text(token_hex(4))
        self._wandb = wandb
        self._rows: list[list[Any]] = []
        self._run = wandb.init(
            entity=settings.wandb.entity,
            project=settings.wandb.project,
            name=settings.exp_name,
            id=id_file.read_text(),
            resume="allow",
            dir=run_dir,
            config=public(settings.source),
            mode="offline" if reason else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                reinit="create_new",  # never the unfinished run of a sweep's earlier job
                x_disable_meta=redact(command_line, settings.source) != command_line,  # it contains the command line
            ),
        )

    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, is_evaluation: bool) -> None:
        columns, data = list(rows[0]), [list(row.values()) for row in rows]
        if not is_evaluation:  # other prompts each time, so a table each time
            self._run.log({"training_samples": self._wandb.Table(columns=columns, data=data)}, step=step)
            return
        # A logged table cannot grow, so each evaluation logs all rows again under the same name.
        self._rows += data
        self._run.log({"samples": self._wandb.Table(columns=columns, data=self._rows)}, step=step)

    def close(self, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


def _why_offline(wandb: Any) -> str:
    """The reason to log offline; empty without one."""
    if not os.environ.get("WANDB_API_KEY") and not wandb.setup().settings.api_key and not _netrc_has_wandb():
        return "no account is set up"
    if getproxies().get("https"):
        return ""  # reachability depends on the proxy
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "" if is_reachable(address) else f"{address} cannot be reached"


def _netrc_has_wandb() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
