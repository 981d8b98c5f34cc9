"""A run killed at any moment and resumed gives the result of an uninterrupted run."""

import errno
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.processes import (
    POINTS,
    TWO_RANK_TRAINERS,
    assert_checkpoints_intact,
    assert_equal_runs,
    command,
    complete,
    fail_at_each_point,
    interrupt_randomly,
    saved,
    temporaries,
)
from tests.quick import slow_except

FSDP = TWO_RANK_TRAINERS["FSDPTrainer"]


@pytest.mark.parametrize("num_kills", slow_except((2, 4, 10), 2))
def test_random_kills(inputs: Path, uninterrupted_run: Path, num_kills: int) -> None:
    rng, num_killed, num_runs = random.Random(num_kills), 0, 0
    while num_killed < num_kills:
        run_dir = uninterrupted_run.parent / f"killed-{num_kills}-{num_runs}"
        num_killed += interrupt_randomly(command(inputs, run_dir), run_dir, num_kills - num_killed, rng)
        assert_equal_runs(run_dir, uninterrupted_run)
        num_runs += 1


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, 3])
def test_kills_of_one_rank(inputs: Path, uninterrupted_run_on_two: Path, num_kills: int) -> None:
    run_dir, rng = uninterrupted_run_on_two.parent / f"rank-killed-{num_kills}", random.Random(1)
    assert interrupt_randomly(command(inputs, run_dir, *FSDP), run_dir, num_kills, rng, num_ranks=2, seconds=0.6)
    assert_equal_runs(run_dir, uninterrupted_run_on_two)


SOME_POINTS = ("half_file", "before_manifest", "before_pointer")
POINTS_WITH_WRITES = tuple(point for point in POINTS if point != "during_retention")


@pytest.mark.parametrize(
    "points", [SOME_POINTS, pytest.param(tuple(POINTS), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_kill_at_each_point_of_a_save(inputs: Path, uninterrupted_run: Path, points: tuple[str, ...]) -> None:
    run_dir = uninterrupted_run.parent / f"{len(points)}-points"
    fail_at_each_point(inputs, run_dir, (), 1, "kill", points)
    assert_equal_runs(run_dir, uninterrupted_run)


@pytest.mark.parametrize(
    "points", [SOME_POINTS, pytest.param(POINTS_WITH_WRITES, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_no_room_at_each_point_of_a_save(inputs: Path, uninterrupted_run: Path, points: tuple[str, ...]) -> None:
    run_dir = uninterrupted_run.parent / f"no-room-{len(points)}"
    fail_at_each_point(inputs, run_dir, (), 1, errno.errorcode[errno.ENOSPC], points)
    assert_equal_runs(run_dir, uninterrupted_run)


# Between the parts of both ranks. One process is killed at more points above.
@pytest.mark.parametrize(
    "points",
    [("before_manifest",), pytest.param(tuple(POINTS), marks=pytest.mark.slow)],
)
def test_a_kill_at_points_of_a_save_on_two_ranks(
    inputs: Path, uninterrupted_run_on_two: Path, points: tuple[str, ...]
) -> None:
    run_dir = uninterrupted_run_on_two.parent / f"{len(points)}-points-on-two"
    fail_at_each_point(inputs, run_dir, FSDP, 2, "kill", points)
    assert_equal_runs(run_dir, uninterrupted_run_on_two)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["half_file#3@0=ENOSPC", "before_fsync#3@1=ENOSPC"])
def test_no_room_for_the_part_of_one_rank(inputs: Path, uninterrupted_run_on_two: Path, fault: str) -> None:
    """All ranks learn of it, and remove their parts."""
    run_dir = uninterrupted_run_on_two.parent / f"no-room-{fault.partition('#')[0]}"
    begun = time.monotonic()
    status, _, err = complete(command(inputs, run_dir, *FSDP), inputs / "output", 2, fault=fault)
    assert time.monotonic() - begun < 60
    assert status == 6 and err.startswith("error[STORAGE] rank "), (status, err)
    assert "[Errno 28] No space left on device)" in err, err
    assert temporaries(run_dir) == []
    assert_checkpoints_intact(run_dir)
    assert complete(command(inputs, run_dir, *FSDP), inputs / "output", 2)[0] == 0
    assert_equal_runs(run_dir, uninterrupted_run_on_two)


@pytest.mark.slow
def test_a_kill_after_the_last_save(inputs: Path, uninterrupted_run: Path) -> None:
    """The resumed run only cleans up."""
    for fault in ("before_pointer#15=kill", "during_retention#13=kill"):
        run_dir = uninterrupted_run.parent / fault.partition("#")[0]
        assert complete(command(inputs, run_dir), inputs / "output", fault=fault)[0] == -signal.SIGKILL
        assert saved(run_dir)[-1] == "step-60"
        assert complete(command(inputs, run_dir), inputs / "output")[0] == 0
        assert_equal_runs(run_dir, uninterrupted_run)
