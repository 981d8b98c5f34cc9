"""Online training killed in any phase of an iteration resumes, and gives the result of an uninterrupted run."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import engine.models.group_sampling
import trainers
from engine.run.sampler import Group, Sampler
from engine.step.microbatches import MicrobatchRunner
from rewards import REWARDS
from tests.faults.processes import assert_equal_runs, command, complete, rows

# Three iterations of four steps each, in two passes. A checkpoint after each step.
ITERATIONS = (
    "n_examples=48", "save_every=4", "eval_every=1000", "do_first_eval=false", "sample_during_eval=false",
    "rollout.prompts=8", "rollout.epochs=2", "rollout.num_responses=3", "rewards=[parity]",
)  # fmt: skip
# Phase -> what is called in it, and the call at which the process is killed.
PHASES: dict[str, tuple[Any, str, int]] = {
    "generate": (engine.models.group_sampling, "_choose", 4),  # the fourth token
    "reward": (REWARDS, "parity", 5),
    "logps": (MicrobatchRunner, "sample_logps", 2),
    "training": (trainers.BasicTrainer, "update", 2),
}
# In this order one run meets all of them: some inside an iteration, some at the start of the next.
KILLS = ("reward", "logps", "training", "half_file#5", "generate", "training", "before_rename#2", "logps", "reward")


def parity(prompt: str, response: str, row: Any) -> float | None:
    """A reward with many ties, and none for some responses."""
    return None if response.endswith("e") else float(len(response) % 2)


def killing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """A function that kills the process within one of its calls."""
    num_calls = 0

    def call_or_kill(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        found = function(*arguments, **keywords)
        if num_calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return call_or_kill


def with_ends(sample: Callable[..., list[Group]]) -> Callable[..., list[Group]]:
    """Samples of which a third counts as truncated. No model from scratch ends its responses."""

    def sample_with_ends(*arguments: Any) -> list[Group]:
        groups = sample(*arguments)
        return [[replace(each, is_truncated=int(each.tokens[0]) % 3 == 0) for each in group] for group in groups]

    return sample_with_ends


def prepare(phase: str | None = None) -> None:
    """Set up a process, that a phase kills."""
    REWARDS["parity"] = parity
    Sampler.sample = with_ends(Sampler.sample)  # type: ignore[method-assign]
    if phase is None:
        return
    place, name, call = PHASES[phase]
    if isinstance(place, dict):
        place[name] = killing(place[name], call)
    else:
        setattr(place, name, killing(getattr(place, name), call))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("loss=grpo",),
        ("loss=grpo", "rollout.truncated=mask", "rollout.max_resamples=1"),
        ("loss=xpo", "rollout.num_responses=2"),
    ],
    ids=["grpo", "left_out", "xpo"],
)
def test_kills_in_every_phase(inputs: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    overrides = (*(each for each in ITERATIONS if each.partition("=")[0] not in str(settings)), *settings)
    status, _, err = complete(command(inputs, tmp_path / "whole", *overrides), tmp_path / "output", prepare=prepare)
    assert status == 0, err
    left_out = [row["rollout/left_out"] for row in rows(tmp_path / "whole") if "rollout/left_out" in row]
    assert len(left_out) == 3 and any(left_out)
    killed = tmp_path / "killed"
    for kill in KILLS:
        fault, setup = (f"{kill}=kill", prepare) if "#" in kill else ("", partial(prepare, kill))
        status, _, err = complete(command(inputs, killed, *overrides), tmp_path / "output", fault=fault, prepare=setup)
        assert status == -signal.SIGKILL, (kill, status, err)
    status, _, err = complete(command(inputs, killed, *overrides), tmp_path / "output", prepare=prepare)
    assert status == 0, err
    assert_equal_runs(killed, tmp_path / "whole")
