"""Tell how to resume a stopped run."""

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from engine.models.archives import checkpoints
from engine.placement.world import world_from_environment
from engine.settings.hydra_guard import split_arguments
from engine.settings.schema import Settings
from engine.settings.secrets import redact
from engine.settings.sweeps import quoted_for_hydra


def stop_notice(number: int, settings: Settings, job: Sequence[str] | None = None) -> str:
    """One line for a run stopped by a signal: what to do next.

    Args:
        settings: with names.
        job: the overrides of a job of a sweep; None for a single run, or for the job that Hydra runs now.
    """
    name, run_dir = signal.Signals(number).name, settings.local_run_dir or ""
    if settings.debug:
        return f"stopped by {name}; debug=true saves no checkpoints"
    if not checkpoints(Path(run_dir)):
        return f"stopped by {name} before the first checkpoint; repeat the command"
    if world_from_environment() is not None:  # the command is torchrun's or srun's
        return f"stopped by {name}; to resume, repeat the command with {shlex.join(resuming(run_dir))}"
    return redact(f"stopped by {name}; to resume: {resume_command(run_dir, job)}", settings.source)


def resume_command(run_dir: str, job: Sequence[str] | None = None) -> str:
    """The command of this process, or of this job of a sweep, with the overrides that resume it."""
    options, overrides = split_arguments(sys.argv[1:])
    if job is None and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        job = HydraConfig.get().overrides.task
    if job is not None:
        options = [option for option in options if option not in ("-m", "--multirun")]
        overrides = [override for override in job if "hydra.mode=" not in override]
    kept = [
        override for override in overrides if override.partition("=")[0].lstrip("+") not in ("local_run_dir", "resume")
    ]
    return shlex.join([sys.orig_argv[0], sys.argv[0], *options, *kept, *resuming(run_dir)])


def resuming(run_dir: str) -> list[str]:
    """Overrides that resume the run in a directory."""
    return [f"local_run_dir={quoted_for_hydra(run_dir)}", "resume=auto"]
