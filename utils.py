"""Stateless helpers: errors for users, content hashes, local directories, work ahead of its use, atomic files."""

import getpass
import hashlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:  # it takes seconds to import
    import torch
    from torch import Tensor

T = TypeVar("T")

EXIT_STATUS = {
    "CONFIG": 2,
    "DATA": 3,
    "CHECKPOINT": 4,
    "NONFINITE": 5,
    "STORAGE": 6,
    "DISTRIBUTED": 7,
    "MEMORY": 8,
}


class UserError(ValueError):
    """What ended a run, said for its user: one line with what, where and how to fix it.

    Args:
        code: a key of EXIT_STATUS; it decides the exit status.
        what: what is wrong and where (key, file, line, field).
        fix: what to do about it.
    """

    def __init__(self, code: str, what: str, fix: str):
        self.code, self.what, self.fix = code, what, fix
        super().__init__(printable(f"error[{code}] {what}; fix: {fix}"))

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.code]


def printable(text: str) -> str:
    """Text on one line, in which nothing is left that a terminal would act on, or that cannot be encoded."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def clipped(text: str, length: int = 100) -> str:
    """Text that is no longer than length, for messages."""
    return text if len(text) <= length else text[: length - 4] + " ..."


def content_hash(parts: Iterable[Any]) -> str:
    """A hex digest of parts, each bytes or something that JSON can write; the same parts give the same digest."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def local_dir(local_dirs: Iterable[str]) -> Path:
    """<dir>/<user> for the first of local_dirs that exists; if none does, for the last."""
    candidates = [Path(directory) for directory in local_dirs]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        user = str(os.getuid())
    return next((path for path in candidates if path.is_dir()), candidates[-1]) / user


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made by a thread in the background while the one before is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = executor.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def to_device(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """tensor on device; nobody waits for a copy to a GPU, nor for what the GPU has to do before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class StopRequest:
    """Inside a with block, the first SIGTERM, SIGINT or SIGHUP is noted in signal, and the second ends the process at
    once. SIGHUP, of a terminal that closes, only if nohup does not keep it away.

    One that follows within TOGETHER seconds is the same one: where all processes of a job are signalled, a worker gets
    it from its launcher too, and a terminal that closes may say it twice.

    Args:
        first, second: called with the signal, in place of what is said of the first, and of that end.
    """

    TOGETHER = 1.0

    def __init__(
        self, first: Callable[[int], object] | None = None, second: Callable[[int], object] | None = None
    ) -> None:
        self.signal: int | None = None
        self._first, self._second = first or self._announce, second or self._leave
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other can set handlers
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted_at = number, now
            self._first(number)
        elif now > self._noted_at + self.TOGETHER:
            self._second(number)

    def _announce(self, number: int) -> None:
        text = f"{signal.Signals(number).name}: saving after this step; once more to leave at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())

    def _leave(self, number: int) -> None:
        os._exit(128 + number)


class Unfailing:
    """A text stream to which nothing fails to be written: a run outlives its terminal, or what its output goes to."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or not; torch has an exception of its own for GPUs only."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or "OutOfMemoryError" in type(error).__name__
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text))
    )


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Whatever a library raises inside this where a file cannot be written is raised as an OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        of_rust = re.search(r"\(os error (\d+)\)", str(error))  # tokenizers raises bare Exceptions
        if of_rust:
            raise OSError(int(of_rust[1]), str(error)) from error
        if "inline_container.cc" in str(error):  # torch.save
            raise OSError(f"torch could not write ({error})") from error
        raise


def quiet_bitsandbytes() -> None:
    """Keep it from saying, when it is imported, which optional kernels it lacks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_reachable(url: str, timeout: float = 5) -> bool:
    """Whether the server of url takes a connection within timeout seconds."""
    try:
        address = urlsplit(url)
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=timeout).close()
        return True
    except (OSError, ValueError):  # the latter if it is no url
        return False


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a reader never sees half of it, nor does a run after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_output() -> None:
    """Flush what was printed; what cannot be any more is dropped, as Python would try again and make it the status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_process(status: int, patience: float = 10) -> NoReturn:
    """End the process with status; without the exit hooks and threads of libraries if they take longer than patience.

    wandb's, for one, would wait for a server that does not answer.
    """
    flush_output()
    timer = threading.Timer(patience, os._exit, [status])
    timer.daemon = True
    timer.start()
    sys.exit(status)
