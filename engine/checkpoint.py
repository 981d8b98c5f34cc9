"""Checkpoints: directories that transformers loads, with the training state beside the weights, never a pickle.

step-<examples>/ holds the model and tokenizer in Hugging Face form, the optimizer's state by the names of parameters,
and training_state.json. Several processes write a file each, of whole tensors, so a checkpoint does not depend on how
many there were. LATEST is a link to the newest. A checkpoint is written under another name and renamed when it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.sharding import Orders, barrier, fill, full_tensor, rank_and_size
from utils import UserError

STATE_FILE = "training_state.json"
WEIGHTS, OPTIMIZER = "model", "optimizer"  # beginnings of the names of files
LOG_FILES = ("metrics.jsonl", "samples.jsonl")
# Keys that may change when a run is resumed: they do not change what is learned.
FREE_ON_RESUME = {
    "exp_name", "local_dirs", "local_run_dir", "cache_dir", "data_dir", "resume", "debug", "wandb", "tensorboard",
    "minimum_log_interval_secs", "save_every", "keep_checkpoints", "num_processes", "compile", "do_first_eval",
    "eval_every", "eval_batch_size", "n_eval_examples", "sample_during_eval", "n_eval_model_samples",
}  # fmt: skip


def save_checkpoint(
    run_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    counters: dict[str, int],
    *,
    orders: Orders,
    aliases: Mapping[str, str],
    config: DictConfig,
    data: str,
    metrics: dict[str, float],
    keep: int | None,
    write_policy_pt: bool = False,
) -> Path:
    """Write run_dir/step-<examples> and point LATEST to it, then remove all but the newest keep checkpoints.

    All processes of a run call this together.

    Args:
        model: whose config goes with the weights.
        weights, state: as named_weights and named_state return them.
        counters: "examples" and "updates" so far.
        orders: of the parameters that are split in another order than their own.
        aliases: the second names of weights that have two -> their first.
        config: of the run; a resumed run must have the same, FREE_ON_RESUME aside.
        data: a hash of the training examples; a resumed run must have the same.
        metrics: of the last evaluation.
        write_policy_pt: add a policy.pt ({step_idx, state, metrics}) for tools of the reference implementation.

    Raises:
        UserError: STORAGE; what was saved before is untouched.
    """
    target = run_dir / f"step-{counters['examples']}"
    temporary = run_dir / f".{target.name}.tmp"
    rank, _ = rank_and_size()
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        _write_part(temporary, WEIGHTS, weights, orders)
        _write_part(temporary, OPTIMIZER, state, orders)
        barrier()
        if rank == 0:
            model.config.save_pretrained(temporary)
            model.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            log_sizes = {name: path.stat().st_size for name in LOG_FILES if (path := run_dir / name).exists()}
            facts = {"counters": counters, "log_sizes": log_sizes, "settings": _settings(config), "data": data}
            (temporary / STATE_FILE).write_text(json.dumps(facts, indent=1))
            if write_policy_pt:
                named = dict(tensors_of(temporary, WEIGHTS))
                named |= {name: named[first] for name, first in aliases.items()}
                torch.save(
                    {"step_idx": counters["examples"], "state": named, "metrics": metrics}, temporary / "policy.pt"
                )
            for file in temporary.iterdir():
                _fsync(file)
            _fsync(temporary)
            if target.exists():  # of the run that this one was resumed from
                shutil.rmtree(target)
            temporary.rename(target)
            link = run_dir / ".LATEST.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            link.replace(run_dir / "LATEST")
            _fsync(run_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            "STORAGE",
            f"the checkpoint {target} could not be written ({error})",
            "make room or set local_run_dir elsewhere, then continue with resume=",
        ) from error
    for old in checkpoints(run_dir)[:-keep] if keep is not None and rank == 0 else []:
        shutil.rmtree(old, ignore_errors=True)
    barrier()
    return target


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


def _write_part(directory: Path, kind: str, tensors: Mapping[str, Tensor], orders: Orders) -> None:
    """Write the tensors that fall to this process, about as many bytes as to every other; the first, of which are
    which, if there are several files."""
    rank, num_ranks = rank_and_size()
    total = sum(tensor.nbytes for tensor in tensors.values())
    files, own, before = {}, {}, 0
    for name, tensor in tensors.items():
        owner = min(num_ranks - 1, before * num_ranks // max(1, total))
        before += tensor.nbytes
        files[name] = _file_name(kind, owner, num_ranks)
        order = orders.get(name) or orders.get(name.rpartition(".")[0])
        whole = full_tensor(tensor, order if tensor.ndim else None)  # by all processes together
        if owner == rank:
            own[name] = whole.detach().cpu().contiguous()
    # A file for every process, even an empty one: their number is part of the names.
    save_file(own, directory / _file_name(kind, rank, num_ranks), metadata={"format": "pt"})
    if rank == 0 and num_ranks > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / f"{kind}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _file_name(kind: str, rank: int, num_ranks: int) -> str:
    return f"{kind}.safetensors" if num_ranks == 1 else f"{kind}-{rank + 1:05}-of-{num_ranks:05}.safetensors"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(
        (path for path in run_dir.glob("step-*") if path.name[5:].isdigit()), key=lambda path: int(path.name[5:])
    )


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that path names: itself, or the newest of the run directory that it is; None if there is none."""
    if (path / STATE_FILE).exists():
        return path.resolve()
    if (path / "LATEST" / STATE_FILE).exists():
        return (path / "LATEST").resolve()
    found = [checkpoint for checkpoint in checkpoints(path) if (checkpoint / STATE_FILE).exists()]
    return found[-1] if found else None


def check_settings(checkpoint: Path, config: DictConfig) -> None:
    """Raise a UserError that names the keys in which config differs from that of the run of checkpoint."""
    before, now = _read_state(checkpoint)["settings"], _settings(config)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in differing)
        raise UserError(
            "CONFIG",
            f"resume: the run at {checkpoint} had another config: {changes}",
            "repeat its command and add resume=, or start a new run from its weights with model.archive",
        )


def _settings(config: DictConfig) -> dict[str, Any]:
    """The part of a config that a resumed run must share, by dotted key."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    add("", OmegaConf.to_container(config, resolve=True))
    return {key: value for key, value in flat.items() if key.split(".")[0] not in FREE_ON_RESUME}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError("CHECKPOINT", f"the checkpoint {checkpoint} cannot be read ({error})", "resume from another one")


def read_state(checkpoint: Path, data: str) -> dict[str, Any]:
    """Where the run of checkpoint was when it was saved: its counters and the sizes of its logs.

    Raises:
        UserError: CHECKPOINT if it cannot be read, DATA if its training examples are others than those hashed to data.
    """
    state = _read_state(checkpoint)
    if state["data"] != data:
        raise UserError(
            "DATA",
            f"resume: the run at {checkpoint} was trained on other examples",
            "give the same data, or start a new run from its weights with model.archive",
        )
    return state


@torch.no_grad()
def load_checkpoint(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, orders: Orders) -> None:
    """Bring model and optimizer to where checkpoint was saved. Each process reads what it has of the tensors, whoever
    wrote them.

    Raises:
        UserError: CHECKPOINT if it cannot be read or does not fit.
    """
    weights, parameters = named_weights(model), dict(model.named_parameters())
    missing, state = set(weights), dict[str, dict[str, Tensor]]()
    with reading(checkpoint):
        for name, tensor in tensors_of(checkpoint, WEIGHTS):
            fill(weights[name], tensor, orders.get(name))
            missing.remove(name)
        for owner, values in state_by_parameter(checkpoint).items():
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


def state_by_parameter(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state in a checkpoint: name of the parameter -> what it is -> value."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(checkpoint, OPTIMIZER):
        owner, _, key = name.rpartition(".")
        state.setdefault(owner, {})[key] = tensor
    return state


def rewind(run_dir: Path, sizes: dict[str, int]) -> None:
    """Cut the logs of a run back to what they held when its checkpoint was saved, so that no row is repeated."""
    for name in LOG_FILES:
        if (run_dir / name).exists():
            os.truncate(run_dir / name, sizes.get(name, 0))
