"""Prepare a process before its slow imports: standard streams, signals outside training, memory."""

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LINK_VARIABLE = "TRAIN_WORKER"  # set by the launcher, for a worker
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 10.0  # seconds to leave with blocks after a signal
KEPT_KERNELS = 64  # of oneDNN; more than the shapes of a step
MERGE_SECONDS = 1.0  # a job and its launcher may send the same signal


def begin() -> None:
    """Prepare this process. Call it first."""
    open_missing_streams()
    end_on_signals()
    let_segments_grow()
    forget_old_shapes()
    gc.disable()  # until collect_garbage()


def collect_garbage() -> None:
    """Start the garbage collector that begin() has stopped. Call it after the slow imports.

    Imports make a million objects and hardly any garbage. To look through them takes a tenth of the time of the
    imports, and again during training, so the collector is told to leave them out.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def let_segments_grow() -> None:
    """Let torch grow its blocks of GPU memory, unless the user has chosen.

    Rows of tokens vary in length. Blocks of fixed sizes would leave gaps between them. Torch reads the variable when it
    first allocates.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():  # the second is the older name
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def forget_old_shapes() -> None:
    """Let oneDNN keep few kernels for products of past shapes, unless the user has chosen. Call it before a product.

    Rows of tokens vary in length, and each length makes kernels. By default torch and oneDNN keep 1,024 of them each:
    memory would grow by some 7 MB a step. To make one again takes under a millisecond.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))


def open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams.

    Otherwise the next file would get the descriptor of stdout or stderr, and messages would damage it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)  # workers write there too
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # Python found it closed
            stream = open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def end_on_signals() -> None:
    """Let SIGTERM, SIGINT and SIGHUP end this process with one line and status 128 + signal.

    The first signal raises SystemExit, so with blocks are left. If they take long, or with a second signal, the process
    ends at once. Training handles signals itself (StopRequest). Under nohup, SIGHUP stays ignored.
    """
    noted_at: float | None = None

    def end(number: int, frame: object) -> None:
        nonlocal noted_at
        now = time.monotonic()
        if noted_at is not None:
            if now > noted_at + MERGE_SECONDS:
                os._exit(128 + number)
            return
        noted_at = now
        if prints_signals():
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"stopped by {signal.Signals(number).name} outside training: nothing to save\n".encode())
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))  # a destructor may swallow the exception
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        raise SystemExit(128 + number)

    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
    release_signals()


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold stop signals in a with block. A process started there holds them until release_signals()."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """Get the stop signals held since this process was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def prints_signals() -> bool:
    """Whether no other process of the run says it: the launcher, or rank 0 of torchrun or Slurm."""
    is_first = (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"
    return is_first and LINK_VARIABLE not in os.environ
