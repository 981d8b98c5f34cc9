"""Find and verify checkpoints on disk, and the base models of adapters."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.models.records import AdapterConfig, Manifest, parse_record
from utils import UserError, clipped

FORMAT = 1
OTHER_VERSION = "was written by"  # starts the description of a checkpoint by another version
STATE_FILE, MANIFEST_FILE = "training_state.json", "manifest.json"
WEIGHTS, OPTIMIZER, REFERENCE = "model", "optimizer", "reference"  # prefixes of file names
CRITIC, CRITIC_OPTIMIZER = "critic", "critic_optimizer"
MAX_LINKS = 40  # followed in a row, as by Linux


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def size_and_hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(
        (path for path in run_dir.glob("step-*") if path.name[5:].isdigit()), key=lambda path: int(path.name[5:])
    )


def locate(path: Path) -> Path:
    """The absolute path of a checkpoint, links followed up to a run's step-N.

    That may be a link itself, to another disk. It is the run's all the same.
    """
    for _ in range(MAX_LINKS):
        is_of_run = re.fullmatch(r"step-\d+", path.name) and any(
            os.path.lexists(path.parent / name) for name in ("LATEST", "config.yaml")
        )
        if is_of_run or not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def is_checkpoint(path: Path) -> bool:
    """Whether path is a checkpoint, intact or damaged."""
    return (path / STATE_FILE).exists() or (path / MANIFEST_FILE).exists()


def names_checkpoint(path: Path) -> bool:
    """Whether path is a checkpoint, a link, or a run with checkpoints.

    Reads no checkpoint.
    """
    return is_checkpoint(path) or path.is_symlink() or bool(checkpoints(path))


def find_checkpoint(path: Path, key: str = "resume") -> Path | None:
    """The checkpoint at path, or the newest intact one of a run.

    Args:
        key: for messages, the setting with this path.

    Returns:
        None if there is no checkpoint.

    Raises:
        UserError: CHECKPOINT, if it is damaged or by another version; for a run directory, if all are damaged.
    """
    if path.name == "LATEST" or is_checkpoint(path):
        candidates = [locate(path)]
    else:
        candidates = [path.resolve() / checkpoint.name for checkpoint in reversed(checkpoints(path))]
    problems: list[str] = []
    for checkpoint in candidates:
        problem = find_corruption(checkpoint)
        if problem is None:
            for line in problems:
                print(f"{key}: {line}; using {checkpoint}")
            return checkpoint
        if problem.startswith(OTHER_VERSION):  # a run from an older checkpoint would replace this one
            fix = "use the version that wrote it; nothing was deleted"
            raise UserError("CHECKPOINT", f"{key}: {checkpoint} {problem}", fix)
        problems.append(f"{checkpoint} is damaged ({problem})")
    if problems:
        raise UserError("CHECKPOINT", f"{key}: {'; '.join(problems)}", "give another one; nothing was deleted")
    return None


def find_corruption(checkpoint: Path) -> str | None:
    """Describe the first problem in a checkpoint's files; None if all are intact."""
    if checkpoint.is_symlink() and not checkpoint.exists():
        return f"it is a link to {os.readlink(checkpoint)}, which does not exist"
    try:
        text = (checkpoint / MANIFEST_FILE).read_bytes()
        manifest = json.loads(text)
        if (written := manifest["format"]) != FORMAT:
            version = "a newer" if isinstance(written, int) and written > FORMAT else "another"
            return f"{OTHER_VERSION} {version} version (checkpoint format {clipped(str(written))}, not {FORMAT})"
        parse_record(Manifest, text)
        if text != manifest_bytes(manifest):  # JSON may repeat a key
            return f"{MANIFEST_FILE} was changed"
        names = {name for name in (checkpoint.name, checkpoint.resolve().name) if name.startswith("step-")}
        if names - {manifest["checkpoint"]}:  # copies may have any other name
            return f"it was written as {manifest['checkpoint']}"
        for name, written in manifest["files"].items():
            if written["bytes"] != (checkpoint / name).stat().st_size:
                return f"{name} has {(checkpoint / name).stat().st_size:,} bytes, not {written['bytes']:,}"
            if written != size_and_hash(checkpoint / name):
                return f"{name} has another SHA-256"
        expected = {STATE_FILE, *(path.name for path in checkpoint.glob("*.safetensors"))}
        if unknown := sorted(expected - manifest["files"].keys()):
            return f"{MANIFEST_FILE} lacks {', '.join(unknown)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def with_base_models(names: Iterable[str | None]) -> Iterator[str]:
    """Each name, followed by the base model's if it is an adapter."""
    for name in names:
        if name is not None:
            yield name
            path = Path(name).expanduser()
            for adapter in (path, path / "LATEST"):
                with contextlib.suppress(OSError, ValueError):  # loading it raises the error
                    config = parse_record(AdapterConfig, (adapter / ADAPTER_CONFIG).read_bytes())
                    if base := config.get("base_model_name_or_path"):
                        yield str(find_base_model(adapter, base) or base)


def is_local(name: str) -> bool:
    """Whether a model's name is a path; no name on the hub looks so."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def missing_archive(key: str, path: Path, role: str = "", how: str = "") -> UserError:
    """An error for a model that does not exist.

    Args:
        role: who names it.
        how: a copy of it is given.
    """
    problem = f"{key}: {path} does not exist"
    problem += f", and {role}" if role else ""
    fix = (
        f"give it {how} (a copy or an export of it), or put it back" if role else "give a run, checkpoint or policy.pt"
    )
    if others := [checkpoint.name for checkpoint in checkpoints(path.parent)]:
        problem += f" ({', '.join(others)} beside it {'has' if len(others) == 1 else 'have'} other weights)"
    return UserError("CHECKPOINT", problem, fix)


def check_base_exists(adapter: Path, name: str, key: str, how: str) -> None:
    """Raise a UserError if the base model named by an adapter is a path that does not exist."""
    if is_local(name) and find_base_model(adapter, name) is None:
        role = f"{adapter / ADAPTER_CONFIG} names it as the base model of {adapter}"
        raise missing_archive(key, Path(name), role, how)


def find_base_model(adapter: Path, name: str) -> Path | None:
    """Find the directory of an adapter's base model.

    Tries the name as it stands, then relative to the adapter, then beside the adapter for a moved run.

    Returns:
        None if no directory exists: the model is on the hub, or deleted.
    """
    moved = [adapter.parent / "base"] if Path(name).name == "base" else []
    return next((path for path in (Path(name), adapter / name, *moved) if path.is_dir()), None)
