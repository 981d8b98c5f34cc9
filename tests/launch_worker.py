"""A run for tests/test_launch.py: real launcher and workers, but ranks misbehave instead of training.

python tests/launch_worker.py num=2 act=killed local_run_dir=DIR
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from engine.placement import launcher, process_group, worker_link
from engine.placement.world import world_from_environment
from engine.run import run_dir
from engine.run.run_dir import derive_names
from engine.settings.reading import settings_to_text
from engine.settings.schema import Settings
from tests.configs import make_settings
from utils import UserError

ACT = "TOY_ACT"  # environment variable: the action of rank 1
DEFAULTS = ["trainer=FSDPTrainer", "exp_name=toy", "cache_dir=.", "local_dirs=[.]", "collective_timeout=60"]


def act(settings: Settings, run_dir: Path, checkpoint: Path | None) -> None:
    """Misbehave on rank 1, while all ranks compute sums."""
    import torch
    import torch.distributed as dist

    rank, action = process_group.world().rank, os.environ[ACT]
    is_first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    with process_group.local_first():
        time.sleep(0.5 if rank == 0 else 0)
        (run_dir / "order").open("a").write(f"{rank}\n")
    (run_dir / f"{rank}.pid").write_text(str(os.getpid()))
    for step in range(600 if action == "wait" else 10):
        if action == "wait":
            time.sleep(0.1)
        if rank == 1 and step == 5:
            print("rank 1 is about to act", file=sys.stderr)
            if action == "killed" or (action == "killed once" and is_first_try):
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif action == "exception":
                raise ZeroDivisionError("a bug")
            elif action == "user error":
                raise UserError("DATA", "row 7 is bad", "mend it")
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
    print(f"rank {rank} of {dist.get_world_size()} has {total.item()}")


def open_run_dir(settings: Settings) -> tuple[Path, Path | None]:
    if os.environ[ACT] == "no directory":
        raise UserError("STORAGE", "no room", "make some")
    return Path(settings.local_run_dir or ""), None


def read_arguments() -> tuple[Settings, int]:
    """Settings and number of workers from the command line; `act` goes to the environment."""
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    os.environ.setdefault(ACT, arguments.pop("act", "nothing"))
    num_workers = int(arguments.pop("num", 2))
    kept_defaults = [default for default in DEFAULTS if default.split("=")[0] not in arguments]
    return make_settings(*kept_defaults, *(f"{key}={value}" for key, value in arguments.items())), num_workers


if __name__ == "__main__":
    if world_from_environment():
        train.train, run_dir.open_run_dir = act, open_run_dir
        train.silence_other_ranks()
        if worker_link.is_worker():
            status = train.run_worker()
        else:
            train.run_here(read_arguments()[0])
            status = 0
        process_group.exit_process(status)
    settings, num_workers = read_arguments()
    sys.exit(
        launcher.launch(
            settings_to_text(settings, derive_names(settings)), num_workers, [sys.executable, Path(__file__)]
        )
    )
