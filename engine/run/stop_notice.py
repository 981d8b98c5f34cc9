"""Tell how to resume a stopped run."""

import shlex
import signal
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from engine.models.archives import checkpoints
from engine.placement.world import world_from_environment
from engine.settings.hydra_guard import split_arguments
from engine.settings.schema import Settings
from engine.settings.secrets import redact


def stop_notice(number: int, settings: Settings) -> str:
    """One line for a run stopped by a signal: what to do next.

    Args:
        settings: with names.
    """
    name, run_dir = signal.Signals(number).name, settings.local_run_dir or ""
    if settings.debug:
        return f"stopped by {name}; debug=true saves no checkpoints"
    if not checkpoints(Path(run_dir)):
        return f"stopped by {name} before the first checkpoint; repeat the command"
    if world_from_environment() is not None:  # the command is torchrun's or srun's
        return f"stopped by {name}; to resume, repeat the command with {shlex.join(resuming(run_dir))}"
    return redact(f"stopped by {name}; to resume: {resume_command(run_dir)}", settings.source)


def resume_command(run_dir: str) -> str:
    """The command of this process, or of this job of a sweep, with the overrides that resume it."""
    options, overrides = split_arguments(sys.argv[1:])
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        options = [option for option in options if option not in ("-m", "--multirun")]
        overrides = [override for override in HydraConfig.get().overrides.task if "hydra.mode=" not in override]
    kept = [
        override for override in overrides if override.partition("=")[0].lstrip("+") not in ("local_run_dir", "resume")
    ]
    return shlex.join([sys.orig_argv[0], sys.argv[0], *options, *kept, *resuming(run_dir)])


def resuming(run_dir: str) -> list[str]:
    """Overrides that resume the run in a directory."""
    is_plain = run_dir.isascii() and all(char.isalnum() or char in "/._-+" for char in run_dir)
    written = run_dir if is_plain else "'" + run_dir.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return [f"local_run_dir={written}", "resume=auto"]
