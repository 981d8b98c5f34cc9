"""Checkpoints of adapters, in peft's format.

A checkpoint is a directory with adapter_config.json and adapter_model.safetensors. The config names the base model.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from engine.models.adapters import TRAINED_ADAPTER, Adapter
from engine.models.archives import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST_FILE, find_checkpoint, locate
from engine.models.pretrained import reward_model_error
from engine.models.records import AdapterConfig, read_record
from engine.models.score_head import SCORE_NAME, SCORE_WEIGHT
from engine.models.shards import copy_to_shard
from utils import UserError

ADAPTER = "adapter_model"  # prefix of file names
PEFT_PREFIX = "base_model.model."  # prefix of parameter names in peft's files
# Values of an archived adapter and the config must match here: name in peft -> key under peft.
SHARED = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "bias": "bias",
    "target_modules": "target_modules",
    "modules_to_save": "full_modules",
}
# Values free to differ: they do not change the adapter's function, follow from the model, or affect initialisation
# only. All other options of peft are unsupported.
FREE = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_dropout",
    "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # other initialisations change the base weights


def adapter_archive(archive: Path) -> Path | None:
    """The adapter checkpoint at a path, or the newest of a run.

    Returns:
        None if there is none.
    """
    if archive.is_dir() and not any((archive / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        archive = find_checkpoint(archive, "model.archive") or archive
    elif (archive / MANIFEST_FILE).exists():
        archive = find_checkpoint(archive, "model.archive") or archive  # raises if it is damaged
    return locate(archive) if (archive / ADAPTER_CONFIG).is_file() else None


def _peft_name(name: str) -> str:
    """The name of a parameter in peft's files."""
    name = name.replace(f".{TRAINED_ADAPTER}", "")
    return PEFT_PREFIX + (name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name in peft's files. Shared parameters appear under each name."""
    all_names = model.named_parameters(remove_duplicate=False)
    return {_peft_name(name): parameter for name, parameter in all_names if parameter.requires_grad}


def write_adapter_config(adapter: Adapter, directory: Path) -> None:
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set in peft, in random order
    config.save_pretrained(directory)


def read_adapter_config(archive: Path) -> dict[str, Any]:
    return read_record(AdapterConfig, archive / ADAPTER_CONFIG, "model.archive", "give another checkpoint")


def check_same_adapter(archive: Path, config: Any) -> None:
    """Raise a UserError if an archived adapter does not match the config.

    A reward model may start from the adapter of a language model, which has no score head.
    """
    stored = read_adapter_config(archive)
    wanted = config.to_dict()
    if wanted["task_type"] != "SEQ_CLS" and stored.get("task_type") == "SEQ_CLS":
        raise reward_model_error("model.archive", str(archive))
    if wanted["task_type"] == "SEQ_CLS" and stored.get("task_type") != "SEQ_CLS":
        wanted["modules_to_save"] = [name for name in wanted["modules_to_save"] if name != SCORE_NAME]
    if stored.get("peft_type") != "LORA":
        problem = f"model.archive: {archive} has peft_type {stored.get('peft_type')}, not LORA"
        raise UserError("CHECKPOINT", problem, "give a LoRA adapter")
    unsupported = [
        f"{name}={value}"
        for name, value in sorted(stored.items())
        if name not in SHARED and name not in FREE and (value or None) != (wanted.get(name) or None)
    ]
    if (start := stored.get("init_lora_weights", True)) not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights={start}")
    if unsupported:
        problem = f"model.archive: the adapter in {archive} has {', '.join(unsupported)}, unsupported here"
        raise UserError(
            "CONFIG", problem, "merge it into its base model with export.py, and set model.archive to the result"
        )
    targets = stored.get("target_modules") or []
    same_targets = isinstance(targets, list) and {t.split(".")[-1] for t in targets} == {
        t.split(".")[-1] for t in wanted["target_modules"]
    }
    differing = [
        f"peft.{key} is {stored.get(name)} there, not {wanted[name]}"
        for name, key in SHARED.items()
        if (not same_targets if name == "target_modules" else (stored.get(name) or None) != (wanted[name] or None))
    ]
    if differing:
        problem = f"model.archive: the adapter in {archive} does not match the config: {', '.join(differing)}"
        raise UserError("CONFIG", problem, "set the same values")


@torch.no_grad()
def load_adapter_weights(model: PreTrainedModel, archive: Path) -> None:
    """Load an adapter checkpoint into the trained parameters of a model."""
    parameters = trained_parameters(model)
    fix = "give a checkpoint of adapters of this model"
    try:
        with safe_open(archive / ADAPTER_WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            score = f"{PEFT_PREFIX}{SCORE_WEIGHT}"
            if score not in names:  # an adapter of a language model: the score head is new
                parameters.pop(score, None)
            if names != parameters.keys():
                unmatched = sorted(names ^ parameters.keys())
                raise ValueError(f"{len(unmatched)} tensors are in the model or the file only, such as {unmatched[0]}")
            for name, parameter in parameters.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
                copy_to_shard(parameter, tensor)
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError("CHECKPOINT", f"model.archive: cannot load {archive}: {error}", fix) from error
