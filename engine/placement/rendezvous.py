"""How the ranks of a run find each other: a store, and the network interface."""

import fcntl
import os
import socket
import struct
import time
import uuid
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from engine.placement.worker_link import is_worker, rendezvous_socket
from engine.placement.world import World, slurm_address

if TYPE_CHECKING:  # it takes seconds to import
    from torch.distributed import Store

JOIN_SECONDS = 300  # for all ranks to start and import torch
SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of a network interface


@cache  # its port stays in use until this process ends
def open_store(world: World) -> "Store":
    """The store shared by all ranks. Rank 0 serves it."""
    import torch.distributed as dist

    if world.size == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=JOIN_SECONDS)
    if is_worker():
        # With a socket handed to it, the store listens on loopback only. Otherwise it would listen on every network.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listening = rendezvous_socket()
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


def meet(world: World, store: "Store") -> "Store":
    """Wait until all ranks are present; returns a new part of store.

    torchrun keeps the store when it restarts ranks, with the keys of the earlier ones. So rank 0 names a new part. It
    tells each rank under a name made up by that rank: only a living rank can make one up.
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
            raise dist.DistStoreError(f"of {world.size} ranks, {sorted(missing)} did not join in {JOIN_SECONDS} s")
        time.sleep(0.05)
    part.wait([f"joined/{rank}" for rank in range(world.size)], timeout)
    return part


def choose_interface(is_single_machine: bool) -> None:
    """Choose the network interface of collectives, unless the environment names one.

    Loopback on a single machine, otherwise the interface towards rank 0.
    """
    loopback = interface_towards("127.0.0.1")
    if is_single_machine and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    elif not is_single_machine:  # for gloo only: NCCL finds faster interfaces itself
        interface = interface_towards(os.environ.get("MASTER_ADDR") or slurm_address(os.environ)[0])
        if interface not in (None, loopback):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", str(interface))


def interface_towards(host: str) -> str | None:
    """The network interface with this machine's IPv4 address towards host; None if unknown, as outside Linux."""
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
