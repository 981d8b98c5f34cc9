"""A time limit for Python code of this thread."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

AGAIN = 1.0  # seconds until the next signal, for code that swallows the first


class _Expired(BaseException):
    """Not an Exception: a function that catches those must end too."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in a with block that takes longer; None for no limit.

    It is for the main thread, by a signal. Python code, waiting and regular expressions are interrupted at once, other
    C code when it returns.
    """
    if seconds is None:
        yield
        return

    def expire(number: int, frame: FrameType | None) -> NoReturn:
        raise _Expired

    previous = signal.signal(signal.SIGALRM, expire)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Expired:
        raise TimeoutError(f"it took more than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # again, as the signal may have come before the first
        signal.signal(signal.SIGALRM, previous)
