"""The run directory: names, resuming, branching."""

import os
import shutil
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from engine.models.archives import checkpoints, find_checkpoint, is_checkpoint, names_checkpoint
from engine.run.model_pins import take_models
from engine.run.resume_check import check_settings
from engine.run.run_files import locked, remove_temporaries, restore_links, rewind, unwritable, update_link
from engine.run.run_record import RECORD_FILE
from engine.settings.schema import Names, Settings
from engine.settings.secrets import public
from utils import UserError, local_dir, write_atomically

# The first line of config.yaml marks a directory as a run's. For a branch, it names the checkpoint of the other run.
RUN_MARK, BRANCH_MARK = "# The settings of a run of train.py", ", which went on from "


def open_run(settings: Settings, locks: ExitStack) -> tuple[Names, Path, Path | None, dict[str, str]]:
    """Derive unset names and open the run directory.

    Args:
        locks: until it is closed, no other process can open the directory.

    Returns:
        the names, the directory, the checkpoint to resume from, and the models of take_models().
    """
    names = derive_names(settings)
    if settings.resume not in (None, "auto") and not names_checkpoint(Path(settings.resume)):
        raise no_checkpoint(Path(settings.resume))  # before a directory is created
    settings = settings.named(**names)
    locks.enter_context(locked(Path(names["local_run_dir"])))
    run_dir, checkpoint = open_run_dir(settings)
    return names, run_dir, checkpoint, take_models(settings, run_dir, checkpoint)


def derive_names(settings: Settings, moment: str | None = None) -> Names:
    """exp_name, cache_dir and local_run_dir: as set, or derived.

    Args:
        moment: ends the name of a new directory; None: the time.
    """
    exp_name, run_dir = settings.exp_name, settings.local_run_dir
    if exp_name is None:
        datasets = "_".join(Path(name).name.split(".")[0] for name in settings.datasets)
        exp_name = f"{datasets}_{Path(settings.model.name_or_path).name}_{settings.loss.name}"
    root = local_dir(settings.local_dirs)
    if run_dir is None and settings.resume is not None:
        path = Path(settings.resume)
        names_one = path.name in ("LATEST", "BEST") or path.name.startswith("step-")
        run_dir = str(path.parent if names_one else path)
    elif run_dir is None:
        run_dir = str(root / f"{exp_name}_{moment or time_stamp()}")
    cache_dir = str(default_cache_dir(root)) if settings.cache_dir is None else settings.cache_dir
    return {"exp_name": exp_name, "cache_dir": cache_dir, "local_run_dir": run_dir}


def time_stamp() -> str:
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")


def sweep_directory(config: DictConfig, moment: str) -> Path:
    """The directory of the table and the page of a sweep.

    Args:
        config: of one of its jobs.
        moment: ends its name, if it has none.
    """
    return Path(config.sweep.dir or local_dir(config.local_dirs) / f"sweep_{moment}").absolute()


def default_cache_dir(root: Path) -> Path:
    """Where caches are kept by default, the same in every working directory.

    Args:
        root: of runs. A relative one holds the cache only if the user's cache directory is unwritable.
    """
    if root.is_absolute():
        return root / "cache"
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "preference-trainer"
    except RuntimeError:  # a user without a home
        return root / "cache"
    existing = next((path for path in (directory, *directory.parents) if path.exists()), root)
    is_usable = directory.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return directory if is_usable else root / "cache"


def crash_log(settings: Settings, rank: int) -> Path:
    return Path(settings.local_run_dir or ".", f"crash-rank{rank}.log" if rank else "crash.log")


# ---- Opening ----


def open_run_dir(settings: Settings) -> tuple[Path, Path | None]:
    """Find the checkpoint to resume from, check the run directory, and prepare it; nothing changes before all checks.

    Returns:
        the directory and the checkpoint; None to train from scratch.
    """
    run_dir = Path(settings.local_run_dir or "")
    checkpoint = find_requested(settings, run_dir)
    is_run, origin = read_run_marker(run_dir)
    if not is_run:
        check_is_empty(run_dir)
    if checkpoint is None and settings.resume == "auto":
        checkpoint = find_start(run_dir, origin)
    same = None if checkpoint is None else find_same(run_dir, checkpoint)
    in_place, checkpoint = same is not None, same or checkpoint
    if checkpoint is not None:
        check_settings(checkpoint, settings)
    if settings.resume != "auto":
        if checkpoint is not None and in_place:
            check_is_newest(run_dir, checkpoint)
        else:
            check_has_no_results(run_dir, restarts=checkpoint is not None and checkpoint == origin)
    try:
        if checkpoint is not None and in_place:
            prepare_to_resume(run_dir, checkpoint)
        else:
            prepare_to_start(run_dir)
            origin = checkpoint
        write_config(run_dir, settings, origin)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    return run_dir, checkpoint


# ---- What to resume ----


def find_requested(settings: Settings, run_dir: Path) -> Path | None:
    """The checkpoint of resume=; None without one for resume=null and resume=auto."""
    if settings.resume is None:
        return None
    source = run_dir if settings.resume == "auto" else Path(settings.resume)
    checkpoint = find_checkpoint(source)
    if checkpoint is None and settings.resume != "auto":
        raise no_checkpoint(source)
    return checkpoint


def find_same(run_dir: Path, checkpoint: Path) -> Path | None:
    """The checkpoint of a run with the same files, by its path there; None without one. Moved ones may be links."""
    intact = (path for path in checkpoints(run_dir.resolve()) if path.exists())
    return next((path for path in intact if path.samefile(checkpoint)), None)


def no_checkpoint(source: Path) -> UserError:
    return UserError("CHECKPOINT", f"resume: no checkpoint in {source}", "give a run directory or checkpoint")


def read_run_marker(run_dir: Path) -> tuple[bool, Path | None]:
    """Read the first line of config.yaml.

    Returns:
        whether a run wrote the directory (other programs have files of the same names), and the checkpoint of another
        run it branched from.
    """
    mark, path = "", run_dir / "config.yaml"
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            mark = file.readline().rstrip("\n")
    origin = mark.removeprefix(RUN_MARK + BRANCH_MARK)
    is_run = mark.startswith(RUN_MARK) or any(is_checkpoint(path) for path in checkpoints(run_dir))
    return is_run, None if origin == mark else Path(origin)


def find_start(run_dir: Path, origin: Path | None) -> Path | None:
    """The start of a run without checkpoints: the checkpoint it branched from, or None for from scratch."""
    latest = run_dir / "LATEST"
    if os.path.lexists(latest):
        kind = f"a link to {os.readlink(latest)}" if latest.is_symlink() else "a directory"
        problem = f"resume: {latest} is {kind}, but there is no checkpoint (step-N) in {run_dir}"
        raise UserError("CHECKPOINT", problem, "put it back, or remove LATEST to train from scratch")
    if origin is None:
        print(f"resume: there is no checkpoint in {run_dir}, so the run starts from scratch")
        return None
    checkpoint = find_checkpoint(origin)
    if checkpoint is None:
        problem = f"resume: {run_dir} has no checkpoint yet, and {origin}, its starting point, does not exist"
        raise UserError("CHECKPOINT", problem, "put that back, or set another local_run_dir")
    return checkpoint


# ---- Whether the directory may be written ----


def check_is_empty(run_dir: Path) -> None:
    """Raise a UserError for a directory with files. Hidden ones do not count."""
    others = [path.name for path in run_dir.iterdir() if not path.name.startswith(".")]
    if others:
        raise UserError(
            "STORAGE",
            f"local_run_dir: {run_dir} holds other files ({', '.join(sorted(others)[:3])}) and is no run",
            "set a new or empty directory",
        )


def check_is_newest(run_dir: Path, checkpoint: Path) -> None:
    """Raise a UserError if run_dir has later checkpoints: resuming in place would overwrite them."""
    if find_checkpoint(run_dir) != checkpoint:
        raise UserError(
            "CONFIG",
            f"resume: {run_dir} holds checkpoints after {checkpoint.name}",
            f"resume={run_dir} to continue from the last one, or another local_run_dir for a branch",
        )


def check_has_no_results(run_dir: Path, restarts: bool) -> None:
    """Raise a UserError if starting here would overwrite a run.

    Args:
        restarts: the same branch starts again. Its logs may go, but not its checkpoints.
    """
    has_saved = bool(checkpoints(run_dir)) or os.path.lexists(run_dir / "LATEST")
    if has_saved or ((run_dir / "metrics.jsonl").exists() and not restarts):
        raise UserError(
            "CONFIG", f"local_run_dir: {run_dir} holds a run", "resume=auto to continue it, or another local_run_dir"
        )


# ---- Preparing it ----


def prepare_to_resume(run_dir: Path, checkpoint: Path) -> None:
    """Continue a run in its own directory."""
    remove_temporaries(run_dir)
    restore_links(run_dir)
    update_link(checkpoint)  # a killed run may have saved the checkpoint but not the link


def prepare_to_start(run_dir: Path) -> None:
    """Remove leftovers of an earlier start."""
    remove_temporaries(run_dir)
    rewind(run_dir, {}, 0)
    (run_dir / RECORD_FILE).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "base", ignore_errors=True)  # the earlier start may have had another model


def write_config(run_dir: Path, settings: Settings, origin: Path | None) -> None:
    """Write config.yaml: the settings without secrets, below the run's mark."""
    mark = f"{RUN_MARK}\n" if origin is None else f"{RUN_MARK}{BRANCH_MARK}{origin}\n"
    written = OmegaConf.to_yaml(OmegaConf.create(public(settings.source)))
    write_atomically(run_dir / "config.yaml", (mark + written).encode())
