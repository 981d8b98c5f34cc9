"""A rank of several runs of train.py, one after another; starting processes once for all of them saves minutes."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # not this folder, in which tokenizers is another module

import tests.conftest  # noqa: F401  the environment of all tests
import train
from engine import launch
from tests.ranks import CONFIG


def run(overrides: Sequence[str], out: Path) -> None:
    """What `python train.py *overrides` does, in this process; what it prints goes to the file out."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(CONFIG, version_base=None):
        config = compose("config", [*overrides])
    with open(out, "w") as stream, redirect_stdout(stream):
        train.run(config)


def main() -> int:
    runs = launch.attach().runs
    for overrides, out in runs:
        try:
            run(overrides, Path(out if os.environ["RANK"] == "0" else os.devnull))
        except Exception as error:
            traceback.print_exc()
            line = f"error[INTERNAL] {type(error).__name__}: {' '.join(str(error).split())}; in {' '.join(overrides)}"
            launch.report(launch.Failure(line, 1, train.distributed.is_lost_peer(error)))
            return 1
    return 0


if __name__ == "__main__":
    train.distributed.exit_process(main())
