"""The checkpoints of other runs that a run builds on: found once, recorded, and pinned.

A run needs them again when it resumes; adapters need their base model for good. A pin is a file beside such a
checkpoint, and names the run. While that run's directory exists, the checkpoint is not removed. A pin holds a relative
path too, for runs that are moved together.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from engine.models.archives import (
    checkpoints,
    find_checkpoint,
    is_checkpoint,
    locate,
    missing_archive,
    with_base_models,
)
from engine.models.records import ModelStarts, Pin, parse_record
from engine.settings.schema import Settings
from utils import UserError, content_hash, write_atomically

RECORD = "started_from.json"  # in a run directory


Start = dict[str, str]  # the fields of records.ModelStart

# ---- The models of a run ----


def take_models(settings: Settings, run_dir: Path, checkpoint: Path | None) -> dict[str, str]:
    """Find the models of a run on disk, record them in its directory, and pin those of other runs.

    Args:
        checkpoint: to resume from. Its run's models are taken again, even if the same path has newer ones.

    Returns:
        key of the settings -> path of a checkpoint, for keys that name one.
    """
    given = {"model.archive": settings.model.archive, "critic.archive": settings.critic.archive}
    if settings.model.architecture is None:
        given["model.name_or_path"] = settings.model.name_or_path
    before = {} if checkpoint is None else read_starts(checkpoint.parent)
    record: dict[str, Start] = {}
    for key, path in given.items():
        taken = None if path is None else take_model(key, path, before.get(key))
        if path is not None and taken is not None:
            record[key] = {"given": path, "taken": str(taken)}
            if str(taken) != path:
                since = " since the start of the run" if key in before else ""
                print(f"{key}: {path} stands for {taken}{since}")
    write_starts(run_dir, record)
    if not settings.debug:  # it saves nothing to resume from
        pin_all([start["taken"] for start in record.values()], run_dir)
    return {key: start["taken"] for key, start in record.items()}


def take_model(key: str, given: str, before: Start | None) -> Path | None:
    """The checkpoint, or the policy.pt, that a path stands for; None for other models.

    Args:
        before: of the run to resume.
    """
    if before is not None and before["given"] == given:
        taken = Path(before["taken"])
        if not taken.exists():
            allowed = f"{key}=COPY resume_allow=[{key}]"
            raise missing_archive("resume", taken, f"the run started from it by {key}={given}", f"with {allowed}")
        return taken
    path = Path(given)
    is_archive = key != "model.name_or_path"
    if is_archive and not path.exists():
        raise missing_archive(key, locate(path) if path.is_symlink() else path)
    if path.is_file():
        path = path.resolve() if path.is_symlink() else path
        return locate(path.parent) / path.name if is_checkpoint(path.parent) else None
    if is_checkpoint(path):
        return locate(path)
    return find_checkpoint(path, key) if is_archive and checkpoints(path) else None


def with_models(settings: Settings, taken: dict[str, str]) -> Settings:
    """Settings with the models found by take_models(). Their source stays as the user wrote it."""
    values = {key.removeprefix("model."): path for key, path in taken.items() if key.startswith("model.")}
    critic = {"archive": taken.get("critic.archive", settings.critic.archive)}
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update=values),
            "critic": settings.critic.model_copy(update=critic),
        }
    )


def read_starts(run_dir: Path) -> dict[str, Start]:
    """Key -> model of a run; empty for a run without a record, or with a damaged one."""
    try:
        return parse_record(ModelStarts, (run_dir / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}


def write_starts(run_dir: Path, record: dict[str, Start]) -> None:
    path = run_dir / RECORD
    try:
        if record:
            write_atomically(path, json.dumps(record, indent=1).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        problem = f"local_run_dir: cannot write {path} ({error.strerror})"
        raise UserError("STORAGE", problem, "make room, or set local_run_dir elsewhere") from error


# ---- Pins ----


def pin_all(models: list[str], run_dir: Path) -> None:
    """Pin the checkpoints among models, and among the base models of their adapters, for a run."""
    for name in with_base_models(models):
        path = Path(name)
        checkpoint = locate(path.parent if path.is_file() else path)
        if not is_checkpoint(checkpoint) or checkpoint.parent == run_dir.resolve():
            continue
        try:
            user = str(run_dir.resolve())
            data = json.dumps({"run": user, "relative": os.path.relpath(user, checkpoint.parent)}, indent=1).encode()
            write_atomically(pins_of(checkpoint) / f"{content_hash([user])}.json", data)
        except OSError as error:
            reason = f"{checkpoint} cannot be marked as used ({error.strerror})"
            print(f"note: {reason}: keep it, as this run needs it to resume, and its adapters need it for good")
        if not checkpoint.exists():  # its run removed it just now
            raise missing_archive("model", checkpoint)


def pins_of(checkpoint: Path) -> Path:
    """The directory of a checkpoint's pins."""
    return checkpoint.with_name(f"{checkpoint.name}.used-by")


def users_of(checkpoint: Path) -> list[str]:
    """The existing run directories that pin a checkpoint. Removes the pins of deleted runs."""
    users = []
    for path in sorted(pins_of(checkpoint).glob("*.json")):
        try:
            pin = parse_record(Pin, path.read_bytes())
            run_dir, moved = pin["run"], checkpoint.parent / (pin.get("relative") or pin["run"])
            if not os.path.exists(run_dir) and moved.exists():
                run_dir = str(moved.resolve())
            os.stat(run_dir)
        except (FileNotFoundError, NotADirectoryError):
            with suppress(OSError):
                path.unlink()
        except (OSError, ValueError):  # in doubt, the checkpoint stays
            users.append(f"the run named in {path}")
        else:
            if run_dir not in users:  # a moved run that was resumed has two pins
                users.append(run_dir)
    if not users:
        with suppress(OSError):
            pins_of(checkpoint).rmdir()
    return users
