"""A hook for tests: end the process, or fail, at a named point. Does nothing unless it is armed."""

import errno
import os
import signal
import time
from pathlib import Path

# <point>=<what>; <point>#<n>=<what> for the n-th time that it is passed; <point>#<n>@<rank>=<what> on one rank only:
# kill (SIGKILL), half (SIGKILL, after a file was cut in half), wait (a minute), or the name of an errno that an OSError
# is raised with.
ARMED = os.environ.get("TRAINER_FAULT", "")
_passed: dict[str, int] = {}


def fail_point(name: str, path: Path | None = None) -> None:
    """Pass a point at which a test may let the process fail; path is what was written last."""
    if not ARMED:
        return
    point, _, what = ARMED.partition("=")
    point, _, rank = point.partition("@")
    point, _, count = point.partition("#")
    _passed[name] = _passed.get(name, 0) + 1
    if point != name or _passed[name] != int(count or 1) or (rank and rank != os.environ.get("RANK", "0")):
        return
    if what == "wait":
        time.sleep(60)
        return
    if what not in ("kill", "half"):
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))
    if what == "half" and path is not None:
        os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
