"""The processes of a run, as its launcher, torchrun or Slurm describes them in the environment."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run.

    Args:
        rank, size: (rank, world size).
        local_rank, local_size: the same among the processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World | None:
    """The world set by our launcher, torchrun or Slurm; None for a process started alone."""
    if "RANK" in environment and "WORLD_SIZE" in environment:  # by our launcher or torchrun
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return World(rank, size, int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1)))
    # A batch script is no task of a step. It has the job's variables all the same, SLURM_PROCID among them.
    is_task = "SLURM_PROCID" in environment and any(name.startswith("SLURM_STEP_") for name in environment)
    size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
    if not is_task or size == 1:  # a shell in an allocation is a single task: it may start workers
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
    """The rendezvous address of a Slurm step: its first node, and a port other jobs are unlikely to use."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or socket.gethostname()
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # up to a comma outside of brackets
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodes)
    port = 12_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000  # below the range of client ports
    return environment.get("MASTER_ADDR") or host, int(environment.get("MASTER_PORT") or port)
