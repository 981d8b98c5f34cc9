"""A run that is killed, at any moment, and started again comes to the end that it would have come to anyway."""

import errno
import random
import signal
import time
from pathlib import Path

from tests.faults.processes import (
    POINTS,
    TWO,
    assert_equal_runs,
    assert_whole,
    command,
    complete,
    fail_at_each_point,
    interrupt_randomly,
    saved,
    temporaries,
)

FSDP = TWO["FSDPTrainer"]


def test_ten_kills(inputs: Path, whole: Path) -> None:
    chance, num_killed, num_runs = random.Random(0), 0, 0
    while num_killed < 10:
        run_dir = whole.parent / f"killed-{num_runs}"
        num_killed += interrupt_randomly(command(inputs, run_dir), run_dir, 10 - num_killed, chance)
        assert_equal_runs(run_dir, whole)
        num_runs += 1


def test_kills_of_a_rank(inputs: Path, whole_on_two: Path) -> None:
    run_dir = whole_on_two.parent / "rank-killed"
    assert interrupt_randomly(command(inputs, run_dir, *FSDP), run_dir, 3, random.Random(1), num=2, seconds=0.6)
    assert_equal_runs(run_dir, whole_on_two)


def test_a_kill_at_each_point_of_a_save(inputs: Path, whole: Path) -> None:
    fail_at_each_point(inputs, whole.parent / "points", (), 1, "kill", tuple(POINTS))
    assert_equal_runs(whole.parent / "points", whole)


def test_no_room_at_each_point_of_a_save(inputs: Path, whole: Path) -> None:
    points = tuple(point for point in POINTS if point != "during_retention")  # which needs none
    fail_at_each_point(inputs, whole.parent / "no-room", (), 1, errno.errorcode[errno.ENOSPC], points)
    assert_equal_runs(whole.parent / "no-room", whole)


def test_a_kill_at_each_point_of_a_save_on_two_ranks(inputs: Path, whole_on_two: Path) -> None:
    run_dir = whole_on_two.parent / "points-on-two"
    fail_at_each_point(inputs, run_dir, FSDP, 2, "kill", tuple(POINTS))
    assert_equal_runs(run_dir, whole_on_two)


def test_no_room_for_the_part_of_a_rank(inputs: Path, whole_on_two: Path) -> None:
    """The others are told, whichever it is, and nothing is left of the parts of all."""
    run_dir = whole_on_two.parent / "no-room-for-a-part"
    for fault in ("half_file#3@0=ENOSPC", "before_fsync#3@1=ENOSPC"):
        begun = time.monotonic()
        status, _, err = complete(command(inputs, run_dir, *FSDP), inputs / "output", 2, fault=fault)
        assert time.monotonic() - begun < 60, fault
        assert status == 6 and err.startswith("error[STORAGE] rank "), (fault, status, err)
        assert "[Errno 28] No space left on device)" in err, (fault, err)
        assert temporaries(run_dir) == [], fault
        assert_whole(run_dir)
    assert complete(command(inputs, run_dir, *FSDP), inputs / "output", 2)[0] == 0
    assert_equal_runs(run_dir, whole_on_two)


def test_a_kill_after_the_last_save(inputs: Path, whole: Path) -> None:
    """There is nothing left to train, but to tidy up."""
    for fault in ("before_pointer#15=kill", "during_retention#13=kill"):
        run_dir = whole.parent / fault.partition("#")[0]
        assert complete(command(inputs, run_dir), inputs / "output", fault=fault)[0] == -signal.SIGKILL
        assert saved(run_dir)[-1] == "step-60"
        assert complete(command(inputs, run_dir), inputs / "output")[0] == 0
        assert_equal_runs(run_dir, whole)
