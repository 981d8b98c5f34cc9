"""A rank of several consecutive runs of train.py; starting processes once saves minutes."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # not this folder: its modules would shadow others

import preference_datasets
import tests.conftest  # noqa: F401  the environment of all tests
import train
from engine.placement import worker_link
from tests.configs import composed
from tests.runs import load_films_once


def run(overrides: Sequence[str], out: Path) -> None:
    """Run `python train.py *overrides` in this process; its output goes to the file out."""
    films = patch.object(preference_datasets, "load_split", load_films_once)
    with open(out, "w") as stream, redirect_stdout(stream), films:
        train.run(train.prepare(composed(*overrides)))


def main() -> int:
    runs = json.loads(worker_link.attach())
    for overrides, out in runs:
        try:
            run(overrides, Path(out if os.environ["RANK"] == "0" else os.devnull))
        except Exception as error:
            traceback.print_exc()
            line = f"error[INTERNAL] {type(error).__name__}: {' '.join(str(error).split())}; in {' '.join(overrides)}"
            worker_link.report(worker_link.Failure(line, 1, train.process_group.is_lost_peer(error)))
            return 1
    return 0


if __name__ == "__main__":
    train.process_group.exit_process(main())
