"""Checkpoints: directories that transformers loads, with the training state beside the weights, never a pickle.

step-<examples>/ holds the model and tokenizer in Hugging Face form, optimizer.safetensors and training_state.json.
LATEST is a link to the newest. A checkpoint is written under another name and renamed when it is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils import UserError

STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
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
    optimizer: torch.optim.Optimizer,
    counters: dict[str, int],
    *,
    config: DictConfig,
    data: str,
    metrics: dict[str, float],
    keep: int | None,
    write_policy_pt: bool = False,
) -> Path:
    """Write run_dir/step-<examples> and point LATEST to it, then remove all but the newest keep checkpoints.

    Args:
        counters: "examples" and "updates" so far.
        config: of the run; a resumed run must have the same, FREE_ON_RESUME aside.
        data: a hash of the training examples; a resumed run must have the same.
        metrics: of the last evaluation.
        write_policy_pt: add a policy.pt ({step_idx, state, metrics}) for tools of the reference implementation.

    Raises:
        UserError: STORAGE; what was saved before is untouched.
    """
    target = run_dir / f"step-{counters['examples']}"
    temporary = run_dir / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        tensors, plain = _flatten(optimizer.state_dict())
        save_file(tensors, temporary / OPTIMIZER_FILE)
        log_sizes = {name: path.stat().st_size for name in LOG_FILES if (path := run_dir / name).exists()}
        state = {"counters": counters, "log_sizes": log_sizes, "settings": _settings(config), "data": data}
        state["optimizer"] = plain
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
        if write_policy_pt:
            weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
            policy = {"step_idx": counters["examples"], "state": weights, "metrics": metrics}
            torch.save(policy, temporary / "policy.pt")
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
    for old in checkpoints(run_dir)[:-keep] if keep is not None else []:
        shutil.rmtree(old, ignore_errors=True)
    return target


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


def load_checkpoint(
    checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, data: str
) -> dict[str, Any]:
    """Bring model and optimizer to where checkpoint was saved; returns its counters and the sizes of its logs.

    Raises:
        UserError: CHECKPOINT if it cannot be read or does not fit, DATA if the training examples are others.
    """
    state = _read_state(checkpoint)
    if state["data"] != data:
        raise UserError(
            "DATA",
            f"resume: the run at {checkpoint} was trained on other examples",
            "give the same data, or start a new run from its weights with model.archive",
        )
    try:
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(checkpoint.glob("model*.safetensors")):
            weights.update(load_file(file))
        tensors = load_file(checkpoint / OPTIMIZER_FILE)
    except Exception as error:  # a damaged file raises nearly anything
        raise _unreadable(checkpoint, error) from error
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(_untied(model))
    if unexpected or set(missing) - tied:
        raise UserError("CHECKPOINT", f"the checkpoint {checkpoint} does not fit the model", "resume its own run")
    optimizer.load_state_dict(_unflatten(tensors, state["optimizer"]))
    return {"counters": state["counters"], "log_sizes": state["log_sizes"]}


def _untied(model: PreTrainedModel) -> list[str]:
    seen: set[int] = set()
    names = []
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            names.append(name)
        seen.add(tensor.data_ptr())
    return names


def rewind(run_dir: Path, sizes: dict[str, int]) -> None:
    """Cut the logs of a run back to what they held when its checkpoint was saved, so that no row is repeated."""
    for name in LOG_FILES:
        if (run_dir / name).exists():
            os.truncate(run_dir / name, sizes.get(name, 0))


def _flatten(state_dict: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and the rest, which JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {"param_groups": state_dict["param_groups"], "state": {}}
    for index, values in state_dict["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain["state"].setdefault(str(index), {})[name] = value
    return tensors, plain


def _unflatten(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": plain["param_groups"]}
