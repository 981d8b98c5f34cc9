"""Write checkpoints in the background.

Each rank writes its own files. Rank 0 then adds the rest, a manifest of all files, and renames the directory. So a
checkpoint is complete or absent, even after a crash.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from engine.models.archives import FORMAT, MANIFEST_FILE, checkpoints, find_corruption, manifest_bytes, size_and_hash
from engine.models.shards import ShardPermutations, barrier, full_tensor, rank_and_size
from engine.placement.process_group import post, rank_0_first, receive
from engine.run.fail_points import fail_point
from engine.run.model_pins import users_of
from engine.run.run_files import log_sizes, remove_checkpoint, update_link
from utils import UserError, apply_umask, as_os_errors, fsync, write_atomically

_saves = itertools.count()  # started by this process; the same number on all ranks

FileRecords = dict[str, Any]  # file name -> size and hash, as in the manifest


# ---- Contents ----


@dataclass
class Contents:
    """The files one rank writes, copied to CPU memory while training continues.

    Args:
        files: file name -> tensors.
        indices: name of an index file -> its content, on rank 0.
        num_bytes: written by all ranks together.
    """

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    indices: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0

    def add(
        self, kind: str, tensors: Mapping[str, Tensor], permutations: ShardPermutations, in_one: bool = False
    ) -> None:
        """Add this rank's share of tensors; shares have about equal bytes. All ranks call this together.

        Args:
            in_one: rank 0 writes all of them, in one file without a number.
        """
        rank, num_ranks = rank_and_size()
        if in_one:
            num_ranks = 1
        total = sum(tensor.nbytes for tensor in tensors.values())
        file_names, of_this_rank, bytes_before = {}, {}, 0
        for name, tensor in tensors.items():
            owner = min(num_ranks - 1, bytes_before * num_ranks // max(1, total))
            bytes_before += tensor.nbytes
            file_names[name] = _file_name(kind, owner, num_ranks)
            permutation = permutations.get(name) or permutations.get(name.rpartition(".")[0])
            full = full_tensor(tensor, permutation if tensor.ndim else None)
            if owner == rank:
                of_this_rank[name] = full.detach().to("cpu", copy=True).contiguous()
        if rank < num_ranks:
            # Even an empty file is written: the names of all files contain their number.
            self.files[_file_name(kind, rank, num_ranks)] = of_this_rank
        self.num_bytes += total
        if rank == 0 and num_ranks > 1:
            index = {"metadata": {"total_size": total}, "weight_map": file_names}
            self.indices[f"{kind}.safetensors.index.json"] = index


def _file_name(kind: str, rank: int, num_ranks: int) -> str:
    return f"{kind}.safetensors" if num_ranks == 1 else f"{kind}-{rank + 1:05}-of-{num_ranks:05}.safetensors"


# ---- Writing ----


class CheckpointWriter:
    """Writes the checkpoints of a run in the background, one at a time.

    Args:
        keep: how many checkpoints to keep, the newest; None for all.

    Attributes:
        notices: lines about older checkpoints, for the log.
    """

    def __init__(self, run_dir: Path, keep: int | None):
        self._run_dir, self._keep = run_dir, keep
        self.notices: list[str] = []
        self._kept: set[Path] = set()  # named in a notice
        self._executor = ThreadPoolExecutor(1)
        self._running: Future[Path] | None = None

    def start(
        self,
        num_examples: int,
        contents: Contents,
        write_rest: Callable[[Path], None],
        extra_bytes: int = 0,
        is_best: bool = False,
    ) -> None:
        """Start writing run_dir/step-<num_examples>. All ranks call this together, after finished(wait=True).

        Args:
            write_rest: writes the other files into a directory; called on rank 0.
            extra_bytes: approximate size of those files.
            is_best: BEST will link to the checkpoint.

        Raises:
            UserError: STORAGE; earlier checkpoints are untouched.
        """
        assert self._running is None
        target = self._run_dir / f"step-{num_examples}"
        temporary = _temporary(target)
        if rank_and_size()[0] == 0:
            with _as_storage_errors(target):
                _check_room(target, contents.num_bytes + extra_bytes)
                fail_point("mkdir")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        barrier()
        topic = f"save-{next(_saves)}"
        self._running = self._executor.submit(self._write, target, contents, write_rest, is_best, topic)

    def finished(self, wait: bool, together: bool = False) -> Path | None:
        """The checkpoint finished since the last call, if any.

        Args:
            wait: wait for a running save.
            together: wait until all ranks have finished. All of them call this.

        Raises:
            UserError: STORAGE if the save failed; earlier checkpoints are untouched.
        """
        with rank_0_first() if together else nullcontext():  # rank 0 finishes after all shards
            if self._running is None or not (wait or self._running.done()):
                return None
            running, self._running = self._running, None
            return running.result()

    def _write(
        self, target: Path, contents: Contents, write_rest: Callable[[Path], None], is_best: bool, topic: str
    ) -> Path:
        """Write this rank's files. Rank 0 also completes the checkpoint.

        Args:
            topic: of the messages that ranks exchange about this save.
        """
        with _as_storage_errors(target):
            if rank_and_size()[0] > 0:
                _write_and_report(_temporary(target), contents, topic)
                return target
            with _all_or_nothing(_temporary(target), topic):
                records = _write_and_collect(_temporary(target), contents, topic)
                self._complete(target, records, write_rest)
                _verify(target)
                update_link(target)
                if is_best:
                    update_link(target, "BEST")
        if self._keep is not None:
            self._remove_old(target, self._keep)
        return target

    def _complete(self, target: Path, records: FileRecords, write_rest: Callable[[Path], None]) -> None:
        """Write the other files and the manifest, and move the checkpoint to its final name."""
        temporary = _temporary(target)
        before = _files(temporary)
        write_rest(temporary)
        records |= _sync_and_hash(temporary, _files(temporary) - before)
        for name in log_sizes(self._run_dir):  # a resumed run continues them
            fsync(self._run_dir / name)
        fail_point("before_manifest")
        manifest = {"format": FORMAT, "checkpoint": target.name, "files": records}
        write_atomically(temporary / MANIFEST_FILE, manifest_bytes(manifest))
        fsync(temporary)
        fail_point("before_rename")
        if os.path.lexists(target):  # damaged, or from before a resume
            self._remove(target, target.name)
        temporary.rename(target)
        fsync(self._run_dir)
        fail_point("before_pointer")

    def _remove(self, path: Path, name: str) -> None:
        notice = remove_checkpoint(path)
        if notice is not None:
            self.notices.append(f"removed {self._run_dir / name}; {notice}")

    def _remove_old(self, target: Path, keep: int) -> None:
        """Remove all but the newest checkpoints, counted back from target. BEST and those of other runs stay."""
        # A resumed run may have damaged checkpoints after target. They do not count.
        saved, best = checkpoints(self._run_dir), (self._run_dir / "BEST").resolve()
        for old in saved[: saved.index(target) + 1][:-keep]:
            with suppress(OSError):
                if old.resolve() != best and not self._is_used(old):
                    old.rename(_temporary(old))
                    if users_of(old):  # pinned just now
                        _temporary(old).rename(old)
                        continue
                    fail_point("during_retention")
                    self._remove(_temporary(old), old.name)

    def _is_used(self, checkpoint: Path) -> bool:
        """Whether other runs build on a checkpoint; the first time, note which."""
        users = users_of(checkpoint)
        if users and checkpoint not in self._kept:
            self._kept.add(checkpoint)
            self.notices.append(f"kept {checkpoint} beyond keep_checkpoints, as {', '.join(users)} builds on it")
        return bool(users)


# ---- Ranks ----


def _write_and_report(temporary: Path, contents: Contents, topic: str) -> None:
    """Write the files of a rank other than 0, and report the result to rank 0."""
    try:
        post(topic, json.dumps({"files": _write_files(temporary, contents)}))
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}", "is_storage": isinstance(error, OSError)}
        post(topic, json.dumps(report))
        receive(topic, 0)  # sent after rank 0 has removed the files
        raise


def _write_and_collect(temporary: Path, contents: Contents, topic: str) -> FileRecords:
    """Write the files of rank 0, and collect the records of all ranks.

    Raises:
        OSError, RuntimeError: if another rank has failed.
    """
    try:
        records = _write_files(temporary, contents)
    finally:  # wait for the others even on failure: they must not write while files are being removed
        reports = [json.loads(receive(topic, rank)) for rank in range(1, rank_and_size()[1])]
    for rank, report in enumerate(reports, 1):
        if "error" in report:
            kind = OSError if report["is_storage"] else RuntimeError
            raise kind(f"rank {rank}: {report['error']}")
        records |= report["files"]
    return records


@contextmanager
def _all_or_nothing(temporary: Path, topic: str) -> Iterator[None]:
    """On an error inside a with block, remove the unfinished checkpoint. The other ranks learn of the end."""
    try:
        yield
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        post(topic, "over")


# ---- Files ----


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _files(directory: Path) -> set[str]:
    """The files in a directory and below: tokenizers put several chat templates into a subdirectory."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def _write_files(directory: Path, contents: Contents) -> FileRecords:
    """Write this rank's files."""
    with as_os_errors():
        for name, tensors in contents.files.items():
            save_file(tensors, directory / name, metadata={"format": "pt"})
            fail_point("half_file", directory / name)
        for name, index in contents.indices.items():
            (directory / name).write_text(json.dumps(index, indent=1))
        return _sync_and_hash(directory, (*contents.files, *contents.indices))


def _sync_and_hash(directory: Path, names: Iterable[str]) -> FileRecords:
    """Flush files to disk; returns their sizes and hashes."""
    fail_point("before_fsync")
    for name in names:
        apply_umask(directory / name)
        fsync(directory / name)
    return {name: size_and_hash(directory / name) for name in names}


def _verify(target: Path) -> None:
    """Raise an OSError if a checkpoint reads back differently."""
    problem = find_corruption(target)
    if problem:
        raise OSError(f"it reads back differently: {problem}")


def _check_room(target: Path, num_bytes: int) -> None:
    needed, free = num_bytes * 1.01 + 2**20, shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")


@contextmanager
def _as_storage_errors(target: Path) -> Iterator[None]:
    """Turn OSErrors inside a with block into STORAGE."""
    try:
        with as_os_errors():
            yield
    except OSError as error:
        raise UserError(
            "STORAGE",
            f"the checkpoint {target} could not be written ({error})",
            "make room or set local_run_dir elsewhere, then continue with resume=; earlier checkpoints are intact",
        ) from error
