"""Do runs survive kills, signals, full disks and damaged checkpoints? The long form of tests/faults.

At most 40 minutes on two cores. Each count can be set; the record holds how many were done in the time:

    .venv/bin/python benchmarks/soak.py --kills 30 --seconds 600

--record also runs the tests of planted secrets and of 2,000 bad inputs, and writes counts and failures to --results.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, add_results_option, machine, shown_command, write_result
from engine.models.archives import checkpoints, find_corruption
from tests.faults.processes import (
    POINTS,
    TWO_RANK_TRAINERS,
    assert_equal_runs,
    command,
    complete,
    damaged_copies,
    fail_at_each_point,
    fail_on_a_full_disk,
    interrupt_randomly,
    make_inputs,
    small_disk,
)

# name -> default, meaning
LIMITS: dict[str, tuple[int, str]] = {
    "kills": (240, "SIGKILLs of a run in one process"),
    "kills_of_a_rank": (60, "SIGKILLs of a rank of FSDPTrainer on two"),
    "points": (1, "1: fail at every point of a save, with each of three trainers"),
    "flips": (1000, "flipped bits in a checkpoint"),
    "truncations": (1000, "truncated files of a checkpoint"),
    "sigterms": (50, "SIGTERMs of a run in one process"),
    "full_disks": (20, "full disks"),
    "seconds": (2400, "no new fault starts after these"),
}
# Tests of tests/faults under --record: name -> arguments of pytest.
TESTS = {
    "bad_inputs": ["test_bad_input.py::test_two_thousand"],
    "planted_secrets": ["test_security.py", "-k", "secret"],
}
# trainer -> overrides, processes
TRAINERS: dict[str, tuple[tuple[str, ...], int]] = {
    "BasicTrainer": ((), 1),
    **{name: (overrides, 2) for name, overrides in TWO_RANK_TRAINERS.items()},
}
# name of signals -> trainer, signal
SIGNALS = {
    "kills": ("BasicTrainer", signal.SIGKILL),
    "kills_of_a_rank": ("FSDPTrainer", signal.SIGKILL),
    "sigterms": ("BasicTrainer", signal.SIGTERM),
}
MAX_FAILURES = 20


class Soak:
    """Faults of runs in a directory, and their outcome.

    Args:
        limits: how many of each fault, and seconds.

    Attributes:
        done: faults so far.
        failures: one line each.
    """

    def __init__(self, directory: Path, limits: dict[str, int], seed: int):
        self.directory, self.limits = directory, limits
        self.done: dict[str, int] = {}
        self.failures: list[str] = []
        self.end = time.monotonic() + limits["seconds"]
        self.chance = random.Random(seed)
        make_inputs(directory)

    def run(self) -> None:
        complete_runs = {name: self.run_to_end(name) for name in self.trainers_needed()}
        basic = complete_runs["BasicTrainer"]
        for fault in ("flips", "truncations"):
            self.count(fault, partial(self.find_damage, basic, fault))
        if self.limits["points"]:
            for name, run_dir in complete_runs.items():
                for how in ("kill", "ENOSPC"):
                    if time.monotonic() < self.end:
                        self.count("points", partial(self.fail_at_points, name, run_dir, how))
        for fault, (trainer, _) in SIGNALS.items():
            self.repeat(fault, partial(self.interrupt, fault, complete_runs.get(trainer, basic)))
        self.repeat("full_disks", partial(self.fill_disk, basic))

    def trainers_needed(self) -> list[str]:
        if self.limits["points"]:
            return [*TRAINERS]
        return ["BasicTrainer", "FSDPTrainer"] if self.limits["kills_of_a_rank"] else ["BasicTrainer"]

    def repeat(self, fault: str, act: Callable[[int], int]) -> None:
        """Call act(0), act(1), ... until the limit or the end is reached."""
        index = 0
        while not self.is_over(fault):
            self.count(fault, partial(act, index))
            index += 1
        print(f"{fault}: {self.done.get(fault, 0)}, {len(self.failures)} failures so far", flush=True)

    def is_over(self, fault: str) -> bool:
        is_late = time.monotonic() > self.end
        return is_late or self.done.get(fault, 0) >= self.limits[fault] or len(self.failures) > MAX_FAILURES

    def count(self, fault: str, act: Callable[[], int]) -> None:
        """Call act and add its number of faults; note its failure."""
        try:
            self.done[fault] = self.done.get(fault, 0) + act()
        except AssertionError as error:
            self.done[fault] = self.done.get(fault, 0) + 1
            self.failures.append(f"{fault} {self.done[fault]}: {' '.join(str(error).split())[:500]}")
            print(self.failures[-1])

    # ---- Runs and faults ----

    def run_to_end(self, trainer: str) -> Path:
        """The directory of a run without faults."""
        overrides, num = TRAINERS[trainer]
        run_dir = self.directory / f"complete-{trainer}"
        status, _, err = complete(command(self.directory, run_dir, *overrides), self.directory / "output", num)
        assert status == 0, err
        return run_dir

    def interrupt(self, fault: str, expected: Path, index: int) -> int:
        """Send a run up to ten signals; returns how many. The run must equal the expected one."""
        trainer, number = SIGNALS[fault]
        overrides, num = TRAINERS[trainer]
        run_dir = self.directory / f"{fault}-{index}"
        most = min(10, self.limits[fault] - self.done.get(fault, 0))
        times = interrupt_randomly(
            command(self.directory, run_dir, *overrides), run_dir, most, self.chance, num, 0.3 * num, number
        )
        assert_equal_runs(run_dir, expected)
        shutil.rmtree(run_dir)
        return times

    def fail_at_points(self, trainer: str, expected: Path, how: str) -> int:
        """Let a run fail at each point of a save; returns the number of points."""
        overrides, num = TRAINERS[trainer]
        points = tuple(point for point in POINTS if how == "kill" or point != "during_retention")
        run_dir = self.directory / f"points-{trainer}-{how}"
        fail_at_each_point(self.directory, run_dir, overrides, num, how, points)
        assert_equal_runs(run_dir, expected)
        return len(points)

    def find_damage(self, run_dir: Path, fault: str) -> int:
        """Damage the files of a checkpoint, one at a time; returns how often. Each must be found."""
        checkpoint = checkpoints(run_dir)[-1]
        files = sorted(checkpoint.iterdir())
        shares = [self.limits[fault] * (index + 1) // len(files) for index in range(len(files))]
        num = 0
        for path, before, after in zip(files, [0, *shares], shares, strict=False):
            for place in damaged_copies(path, fault.removesuffix("s"), after - before, self.chance):
                assert find_corruption(checkpoint), (path.name, fault, place)
                num += 1
        assert find_corruption(checkpoint) is None
        return num

    def fill_disk(self, expected: Path, index: int) -> int:
        """Let a run fill its disk, and resume it with more room."""
        size = sum(path.stat().st_size for path in checkpoints(expected)[-1].iterdir())
        with small_disk(self.directory / f"disk-{index}", 5 * size) as disk:
            num_free = int(size * self.chance.uniform(0.01, 2.4))
            fail_on_a_full_disk(self.directory, disk / f"filled-{index}", num_free, expected)
        return 1


def run_tests(arguments: Sequence[str]) -> tuple[int, str]:
    """The number of passed tests of tests/faults, and the errors of the others."""
    first, *others = arguments
    command = [sys.executable, "-m", "pytest", "-q", f"tests/faults/{first}", *others]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", result.stdout)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("E ", "FAILED"))]
    problem = "\n".join(lines) or f"pytest ended with status {result.returncode}"
    return int(passed[1]) if passed else 0, problem[:2000] if result.returncode else ""


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, meaning) in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=meaning)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places of faults")
    parser.add_argument("--record", action="store_true", help="run the tests too, and write the result")
    add_results_option(parser)
    return parser.parse_args(texts)


def main(texts: Sequence[str]) -> int:
    """Run the soak; returns the exit status."""
    arguments = parse(texts)
    start, started = time.monotonic(), datetime.now().isoformat(timespec="seconds")
    limits = {name: getattr(arguments, name) for name in LIMITS}
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        soak = Soak(Path(directory), limits, arguments.seed)
        soak.run()
    record: dict[str, Any] = {
        "command": shown_command("soak", texts),
        **machine(os.cpu_count() or 1),
        "begun": started,
        "seconds": round(time.monotonic() - start),
        "asked": limits,
        "done": soak.done,
        "failures": soak.failures,
    }
    if arguments.record:
        for name, tests in TESTS.items():
            record[f"tests_of_{name}"], problem = run_tests(tests)
            record["failures"] += [problem] if problem else []
    print(json.dumps(record, indent=1))
    if arguments.record:
        write_result(arguments.results, "soak", record)
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
