"""Files of a run directory: links, logs, the lock, temporaries."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.models.archives import MANIFEST_FILE, checkpoints, find_corruption, is_checkpoint
from engine.run.model_pins import RECORD
from engine.run.run_record import RECORD_FILE
from utils import UserError, fsync

# Unfinished checkpoints, links and base models of adapters, and the temporaries of write_atomically().
TEMPORARY = re.compile(
    rf"\.(step-\d+|LATEST|BEST|base|(config\.yaml|{re.escape(RECORD)}|run\.json|report\.html|nonfinite-\d+\.json)\.\d+)\.tmp"
)
LOG_FILES = ("metrics.jsonl", "samples.jsonl", "histograms.jsonl", "warnings.jsonl", "win_rates.jsonl")
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # of a disk without links
EARLY_FILES = ("config.yaml", RECORD, RECORD_FILE, "base")  # of a run that has not begun to train


def update_link(target: Path, name: str = "LATEST") -> None:
    """Point a link of a run, LATEST or BEST, to its checkpoint target.

    A mounted bucket may take no links. A run resumes without.
    """
    link = target.with_name(f".{name}.tmp")
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(target.name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        print(f"{target.parent} takes no links: {name} is {target.name}", flush=True)
        return
    link.replace(target.with_name(name))
    fsync(target.parent)


def restore_links(run_dir: Path) -> None:
    """Turn LATEST and BEST back into links. Copying a run may have replaced them by directories.

    Raises:
        UserError: STORAGE if such a directory is no copy of a checkpoint.
    """
    for copied in (run_dir / "LATEST", run_dir / "BEST"):
        if copied.is_symlink() or not copied.exists():
            continue
        intact = [path for path in checkpoints(run_dir) if find_corruption(path) is None]
        manifest = (copied / MANIFEST_FILE).read_bytes() if is_checkpoint(copied) else b""
        original = next((path for path in intact if (path / MANIFEST_FILE).read_bytes() == manifest), None)
        if original is None:
            problem = f"local_run_dir: {copied} should be a link, and is no copy of a checkpoint in {run_dir}"
            raise UserError("STORAGE", problem, "move it elsewhere")
        shutil.rmtree(copied)
        update_link(original, copied.name)


def remove_checkpoint(path: Path) -> str | None:
    """Remove a checkpoint; of a link, the link alone.

    Returns:
        a notice about the target of a link, as it stays; None without one.
    """
    if not path.is_symlink():
        shutil.rmtree(path)
        return None
    target = os.readlink(path)
    path.unlink()
    return f"its files in {target} stay, as it was a link" if os.path.exists(path.parent / target) else None


def log_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes in each log of a run."""
    return {name: path.stat().st_size for name in LOG_FILES if (path := run_dir / name).exists()}


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make and lock a run directory inside a with block, so no other process writes to it.

    A directory made here is removed if the block fails before training.

    Raises:
        UserError: STORAGE if another process holds the lock, or the directory is unwritable.
    """
    descriptor, made = _open_locked(run_dir)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # stops at the first one with other files
            if run_dir in made and is_untrained(run_dir):
                remove_temporaries(run_dir)
                for name in EARLY_FILES:
                    path = run_dir / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                for directory in made:
                    directory.rmdir()
        raise
    finally:
        os.close(descriptor)


def _open_locked(run_dir: Path) -> tuple[int, list[Path]]:
    """Make, open and lock a run directory.

    Returns:
        its file descriptor, and the directories that did not exist, the lowest first.
    """
    for attempts_left in reversed(range(10)):
        try:
            made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(run_dir, os.O_RDONLY)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempts_left:
                continue  # another run failed, and removed it just now
            raise unwritable(run_dir, error) from error
        try:
            _lock(run_dir, descriptor)
            if run_dir.exists() and os.path.samestat(os.fstat(descriptor), run_dir.stat()):
                return descriptor, made
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a removed directory
    raise unwritable(run_dir, FileNotFoundError(errno.ENOENT, "it is removed again and again"))


def _lock(run_dir: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            "STORAGE", f"local_run_dir: {run_dir} is in use by another process", "wait for it, or set another one"
        ) from error
    except OSError as error:  # a file system without locks
        print(f"warning: {run_dir} cannot be locked ({error.strerror}): nothing keeps a second run from writing there")


def is_untrained(run_dir: Path) -> bool:
    """Whether a run directory holds only files written before training: no log, no checkpoint. Hidden ones are free."""
    return all(path.name in EARLY_FILES or path.name.startswith(".") for path in run_dir.iterdir())


def unwritable(run_dir: Path, error: OSError) -> UserError:
    problem = f"local_run_dir: cannot write to {run_dir} ({error.strerror})"
    return UserError("STORAGE", problem, "set local_run_dir elsewhere")


def remove_temporaries(run_dir: Path) -> None:
    """Remove unfinished files of a killed run, and nothing else."""
    for path in run_dir.glob(".*.tmp"):
        if not TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def rewind(run_dir: Path, sizes: dict[str, int], num_examples: int) -> None:
    """Truncate logs to their sizes at a checkpoint, so no row is logged twice.

    A log with other rows there is left whole, with a notice.

    Args:
        num_examples: trained on before the checkpoint.
    """
    for name, size in log_sizes(run_dir).items():
        size_then = sizes.get(name, 0)
        if size <= size_then:  # to a larger size would add zeros
            continue
        if _are_later(run_dir / name, size_then, num_examples):
            os.truncate(run_dir / name, size_then)
        else:
            print(f"{run_dir / name}: rows after byte {size_then:,} stay, as not all are later than the checkpoint")


def _are_later(log: Path, start: int, num_examples: int) -> bool:
    """Whether the rows of a log from byte start on were written after num_examples examples."""
    with open(log, "rb") as file:
        if start:
            file.seek(start - 1)
            if file.read(1) != b"\n":
                return False
        for line in file:
            try:
                row = json.loads(line)
                counter = row.get("counters/examples", row.get("examples"))
            except (ValueError, AttributeError):  # a row torn by a crash
                continue
            if not isinstance(counter, int | float) or counter < num_examples:
                return False
    return True
