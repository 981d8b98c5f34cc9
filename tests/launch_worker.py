"""A run for the tests of engine/launch.py: launcher and workers are the program's own, but instead of training, a
rank does what the test says.

    python tests/launch_worker.py num=2 act=killed local_run_dir=DIR
"""

import os
import signal
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from engine import distributed, launch
from utils import UserError

DEFAULTS = {"num": 2, "act": "nothing", "trainer": "FSDPTrainer", "tensor_parallel": {"backend": "native"},
            "exp_name": "toy", "cache_dir": ".", "local_dirs": ["."], "collective_timeout": 60,
            "resume": None}  # fmt: skip


def act(config: DictConfig, run_dir: Path, checkpoint: Path | None) -> None:
    """Do something, on rank 1, that it should not do; all ranks together compute sums."""
    import torch
    import torch.distributed as dist

    rank = distributed.world().rank
    is_first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    with distributed.local_first():
        time.sleep(0.5 if rank == 0 else 0)
        (run_dir / "order").open("a").write(f"{rank}\n")
    (run_dir / f"{rank}.pid").write_text(str(os.getpid()))
    for step in range(600 if config.act == "wait" else 10):
        if config.act == "wait":
            time.sleep(0.1)
        if rank == 1 and step == 5:
            print("rank 1 is about to act", file=sys.stderr)
            if config.act == "killed" or (config.act == "killed once" and is_first_try):
                os.kill(os.getpid(), signal.SIGKILL)
            elif config.act == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif config.act == "exception":
                raise ZeroDivisionError("a bug")
            elif config.act == "user error":
                raise UserError("DATA", "row 7 is bad", "mend it")
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
    print(f"rank {rank} of {dist.get_world_size()} has {total.item()}")


def open_run_dir(config: DictConfig) -> tuple[Path, Path | None]:
    if config.act == "no directory":
        raise UserError("STORAGE", "no room", "make some")
    return Path(config.local_run_dir), None


if __name__ == "__main__":
    if distributed.given_world():
        train.train, train.open_run_dir = act, open_run_dir
        train.hush_other_ranks()
        if launch.is_worker():
            status = train.run_worker()
        else:
            train.run_here(OmegaConf.create(DEFAULTS | dict(OmegaConf.from_dotlist(sys.argv[1:]))))
            status = 0
        distributed.exit_process(status)
    config = OmegaConf.create(DEFAULTS | dict(OmegaConf.from_dotlist(sys.argv[1:])))
    sys.exit(launch.launch(config, config.num, [sys.executable, Path(__file__)]))
