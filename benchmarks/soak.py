"""The long form of tests/faults: python benchmarks/soak.py [--record]; at most 40 minutes on two cores.

How much of each is done may be set: SOAK_KILLS=30 SOAK_SECONDS=600 python benchmarks/soak.py. What was not done when
the time is over is not counted. --record also runs the tests of planted secrets and of 2,000 bad inputs, and writes
counts and failures to benchmarks/results/soak-<date>.json.
"""

import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.checkpoint import checkpoints, damage
from tests.faults.processes import (
    POINTS,
    TWO,
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

ROOT = Path(__file__).resolve().parent.parent
ASKED = {
    "kills": 240,  # SIGKILL of a run in one process
    "kills_of_a_rank": 60,  # of FSDPTrainer on two
    "points": 1,  # 1: every point of a save, under each of three trainers
    "flips": 1000,
    "truncations": 1000,
    "sigterms": 50,
    "full_disks": 20,
    "seconds": 2400,  # after which nothing more is begun
}
# What --record runs beside, by pytest: name -> tests of tests/faults, and what of them.
TESTS = {
    "bad_inputs": ["test_bad_input.py::test_two_thousand"],
    "planted_secrets": ["test_security.py", "-k", "secret"],
}
TRAINERS: dict[str, tuple[tuple[str, ...], int]] = {
    "BasicTrainer": ((), 1),
    **{name: (overrides, 2) for name, overrides in TWO.items()},
}


class Soak:
    """Things that are done to runs in a directory, and what came of them."""

    def __init__(self, directory: Path, asked: dict[str, int]):
        self.directory, self.asked = directory, asked
        self.done: dict[str, int] = {}
        self.failures: list[str] = []
        self.end = time.monotonic() + asked["seconds"]
        self.chance = random.Random(int(os.environ.get("SOAK_SEED", "0")))
        make_inputs(directory)

    def is_over(self, what: str) -> bool:
        return self.done.get(what, 0) >= self.asked[what] or time.monotonic() > self.end or len(self.failures) > 20

    def counted(self, what: str, act: Callable[[], int]) -> None:
        """Do something, and count how often it was done, or that it failed."""
        try:
            self.done[what] = self.done.get(what, 0) + act()
        except AssertionError as error:
            self.done[what] = self.done.get(what, 0) + 1
            self.failures.append(f"{what} {self.done[what]}: {' '.join(str(error).split())[:500]}")
            print(self.failures[-1])

    def run(self) -> None:
        wholes = {name: self.whole(name) for name in TRAINERS}
        basic = wholes["BasicTrainer"]
        for what in ("flips", "truncations"):
            self.counted(what, lambda what=what: self.notice_damage(basic, what))  # type: ignore[misc]
        phases: dict[str, Callable[[int], int]] = {
            "kills": lambda index: self.interrupt("kills", "BasicTrainer", basic, index, signal.SIGKILL),
            "kills_of_a_rank": lambda index: self.interrupt(
                "kills_of_a_rank", "FSDPTrainer", wholes["FSDPTrainer"], index, signal.SIGKILL
            ),
            "sigterms": lambda index: self.interrupt("sigterms", "BasicTrainer", basic, index, signal.SIGTERM),
            "full_disks": lambda index: self.fill_disk(basic, index),
        }
        if self.asked["points"]:
            for name, whole in wholes.items():
                for what in ("kill", "ENOSPC"):
                    if time.monotonic() < self.end:
                        self.counted("points", lambda name=name, whole=whole, what=what: self.points(name, whole, what))  # type: ignore[misc]
        for what, act in phases.items():
            index = 0
            while not self.is_over(what):
                self.counted(what, lambda act=act, index=index: act(index))  # type: ignore[misc]
                index += 1
            print(f"{what}: {self.done.get(what, 0)}, {len(self.failures)} failures so far", flush=True)

    def whole(self, trainer: str) -> Path:
        overrides, num = TRAINERS[trainer]
        run_dir = self.directory / f"whole-{trainer}"
        status, _, err = complete(command(self.directory, run_dir, *overrides), self.directory / "output", num)
        assert status == 0, err
        return run_dir

    def interrupt(self, what: str, trainer: str, whole: Path, index: int, number: int) -> int:
        """A run that gets up to ten signals; returns how many."""
        overrides, num = TRAINERS[trainer]
        run_dir = self.directory / f"{what}-{index}"
        most = min(10, self.asked[what] - self.done.get(what, 0))
        times = interrupt_randomly(
            command(self.directory, run_dir, *overrides), run_dir, most, self.chance, num, 0.3 * num, number
        )
        assert_equal_runs(run_dir, whole)
        shutil.rmtree(run_dir)
        return times

    def points(self, trainer: str, whole: Path, what: str) -> int:
        """A run that fails at each point of a save; returns how many those are."""
        overrides, num = TRAINERS[trainer]
        points = tuple(point for point in POINTS if what == "kill" or point != "during_retention")
        run_dir = self.directory / f"points-{trainer}-{what}"
        fail_at_each_point(self.directory, run_dir, overrides, num, what, points)
        assert_equal_runs(run_dir, whole)
        return len(points)

    def notice_damage(self, whole: Path, what: str) -> int:
        checkpoint = checkpoints(whole)[-1]
        files = sorted(checkpoint.iterdir())
        shares = [self.asked[what] * (index + 1) // len(files) for index in range(len(files))]
        num = 0
        for path, before, after in zip(files, [0, *shares], shares, strict=False):
            for place in damaged_copies(path, what.removesuffix("s"), after - before, self.chance):
                assert damage(checkpoint), (path.name, what, place)
                num += 1
        assert damage(checkpoint) is None
        return num

    def fill_disk(self, whole: Path, index: int) -> int:
        size = sum(path.stat().st_size for path in checkpoints(whole)[-1].iterdir())
        with small_disk(self.directory / f"disk-{index}", 5 * size) as disk:
            num_free = int(size * self.chance.uniform(0.01, 2.4))
            fail_on_a_full_disk(self.directory, disk / f"filled-{index}", num_free, whole)
        return 1


def run_tests(what: Sequence[str]) -> tuple[int, str]:
    """How many tests of tests/faults passed, and what pytest says if one did not."""
    first, *rest = what
    command = [sys.executable, "-m", "pytest", "-q", f"tests/faults/{first}", *rest]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", result.stdout)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("E ", "FAILED"))]
    problem = "\n".join(lines) or f"pytest ended with status {result.returncode}"
    return int(passed[1]) if passed else 0, problem[:2000] if result.returncode else ""


def facts() -> Iterator[tuple[str, Any]]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    yield "commit", git("rev-parse", "HEAD")
    yield "changed_since", git("status", "--porcelain", "--untracked-files=no").splitlines()
    yield "begun", datetime.now().isoformat(timespec="seconds")
    yield "machine", f"{os.cpu_count()} x {platform.machine()}, {platform.system()} {platform.release()}"


def main(arguments: Sequence[str]) -> int:
    begun = time.monotonic()
    asked = {name: int(os.environ.get(f"SOAK_{name.upper()}", number)) for name, number in ASKED.items()}
    record = dict(facts())
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        soak = Soak(Path(directory), asked)
        soak.run()
    record |= {"seconds": round(time.monotonic() - begun), "asked": asked, "done": soak.done}
    record["failures"] = soak.failures
    if "--record" in arguments:
        for name, tests in TESTS.items():
            record[f"tests_of_{name}"], failed = run_tests(tests)
            record["failures"] += [failed] if failed else []
    text = json.dumps(record, indent=1)
    print(text)
    if "--record" in arguments:
        (ROOT / "benchmarks" / "results" / f"soak-{date.today().isoformat()}.json").write_text(text + "\n")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
