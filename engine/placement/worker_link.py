"""The link between a worker and its launcher, seen from the worker."""

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field

# LINK_VARIABLE: the launcher's process id and the descriptors it hands to a worker.
from process_start import LINK_VARIABLE, release_signals

PR_SET_PDEATHSIG = 1


@dataclass
class Failure:
    """The error that ended a worker.

    Args:
        line: the error, on one line.
        status: its exit status.
        is_consequence: the worker only lost other ranks.
        time: of the error, on the clock shared by all processes of a machine.
    """

    line: str
    status: int
    is_consequence: bool
    time: float = field(default_factory=time.monotonic)


def is_worker() -> bool:
    return LINK_VARIABLE in os.environ


def attach() -> str:
    """End this worker when its launcher ends; returns the text passed to launch()."""
    release_signals()
    launcher = json.loads(os.environ[LINK_VARIABLE])["launcher_pid"]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended before the line above
        os._exit(1)
    return sys.stdin.buffer.read().decode()


def report(failure: Failure) -> None:
    """Tell the launcher the error that ends this worker."""
    with suppress(OSError):  # the launcher has ended
        os.write(json.loads(os.environ[LINK_VARIABLE])["report_fd"], json.dumps(asdict(failure)).encode() + b"\n")


def rendezvous_socket() -> int | None:
    """The descriptor of the listening socket handed to rank 0; None on other ranks."""
    return json.loads(os.environ[LINK_VARIABLE])["rendezvous_fd"]
