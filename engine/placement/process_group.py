"""Join and leave the process group; let ranks act in order, and exchange messages."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from engine.placement.rendezvous import choose_interface, meet, open_store
from engine.placement.world import World, world_from_environment
from utils import UserError, end_process, flush_output

if TYPE_CHECKING:  # it takes seconds to import
    from torch.distributed import Store


T = TypeVar("T")


@dataclass
class _Group:
    """The group of this process, between join() and leave()."""

    world: World
    store: "Store"
    timeout: timedelta
    leaders: list[int]  # the first rank of each machine
    has_ended: threading.Event


_group: _Group | None = None
_phases = itertools.count()


# ---- Membership ----


def world() -> World:
    """The joined world; a world of one before join()."""
    return _group.world if _group else World()


def join(timeout_s: int) -> World:
    """Initialise torch.distributed, also for a world of one.

    Args:
        timeout_s: seconds until a collective fails. A rank without a heartbeat for as long counts as lost.
    """
    global _group
    import torch
    import torch.distributed as dist

    new = world_from_environment() or World()
    choose_interface(is_single_machine=new.size == new.local_size)
    timeout = timedelta(seconds=timeout_s)
    store = meet(new, open_store(new))
    leaders = [rank for rank in range(new.size) if store.get(f"joined/{rank}") == b"0"]
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        device = torch.device("cuda", new.local_rank % torch.cuda.device_count())  # Slurm may show a task one GPU only
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=new.rank, world_size=new.size, timeout=timeout, device_id=device)
    _group = _Group(new, store, timeout, leaders, threading.Event())
    if new.size > 1:
        threading.Thread(target=_send_heartbeats, args=(_group,), daemon=True).start()
    return new


def leave() -> None:
    """Undo join()."""
    global _group
    import torch.distributed as dist

    if _group is not None:
        _group.has_ended.set()
        _group = None
        dist.destroy_process_group()


@contextmanager
def joined(timeout_s: int) -> Iterator[World]:
    """join() and leave() around a with block. On an error no leave(): it would wait for lost ranks."""
    world = join(timeout_s)
    try:
        yield world
    except Exception:
        if world.size == 1:
            leave()
        raise
    leave()


def exit_process(status: int) -> NoReturn:
    """sys.exit(), but immediate if ranks may be lost: libraries would wait for them, or abort."""
    if _group is not None and _group.world.size > 1:
        flush_output()
        os._exit(status)
    end_process(status)


# ---- Order ----


def broadcast_from_rank_0(function: Callable[[], T]) -> T:
    """Call function on rank 0 and return its result on every rank. A UserError is raised on every rank, too."""
    if _group is None:
        return function()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]  # result, error
    with _ordered([0]):
        if _group.world.rank == 0:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = (error.code, error.what, error.fix)
    dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(*outcome[1])
    return outcome[0]


@contextmanager
def local_first() -> Iterator[None]:
    """Let the first rank of each machine run a with block before the others, which find its files on disk."""
    with _ordered(_group.leaders if _group else [0]):
        yield


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 run a with block before the others, however long it takes. All ranks leave it together."""
    with _ordered([0]):
        yield


@contextmanager
def _ordered(first: Collection[int]) -> Iterator[None]:
    """Let the ranks in first run a with block before the others. All leave it together.

    There is no time limit. Only a rank without heartbeats counts as lost.
    """
    if _group is None or _group.world.size == 1:
        yield
        return
    phase, rank, size = f"phase-{next(_phases)}", _group.world.rank, _group.world.size
    if rank not in first:
        _wait_for(first, phase, _group)
    yield
    _group.store.set(f"{phase}/{rank}", "done")
    _wait_for(range(size), phase, _group)


# ---- Messages ----


def post(topic: str, text: str) -> None:
    """Leave a text for the other ranks, once per topic. Any thread may call this."""
    if _group is not None:
        _group.store.set(f"{topic}/{_group.world.rank}", text)


def receive(topic: str, rank: int) -> str:
    """Wait for the text of another rank, as long as it sends heartbeats. Any thread may call this."""
    assert _group is not None
    _wait_for([rank], topic, _group)
    return _group.store.get(f"{topic}/{rank}").decode()


# ---- Lost ranks ----


def _send_heartbeats(group: _Group) -> None:
    """Count up in the store until leave()."""
    with suppress(RuntimeError):  # the store is gone
        while not group.has_ended.wait(min(1, group.timeout.total_seconds() / 4)):
            group.store.add(f"heartbeats/{group.world.rank}", 1)


def _wait_for(ranks: Collection[int], phase: str, group: _Group) -> None:
    """Wait until ranks have finished phase."""
    from torch.distributed import DistStoreError

    for rank in ranks:
        count, since = -1, time.monotonic()
        while not group.store.check([f"{phase}/{rank}"]):
            before, count = count, group.store.add(f"heartbeats/{rank}", 0)
            if count != before:
                since = time.monotonic()
            elif time.monotonic() - since > group.timeout.total_seconds():
                raise DistStoreError(f"rank {rank} sent no heartbeat for {time.monotonic() - since:.0f} s")
            time.sleep(0.1)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether a failed collective caused error: other ranks are gone or do not respond."""
    while error is not None:
        is_from_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
        if is_from_torch or (isinstance(error, RuntimeError) and "gloo/" in str(error)):  # gloo has no type of its own
            return True
        error = error.__cause__ or error.__context__
    return False
