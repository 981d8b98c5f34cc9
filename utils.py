"""Stateless helpers: errors for users, content hashes, prefetching, progress, signals, atomic files."""

import fcntl
import getpass
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
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
    """An error for users, on one line: the problem, its place and the fix.

    Args:
        code: a key of EXIT_STATUS; it decides the exit status.
        what: the problem and its place (key, file, line, field).
        fix: the remedy.
    """

    def __init__(self, code: str, what: str, fix: str):
        self.code, self.what, self.fix = code, what, fix
        super().__init__(printable(f"error[{code}] {what}; fix: {fix}"))

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        return type(self), (self.code, self.what, self.fix)  # to pass between processes

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.code]


def printable(text: str) -> str:
    """Text on one line, with control characters and unencodable characters escaped."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def clipped(text: str, length: int = 100) -> str:
    """Text cut to length, for messages."""
    return text if len(text) <= length else text[: length - 4] + " ..."


class ContentHash:
    """A hash of parts: bytes, or values with a JSON form. The same parts give the same digest."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add_all(self, parts: Iterable[Any]) -> None:
        """Hash parts, one after another."""
        for part in parts:
            data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
            self._digest.update(len(data).to_bytes(8, "little"))
            self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def content_hash(parts: Iterable[Any]) -> str:
    """The hex digest of the ContentHash of parts."""
    digest = ContentHash()
    digest.add_all(parts)
    return digest.hexdigest()


def local_dir(local_dirs: Iterable[str]) -> Path:
    """<dir>/<user> for the first existing one of local_dirs; without one, for the last."""
    candidates = [Path(directory) for directory in local_dirs]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        user = str(os.getuid())
    return next((path for path in candidates if path.is_dir()), candidates[-1]) / user


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The items. A background thread makes each while the previous one is in use."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = executor.submit(next, iterator, end)
            yield item  # type: ignore[misc]


class Progress:
    """Shows the progress of a long phase.

    On a terminal it is a bar, elsewhere a line on stdout every 30 seconds. Phases shorter than this print no line.

    Args:
        description: names the phase, as in "tokenizing".
        total: number of items; None if unknown.
        unit: an item, in the plural.
        is_shown: None shows it on rank 0 only.
        stays: whether the finished bar stays on the terminal.
        clock: gives seconds.
    """

    INTERVAL = 30.0

    def __init__(
        self,
        description: str,
        *,
        total: int | None = None,
        unit: str = "items",
        is_shown: bool | None = None,
        stays: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_done = 0
        self._description, self._total, self._unit = description, total, unit
        self._is_shown = _is_first_rank() if is_shown is None else is_shown
        self._clock = clock
        self._start = self._last_line = clock()
        self._bar: Any = None
        if self._is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            size = shutil.get_terminal_size()  # tqdm shows nothing on a terminal of unknown size
            self._bar = tqdm(
                total=total, desc=description, unit=f" {unit}", leave=stays, ncols=size.columns, nrows=size.lines
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, num_items: int = 1) -> None:
        """Count items as done."""
        self.num_done += num_items
        if self._bar is not None:
            self._bar.update(num_items)
        elif self._is_shown and (now := self._clock()) >= self._last_line + self.INTERVAL:
            self._last_line = now
            print(self._line(now - self._start), flush=True)

    def _line(self, seconds: float) -> str:
        if self._total is None or not self.num_done:
            return f"{self._description}: {self.num_done:,} {self._unit}"
        seconds_left = seconds / self.num_done * max(self._total - self.num_done, 0)
        line = f"{self._description}: {self.num_done:,} of {self._total:,} {self._unit}"
        return f"{line}, {duration(seconds_left)} left"


def progress(
    items: Iterable[T],
    *,
    description: str,
    total: int | None = None,
    unit: str = "items",
    is_shown: bool | None = None,
    stays: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """The items, with their Progress shown. By default, total is their len, if any."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, total=total, unit=unit, is_shown=is_shown, stays=stays, clock=clock) as shown:
        for item in items:
            yield item
            shown.update()


def _is_first_rank() -> bool:
    """Whether this process is rank 0, as its launcher, torchrun or Slurm says."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def duration(seconds: float) -> str:
    """Whole seconds in words: "45 s", "1 min 05 s", "2 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def to_device(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """Copy tensor to device. A copy to a GPU returns at once."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: "Tensor") -> "Tensor":
    """Copy tensor to the CPU. A copy from a GPU returns at once; its values are there when the queue so far is done."""
    return tensor.to("cpu", non_blocking=True)  # into pinned memory


class StopRequest:
    """Handles SIGTERM, SIGINT and SIGHUP inside a with block: the first is noted, the second ends the process.

    Under nohup, SIGHUP stays ignored. A second signal within MERGE_SECONDS counts as the first: a worker may get it
    from the job and from its launcher, and a closing terminal may send it twice.

    Args:
        first: called with the first signal; prints a message by default.
        second: called with the second one; ends the process by default.

    Attributes:
        signal: the first signal; None before.
    """

    MERGE_SECONDS = 1.0

    def __init__(
        self, first: Callable[[int], object] | None = None, second: Callable[[int], object] | None = None
    ) -> None:
        self.signal: int | None = None
        self._first, self._second = first or self._announce, second or self._leave
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only it can set handlers
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
        elif now > self._noted_at + self.MERGE_SECONDS:
            self._second(number)

    def _announce(self, number: int) -> None:
        text = f"{signal.Signals(number).name}: saving after this step; once more to leave at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())

    def _leave(self, number: int) -> None:
        os._exit(128 + number)


class BestEffortStream:
    """A text stream without write errors: a run outlives its terminal, or the reader of its output."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: a closed stream
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU, torch raises a plain RuntimeError."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or "OutOfMemoryError" in type(error).__name__
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text))
    )


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Turn libraries' errors about unwritable files into OSErrors inside a with block."""
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


@cache
def has_c_compiler() -> bool:
    """Whether the machine has a C compiler, as Triton finds it."""
    return any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name)


def quiet_bitsandbytes() -> None:
    """Silence bitsandbytes' messages about missing optional kernels on import."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_reachable(url: str, timeout: float = 5) -> bool:
    """Whether the server of url accepts a connection within timeout seconds."""
    try:
        address = urlsplit(url)
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=timeout).close()
        return True
    except (OSError, ValueError):  # ValueError: not a url
        return False


@contextmanager
def one_at_a_time(path: Path, notice: str) -> Iterator[None]:
    """Let one process at a time run a with block, as it makes a file that others wait for.

    Where the disk has no locks, or is read-only, nobody waits.

    Args:
        path: of the file; the lock is beside it.
        notice: printed before a wait.
    """
    with ExitStack() as opened:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
            opened.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(notice, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, even across a crash. Readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: other machines, and other containers, may write to the same disk.
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**15)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def apply_umask(path: Path) -> None:
    """Give a file, or all files below a directory, the mode 0666 minus the umask.

    safetensors writes with mode 0600 whatever the umask.
    """
    mode = 0o666 & ~_umask()
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
            with suppress(OSError):  # file systems without modes
                file.chmod(mode)


def _umask() -> int:
    """The umask of this process. On Linux, reading changes nothing: other threads may be creating files."""
    with suppress(OSError):
        if found := re.search(rb"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_bytes(), re.MULTILINE):
            return int(found[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def install_directory(temporary: Path, target: Path) -> None:
    """Flush a directory's files to disk, then rename it. After a crash, target is complete or absent."""
    for path in (*temporary.rglob("*"), temporary):
        fsync(path)
    temporary.rename(target)
    fsync(target.parent)


def flush_output() -> None:
    """Flush stdout and stderr; drop unwritable output. Python would retry at exit, and change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_process(status: int, patience: float = 10) -> NoReturn:
    """End the process with status. Exit hooks and threads of libraries have patience seconds.

    Those of wandb would wait for an unresponsive server.
    """
    flush_output()
    timer = threading.Timer(patience, os._exit, [status])
    timer.daemon = True
    timer.start()
    sys.exit(status)
