"""Checkpoints: directories that transformers loads, with the training state beside the weights, never a pickle.

step-<examples>/ holds the model and tokenizer in Hugging Face form, the optimizer's state by the names of parameters,
training_state.json, and manifest.json with the size and SHA-256 of every file. Several processes write a file each, of
whole tensors, so a checkpoint does not depend on how many there were. LATEST is a link to the newest, BEST to the one
with the best evaluation. A checkpoint of adapters has them in peft's form, and no other weights.

A checkpoint is written in the background, under another name, and renamed when all of it is on disk; older ones are
removed once it was read back. Before one is used, every file is compared with the manifest.
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from engine.distributed import post, rank_0_first, receive
from engine.faults import fail_point
from engine.optimizers import restore_kinds
from engine.secrets import comparable
from engine.sharding import Orders, barrier, fill, full_tensor, rank_and_size
from utils import UserError, as_os_errors, write_atomically

FORMAT = 1
STATE_FILE, MANIFEST_FILE = "training_state.json", "manifest.json"
WEIGHTS, OPTIMIZER = "model", "optimizer"  # beginnings of the names of files
# What is not whole yet: checkpoints, links, the base model of adapters, and what write_atomically() writes.
TEMPORARY = re.compile(r"\.(step-\d+|LATEST|BEST|base|(config\.yaml|nonfinite-\d+\.json)\.\d+)\.tmp")
LOG_FILES = ("metrics.jsonl", "samples.jsonl")
# Keys that may change when a run is resumed: they do not change what is learned.
FREE_ON_RESUME = {
    "exp_name", "local_dirs", "local_run_dir", "cache_dir", "data_dir", "resume", "debug", "wandb", "tensorboard",
    "minimum_log_interval_secs", "save_every", "keep_checkpoints", "keep_best", "compile", "do_first_eval",
    "eval_every",
    "eval_batch_size", "n_eval_examples", "sample_during_eval", "n_eval_model_samples", "resume_allow",
    "on_nonfinite", "max_nonfinite", "plan", "plan_hardware", "trainer", "num_processes", "tensor_parallel_size",
    "tensor_parallel", "fsdp", "collective_timeout",
}  # fmt: skip
_saves = itertools.count()  # that this process has begun, as all have


# ---- Writing ----


@dataclass
class Contents:
    """What one process writes of a checkpoint, copied to CPU memory so that training can go on."""

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    indices: dict[str, Any] = field(default_factory=dict)  # of which file has which tensor, by file name
    num_bytes: int = 0  # of what all processes write

    def add(self, kind: str, tensors: Mapping[str, Tensor], orders: Orders, in_one: bool = False) -> None:
        """Add the tensors that fall to this process, about as many bytes as to every other. All call this together.

        Args:
            in_one: they all fall to the first process, whose file has no number.
        """
        rank, num_ranks = rank_and_size()
        if in_one:
            num_ranks = 1
        total = sum(tensor.nbytes for tensor in tensors.values())
        names, own, before = {}, {}, 0
        for name, tensor in tensors.items():
            owner = min(num_ranks - 1, before * num_ranks // max(1, total))
            before += tensor.nbytes
            names[name] = _file_name(kind, owner, num_ranks)
            order = orders.get(name) or orders.get(name.rpartition(".")[0])
            whole = full_tensor(tensor, order if tensor.ndim else None)
            if owner == rank:
                own[name] = whole.detach().to("cpu", copy=True).contiguous()
        if rank < num_ranks:
            self.files[_file_name(kind, rank, num_ranks)] = own  # even an empty one: their number is part of the names
        self.num_bytes += total
        if rank == 0 and num_ranks > 1:
            self.indices[f"{kind}.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": names}


def _file_name(kind: str, rank: int, num_ranks: int) -> str:
    return f"{kind}.safetensors" if num_ranks == 1 else f"{kind}-{rank + 1:05}-of-{num_ranks:05}.safetensors"


class CheckpointWriter:
    """Writes the checkpoints of a run in the background, one at a time.

    Args:
        keep: how many to keep, the newest; None for all.
    """

    def __init__(self, run_dir: Path, keep: int | None):
        self._run_dir, self._keep = run_dir, keep
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
        """Begin to write run_dir/step-<num_examples>. All processes call this together, after finished(wait=True).

        Args:
            write_rest: writes the other files of the checkpoint into a directory; called by the first process.
            extra_bytes: that write_rest writes, about.
            is_best: BEST is to be a link to it.

        Raises:
            UserError: STORAGE; what was saved before is untouched.
        """
        assert self._running is None
        target = self._run_dir / f"step-{num_examples}"
        temporary = _temporary(target)
        if rank_and_size()[0] == 0:
            with _storing(target):
                _check_room(target, contents.num_bytes + extra_bytes)
                fail_point("mkdir")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        barrier()
        parts = f"save-{next(_saves)}"
        self._running = self._executor.submit(self._write, target, contents, write_rest, is_best, parts)

    def finished(self, wait: bool, together: bool = False) -> Path | None:
        """The checkpoint that has been written since this was last called, if there is one.

        Args:
            together: wait until it is whole, whichever process writes how long; all of them call this.

        Raises:
            UserError: STORAGE, if it could not be; the one before is untouched.
        """
        with rank_0_first() if together else nullcontext():  # it has all of it when it has its own part
            if self._running is None or not (wait or self._running.done()):
                return None
            running, self._running = self._running, None
            return running.result()

    def _write(
        self, target: Path, contents: Contents, write_rest: Callable[[Path], None], is_best: bool, parts: str
    ) -> Path:
        """Write what falls to this process; the first one makes a checkpoint of the parts of all.

        Args:
            parts: the topic of what the processes tell each other of them.
        """
        rank, num_ranks = rank_and_size()
        temporary = _temporary(target)
        if rank > 0:
            with _storing(target):
                try:
                    post(parts, json.dumps({"files": _write_part(temporary, contents)}))
                except Exception as error:
                    told = {"error": f"{type(error).__name__}: {error}", "is_storage": isinstance(error, OSError)}
                    post(parts, json.dumps(told))
                    receive(parts, 0)  # when all of it is removed
                    raise
            return target
        with _storing(target), _or_nothing(temporary, parts):
            try:
                described = _write_part(temporary, contents)
            finally:  # so that nobody writes what is being removed
                others = [json.loads(receive(parts, other)) for other in range(1, num_ranks)]
            for other, part in enumerate(others, 1):
                if "error" in part:
                    kind = OSError if part["is_storage"] else RuntimeError
                    raise kind(f"rank {other}: {part['error']}")
                described |= part["files"]
            before = _files(temporary)
            write_rest(temporary)
            described |= _describe(temporary, _files(temporary) - before)
            for name in log_sizes(self._run_dir):  # which a resumed run goes on from
                _fsync(self._run_dir / name)
            fail_point("before_manifest")
            manifest = {"format": FORMAT, "checkpoint": target.name, "files": described}
            write_atomically(temporary / MANIFEST_FILE, _as_bytes(manifest))
            _fsync(temporary)
            fail_point("before_rename")
            if target.exists():  # of the run that this one was resumed from, or damaged
                shutil.rmtree(target)
            temporary.rename(target)
            _fsync(self._run_dir)
            fail_point("before_pointer")
            problem = damage(target)
            if problem:
                raise OSError(f"what was written reads back otherwise: {problem}")
            point_to(target)
            if is_best:
                point_to(target, "BEST")
        if self._keep is not None:
            # Of a run that was resumed there may be later ones, which are damaged: they do not count.
            saved, best = checkpoints(self._run_dir), (self._run_dir / "BEST").resolve()
            for old in saved[: saved.index(target) + 1][: -self._keep]:
                with suppress(OSError):
                    if old.resolve() != best:
                        old.rename(_temporary(old))
                        fail_point("during_retention")
                        shutil.rmtree(_temporary(old))
        return target


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _write_part(directory: Path, contents: Contents) -> dict[str, Any]:
    """Write what falls to this process; returns what the manifest has of it."""
    with as_os_errors():
        for name, tensors in contents.files.items():
            save_file(tensors, directory / name, metadata={"format": "pt"})
            fail_point("half_file", directory / name)
        for name, index in contents.indices.items():
            (directory / name).write_text(json.dumps(index, indent=1))
        return _describe(directory, (*contents.files, *contents.indices))


@contextmanager
def _or_nothing(temporary: Path, parts: str) -> Iterator[None]:
    """If anything goes wrong inside this, nothing is left of a checkpoint; the other processes are told at its end."""
    try:
        yield
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        post(parts, "over")


@contextmanager
def _storing(target: Path) -> Iterator[None]:
    """Whatever goes wrong inside this is told of as a checkpoint that could not be written."""
    try:
        with as_os_errors():
            yield
    except OSError as error:
        raise UserError(
            "STORAGE",
            f"the checkpoint {target} could not be written ({error})",
            "make room or set local_run_dir elsewhere, then continue with resume=; the checkpoints before are whole",
        ) from error


def _check_room(target: Path, num_bytes: int) -> None:
    needed, free = num_bytes * 1.01 + 2**20, shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")


def _describe(directory: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and hash of files, which are on disk after this."""
    fail_point("before_fsync")
    for name in names:
        _fsync(directory / name)
    return {name: _size_and_hash(directory / name) for name in names}


def _files(directory: Path) -> set[str]:
    """The files in a directory and below it: a tokenizer with several chat templates has them in one of their own."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def _as_bytes(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _size_and_hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def install(temporary: Path, target: Path) -> None:
    """Rename a directory once all that is in it is on disk, so that it is whole or not there, also after a crash."""
    for path in (*temporary.rglob("*"), temporary):
        _fsync(path)
    temporary.rename(target)
    _fsync(target.parent)


def point_to(target: Path, name: str = "LATEST") -> None:
    """Let a link of a run, LATEST or BEST, be to its checkpoint target."""
    link = target.with_name(f".{name}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.with_name(name))
    _fsync(target.parent)


def restore_links(run_dir: Path) -> None:
    """Make LATEST and BEST links again in a run that was copied with what they point to; UserError if they are no
    copies of its checkpoints."""
    for copied in (run_dir / "LATEST", run_dir / "BEST"):
        if copied.is_symlink() or not copied.exists():
            continue
        whole = [path for path in checkpoints(run_dir) if damage(path) is None]
        manifest = (copied / MANIFEST_FILE).read_bytes() if is_checkpoint(copied) else b""
        original = next((path for path in whole if (path / MANIFEST_FILE).read_bytes() == manifest), None)
        if original is None:
            problem = f"local_run_dir: {copied} should be a link, and is no copy of a checkpoint in {run_dir}"
            raise UserError("STORAGE", problem, "move it elsewhere")
        shutil.rmtree(copied)
        point_to(original, copied.name)


def write_policy_pt(directory: Path, num_examples: int, aliases: Mapping[str, str], metrics: dict[str, float]) -> None:
    """Add a policy.pt ({step_idx, state, metrics}) to the weights in a directory, for tools of the reference
    implementation; aliases are the second names of weights that have two -> their first."""
    state = dict(tensors_of(directory, WEIGHTS))  # mapped, not read
    state |= {name: state[first] for name, first in aliases.items()}
    torch.save({"step_idx": num_examples, "state": state, "metrics": metrics}, directory / "policy.pt")


def log_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes in each of a run's logs."""
    return {name: path.stat().st_size for name in LOG_FILES if (path := run_dir / name).exists()}


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Inside this, no other process can write to a run directory; UserError if one does already."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            "STORAGE", f"local_run_dir: cannot write to {run_dir} ({error.strerror})", "set local_run_dir elsewhere"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "STORAGE", f"local_run_dir: {run_dir} is in use by another process", "wait for it, or set another one"
            ) from error
        except OSError as error:  # a file system without locks
            print(
                f"warning: {run_dir} cannot be locked ({error.strerror}): nothing keeps a second run from writing there"
            )
        yield
    finally:
        os.close(descriptor)


def remove_temporaries(run_dir: Path) -> None:
    """Remove what a run that was killed had begun to write, and nothing else."""
    for left in run_dir.glob(".*.tmp"):
        if not TEMPORARY.fullmatch(left.name):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


# ---- What is written ----


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and saved buffers of a model by name, those that have two names by the first."""
    named = dict(model.named_parameters())
    others = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return named | {name: tensor for name, tensor in others.items() if name not in parameters}


def named_aliases(model: PreTrainedModel) -> dict[str, str]:
    """The second names of the parameters of a model that have two -> their first."""
    first_names = {parameter: name for name, parameter in model.named_parameters()}
    both = model.named_parameters(remove_duplicate=False)
    return {name: first_names[parameter] for name, parameter in both if first_names[parameter] != name}


def named_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as tensors, named <parameter>.<what it is>."""
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


# ---- Finding ----


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(
        (path for path in run_dir.glob("step-*") if path.name[5:].isdigit()), key=lambda path: int(path.name[5:])
    )


def is_checkpoint(path: Path) -> bool:
    """Whether path was saved by a run, whole or damaged."""
    return (path / STATE_FILE).exists() or (path / MANIFEST_FILE).exists()


def names_checkpoint(path: Path) -> bool:
    """Whether path is a checkpoint, a link that should be one, or a run that has some; none is read."""
    return is_checkpoint(path) or path.is_symlink() or bool(checkpoints(path))


def find_checkpoint(path: Path, key: str = "resume") -> Path | None:
    """The checkpoint that path names: itself, or the newest of the run directory that it is; None if there is none.

    Args:
        key: what has named it, for messages.

    Raises:
        UserError: CHECKPOINT, if it is damaged; of a run directory, if all are.
    """
    if path.name == "LATEST" or is_checkpoint(path):
        candidates = [path.resolve()]
    else:
        candidates = [checkpoint.resolve() for checkpoint in reversed(checkpoints(path))]
    problems: list[str] = []
    for checkpoint in candidates:
        problem = damage(checkpoint)
        if problem is None:
            for line in problems:
                print(f"{key}: {line}; {checkpoint} is taken")
            return checkpoint
        problems.append(f"{checkpoint} is damaged ({problem})")
    if problems:
        raise UserError("CHECKPOINT", f"{key}: {'; '.join(problems)}", "give another one; nothing was deleted")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they all are as they were written."""
    try:
        text = (checkpoint / MANIFEST_FILE).read_bytes()
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, not {FORMAT}"
        if text != _as_bytes(manifest):  # a file may be named twice, and another not at all
            return f"{MANIFEST_FILE} is not as it was written"
        name = checkpoint.resolve().name
        if name.startswith("step-") and manifest["checkpoint"] != name:  # a copy may be called as one likes
            return f"it was written as {manifest['checkpoint']}"
        for name, written in manifest["files"].items():
            if written["bytes"] != (checkpoint / name).stat().st_size:
                return f"{name} has {(checkpoint / name).stat().st_size:,} bytes, not {written['bytes']:,}"
            if written != _size_and_hash(checkpoint / name):
                return f"{name} has another SHA-256"
        expected = {STATE_FILE, *(path.name for path in checkpoint.glob("*.safetensors"))}
        if unknown := sorted(expected - manifest["files"].keys()):
            return f"{MANIFEST_FILE} lacks {', '.join(unknown)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def check_settings(checkpoint: Path, config: DictConfig) -> None:
    """Raise a UserError that names the keys in which config differs from that of the run of checkpoint."""
    before, now = _read_state(checkpoint)["settings"], settings_of(config)
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not {key, key.split(".")[0]} & set(config.resume_allow)
    ]
    if differing:
        changes = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in differing)
        raise UserError(
            "CONFIG",
            f"resume: the run at {checkpoint} had another config: {changes}",
            "repeat its command and add resume=, permit the change with "
            f"resume_allow=[{','.join(differing)}], or start a new run from its weights with model.archive",
        )


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The part of a config that a resumed run must share, by dotted key."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    add("", comparable(config))
    return {key: value for key, value in flat.items() if key.split(".")[0] not in FREE_ON_RESUME}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError("CHECKPOINT", f"the checkpoint {checkpoint} cannot be read ({error})", "resume from another one")


def read_state(checkpoint: Path, data: str, reference: str | None, base: str | None) -> dict[str, Any]:
    """Where the run of checkpoint was when it was saved: its counters and the sizes of its logs.

    Raises:
        UserError: CHECKPOINT if it cannot be read or its reference model, or the base model of its adapters, has other
            weights than those hashed to reference and base, DATA if its training examples are others than those hashed
            to data.
    """
    state = _read_state(checkpoint)
    for what, key, own in (("reference", "reference", reference), ("base model", "base", base)):
        if state.get(key) != own:
            raise UserError(
                "CHECKPOINT",
                f"resume: the {what} of the run at {checkpoint} had other weights than the model has now",
                "give the model that the run was started from, or start a new run from its weights with model.archive",
            )
    if state["data"] != data:
        raise UserError(
            "DATA",
            f"resume: the run at {checkpoint} was trained on other examples",
            "give the same data, or start a new run from its weights with model.archive",
        )
    return state


@torch.no_grad()
def load_checkpoint(
    checkpoint: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    orders: Orders,
    kind: str,
    weights: Mapping[str, Tensor],
) -> None:
    """Bring model and optimizer to where checkpoint was saved. Each process reads what it has of the tensors, whoever
    wrote them.

    Args:
        kind, weights: the files that have the weights, and those by their names in them.

    Raises:
        UserError: CHECKPOINT if it cannot be read or does not fit.
    """
    parameters = dict(model.named_parameters())
    missing, state = set(weights), dict[str, dict[str, Tensor]]()
    with reading(checkpoint):
        for name, tensor in tensors_of(checkpoint, kind):
            fill(weights[name], tensor, orders.get(name))
            missing.remove(name)
        for owner, values in state_by_parameter(checkpoint, optimizer).items():
            parameter = parameters[owner]
            state[owner] = values
            for key, value in values.items():
                if value.shape == parameter.shape:  # not a counter, nor a factor of the state, as Adafactor has them
                    values[key] = torch.zeros_like(parameter, dtype=value.dtype)
                    fill(values[key], value, orders.get(owner))
        assert not missing, f"it lacks {', '.join(sorted(missing))}"
    names = {parameter: name for name, parameter in parameters.items()}
    in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    by_index = {index: state[name] for index, name in enumerate(in_order) if name in state}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
    restore_kinds(optimizer)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Whatever goes wrong inside this is told of as a checkpoint that cannot be read."""
    try:
        yield
    except Exception as error:  # a damaged file raises nearly anything
        raise _unreadable(checkpoint, error) from error


def tensors_of(directory: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all files of a kind, one after another."""
    for path in sorted(directory.glob(f"{kind}*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                yield name, file.get_tensor(name)


def state_by_parameter(checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state in a checkpoint: name of the parameter -> what it is -> value; empty, with a line that says
    so, if it is of another kind of optimizer, which resume_allow has permitted."""
    state: dict[str, dict[str, Tensor]] = {}
    before, now = _read_state(checkpoint)["settings"]["optimizer"], type(optimizer).__name__
    if before != now:
        print(f"optimizer: {now} starts anew, as it cannot go on from the state of {before}")
        return state
    for name, tensor in tensors_of(checkpoint, OPTIMIZER):
        owner, _, key = name.rpartition(".")
        state.setdefault(owner, {})[key] = tensor
    return state


def rewind(run_dir: Path, sizes: dict[str, int]) -> None:
    """Cut the logs of a run back to what they held when its checkpoint was saved, so that no row is repeated."""
    for name, size in log_sizes(run_dir).items():
        os.truncate(run_dir / name, min(size, sizes.get(name, 0)))  # to a larger size would add zeros
