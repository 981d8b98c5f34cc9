"""Joining and leaving the process group: which rank this process is, by whom it was started, and how ranks meet.

Torch is imported inside functions: a config is checked against the world before anything heavy is loaded.
"""

import fcntl
import itertools
import os
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from engine import launch
from utils import UserError, end_process, flush_output

if TYPE_CHECKING:  # it takes seconds to import
    from torch.distributed import Store

T = TypeVar("T")

JOIN_SECONDS = 300  # what processes that are started together may need until all have imported torch
SIOCGIFADDR = 0x8915  # of ioctl: the IPv4 address of a network interface


@dataclass(frozen=True)
class World:
    """The processes of a run, one of which is this one.

    Args:
        rank: of this process, from 0.
        size: how many processes there are.
        local_rank, local_size: the same among the processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


# ---- Who has started this process ----


def given_world(environment: Mapping[str, str] = os.environ) -> World | None:
    """The world that our launcher, torchrun or Slurm has made this process a part of; None if it was started alone."""
    if "RANK" in environment and "WORLD_SIZE" in environment:  # by our launcher or torchrun
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return World(rank, size, int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1)))
    # A batch script is no task of a step, though it has the variables of the job, SLURM_PROCID among them.
    is_task = "SLURM_PROCID" in environment and any(name.startswith("SLURM_STEP_") for name in environment)
    size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
    if not is_task or size == 1:  # of one task, as a shell in an allocation is: it may start workers of its own
        return None
    return World(
        int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), slurm_local_size(environment)
    )


def slurm_local_size(environment: Mapping[str, str]) -> int:
    """The number of tasks on this node, from lists such as 4(x2),3."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    listed = next((environment[name] for name in names if environment.get(name)), "1")
    sizes: list[int] = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        sizes += [int(tasks)] * int(repeats or 1)
    return sizes[min(int(environment.get("SLURM_NODEID", 0)), len(sizes) - 1)]


def slurm_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the tasks of a step meet: the first node, and a port that other jobs on it are unlikely to have."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or socket.gethostname()
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # up to a comma outside of brackets
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodes)
    port = 12_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000  # below those that are given to clients
    return environment.get("MASTER_ADDR") or host, int(environment.get("MASTER_PORT") or port)


# ---- How they meet ----


@dataclass
class _Group:
    """What this process is a part of, between join() and leave()."""

    world: World
    store: "Store"
    timeout: timedelta
    leaders: list[int]  # the first rank of each machine
    is_over: threading.Event


_group: _Group | None = None
_phases = itertools.count()


def world() -> World:
    """The world that was joined; of one, if none was."""
    return _group.world if _group else World()


def join(timeout_s: int) -> World:
    """Initialise torch.distributed, also for a world of one.

    Args:
        timeout_s: seconds after which a collective fails, and a rank that gives no sign of life counts as lost.
    """
    global _group
    import torch
    import torch.distributed as dist

    new = given_world() or World()
    choose_interface(is_single_machine=new.size == new.local_size)
    timeout = timedelta(seconds=timeout_s)
    store = _meet(new, _open_store(new))
    leaders = [rank for rank in range(new.size) if store.get(f"joined/{rank}") == b"0"]
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        device = torch.device("cuda", new.local_rank % torch.cuda.device_count())  # a task may see its own GPU only
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=new.rank, world_size=new.size, timeout=timeout, device_id=device)
    _group = _Group(new, store, timeout, leaders, threading.Event())
    if new.size > 1:
        threading.Thread(target=_show_life, args=(_group,), daemon=True).start()
    return new


def leave() -> None:
    """End what join() began."""
    global _group
    import torch.distributed as dist

    if _group is not None:
        _group.is_over.set()
        _group = None
        dist.destroy_process_group()


@contextmanager
def joined(timeout_s: int) -> Iterator[World]:
    """join(), and leave() at the end; but not where ranks may be lost, as leaving would wait for them."""
    world = join(timeout_s)
    try:
        yield world
    except Exception:
        if world.size == 1:
            leave()
        raise
    leave()


def exit_process(status: int) -> NoReturn:
    """sys.exit(); but from a group that was not left at once, as libraries would wait for lost ranks, or abort."""
    if _group is not None and _group.world.size > 1:
        flush_output()
        os._exit(status)
    end_process(status)


@cache  # its port stays taken for as long as this process lives
def _open_store(world: World) -> "Store":
    import torch.distributed as dist

    if world.size == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=JOIN_SECONDS)
    if launch.is_worker():
        # A store that is handed a socket listens there only, on loopback; else it would listen to every network.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listening = launch.rendezvous_socket()
        is_first = listening is not None
        return dist.TCPStore(
            host, port, world.size, is_first, timeout, wait_for_workers=False, master_listen_fd=listening
        )
    if "RANK" in os.environ:
        return next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))[0]
    host, port = slurm_address(os.environ)
    listening = None
    if world.size == world.local_size:
        host = "127.0.0.1"
        listening = socket.create_server(("127.0.0.1", port)).detach() if world.rank == 0 else None
    return dist.TCPStore(
        host, port, world.size, world.rank == 0, timeout, wait_for_workers=False, master_listen_fd=listening
    )


def _meet(world: World, store: "Store") -> "Store":
    """Wait until all ranks are there; returns a part of store that is theirs alone.

    A store may hold what ranks have left that were there before: torchrun keeps it when it starts them anew. So rank 0
    names the part, and tells those who show that they are alive, by a name that they have just made up.
    """
    import torch.distributed as dist

    name, timeout = uuid.uuid4().hex, timedelta(seconds=JOIN_SECONDS)
    if world.rank > 0:
        store.set(f"hello/{world.rank}", name)
        store.wait([f"welcome/{name}"], timeout)
        name = store.get(f"welcome/{name}").decode()
    part = dist.PrefixStore(name, store)
    part.set(f"joined/{world.rank}", str(world.local_rank))
    missing = set(range(1, world.size)) if world.rank == 0 else set()
    end = time.monotonic() + JOIN_SECONDS
    while missing:
        for rank in sorted(missing):
            if part.check([f"joined/{rank}"]):
                missing.remove(rank)
            elif store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", name)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"of {world.size} ranks, {sorted(missing)} did not come in {JOIN_SECONDS} s")
        time.sleep(0.05)
    part.wait([f"joined/{rank}" for rank in range(world.size)], timeout)
    return part


def choose_interface(is_single_machine: bool) -> None:
    """Have ranks listen on loopback where they are all on one machine, else where the first one is reached; unless the
    user has chosen."""
    loopback = interface_towards("127.0.0.1")
    if is_single_machine and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    elif not is_single_machine:  # NCCL finds faster ones than the one that gloo needs to be told
        interface = interface_towards(os.environ.get("MASTER_ADDR") or slurm_address(os.environ)[0])
        if interface not in (None, loopback):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", str(interface))


def interface_towards(host: str) -> str | None:
    """The network interface whose IPv4 address this machine has for host; None if there is none, or on no Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == probe.getsockname()[0]:
                return name
    return None


# ---- What one rank does for others ----


def share(function: Callable[[], T]) -> T:
    """What function returns on rank 0, on every rank; or the UserError that it raises there."""
    if _group is None:
        return function()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]  # what it returned, what it raised
    with _in_turn([0]):
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
    """The first rank of each machine goes through the body before the others, which find what it has put on disk."""
    with _in_turn(_group.leaders if _group else [0]):
        yield


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 goes through the body before the others, and may take as long as it will; all leave it together."""
    with _in_turn([0]):
        yield


@contextmanager
def _in_turn(first: Collection[int]) -> Iterator[None]:
    """The ranks in first go through the body, then the others; all leave it together.

    However long it takes: a rank is lost only if it gives no sign of life for as long as a collective may take.
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


def post(topic: str, text: str) -> None:
    """Leave a text for the other ranks, if there are any, once for each topic; from any thread."""
    if _group is not None:
        _group.store.set(f"{topic}/{_group.world.rank}", text)


def receive(topic: str, rank: int) -> str:
    """Wait for what another rank posts, however long that takes, while it gives signs of life; from any thread."""
    assert _group is not None
    _wait_for([rank], topic, _group)
    return _group.store.get(f"{topic}/{rank}").decode()


def _show_life(group: _Group) -> None:
    """Count up in the store until the group is left."""
    with suppress(RuntimeError):  # of a store that is gone
        while not group.is_over.wait(min(1, group.timeout.total_seconds() / 4)):
            group.store.add(f"beats/{group.world.rank}", 1)


def _wait_for(ranks: Collection[int], phase: str, group: _Group) -> None:
    """Wait until ranks are done with phase."""
    from torch.distributed import DistStoreError

    for rank in ranks:
        beats, since = -1, time.monotonic()
        while not group.store.check([f"{phase}/{rank}"]):
            before, beats = beats, group.store.add(f"beats/{rank}", 0)
            if beats != before:
                since = time.monotonic()
            elif time.monotonic() - since > group.timeout.total_seconds():
                raise DistStoreError(f"rank {rank} gave no sign of life for {time.monotonic() - since:.0f} s")
            time.sleep(0.1)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether error, or one that led to it, is that of a collective whose other ranks are gone or do not answer."""
    while error is not None:
        is_from_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
        if is_from_torch or (isinstance(error, RuntimeError) and "gloo/" in str(error)):  # gloo has no type of its own
            return True
        error = error.__cause__ or error.__context__
    return False
