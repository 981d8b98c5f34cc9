"""Points where a test may make the process fail."""

import errno
import os
import signal
import time
from pathlib import Path

# <point>=<action>; <point>#<n>=<action> at the n-th pass; <point>#<n>@<rank>=<action> on one rank only.
# Actions: kill (SIGKILL), half (cut the last file in half, then SIGKILL), wait (a minute), or an errno name for an
# OSError.
ARMED = os.environ.get("TRAINER_FAULT", "")
_passes: dict[str, int] = {}


def fail_point(name: str, path: Path | None = None) -> None:
    """Fail here if a test has armed this point; path is the file written last."""
    if not ARMED:
        return
    point, _, action = ARMED.partition("=")
    point, _, rank = point.partition("@")
    point, _, count = point.partition("#")
    _passes[name] = _passes.get(name, 0) + 1
    if point != name or _passes[name] != int(count or 1) or (rank and rank != os.environ.get("RANK", "0")):
        return
    if action == "wait":
        time.sleep(60)
        return
    if action not in ("kill", "half"):
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))
    if action == "half" and path is not None:
        os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
