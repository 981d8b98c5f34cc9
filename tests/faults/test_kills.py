"""A run that is killed, at any moment, and started again comes to the end that it would have come to anyway."""

import errno
import random
import signal
from pathlib import Path

from tests.faults.processes import TWO, assert_equal_runs, assert_whole, command, complete, kill_randomly, saved

# Where a save may fail, with which pass of the point is of the second save of a process: of one process, of two.
POINTS = {
    "mkdir": (2, 2),
    "half_file": (3, 3),
    "before_fsync": (3, 3),
    "before_manifest": (2, 2),
    "before_rename": (2, 2),
    "before_pointer": (2, 2),
    "during_retention": (2, 2),
}
FSDP = TWO["FSDPTrainer"]


def test_ten_kills(inputs: Path, whole: Path) -> None:
    chance, num_killed, num_runs = random.Random(0), 0, 0
    while num_killed < 10:
        run_dir = whole.parent / f"killed-{num_runs}"
        num_killed += kill_randomly(command(inputs, run_dir), run_dir, 10 - num_killed, chance)
        assert_equal_runs(run_dir, whole)
        num_runs += 1


def test_kills_of_a_rank(inputs: Path, whole_on_two: Path) -> None:
    run_dir = whole_on_two.parent / "rank-killed"
    assert kill_randomly(command(inputs, run_dir, *FSDP), run_dir, 3, random.Random(1), num=2, seconds=0.6)
    assert_equal_runs(run_dir, whole_on_two)


def fail_at_each_point(
    inputs: Path, run_dir: Path, overrides: tuple[str, ...], num: int, what: str, points: tuple[str, ...]
) -> None:
    """A run that fails at each point of its second save, and goes on from the first."""
    output = run_dir.with_name(f"{run_dir.name}-output")
    for point in points:
        before = saved(run_dir)
        fault = f"{point}#{POINTS[point][num - 1]}={'half' if (point, what) == ('half_file', 'kill') else what}"
        status, _, err = complete(command(inputs, run_dir, *overrides), output, num, fault=fault)
        assert saved(run_dir)[-1:] != before[-1:], fault  # the first was saved
        assert_whole(run_dir)
        if what == "kill":
            assert status == -signal.SIGKILL, (fault, err)
        else:
            assert status == 6 and err.startswith("error[STORAGE] the checkpoint"), (fault, status, err)
            assert not list(run_dir.glob(".step-*")), fault
    status, _, err = complete(command(inputs, run_dir, *overrides), output, num)
    assert status == 0, err


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
