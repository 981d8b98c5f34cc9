"""Load language models and reward models from the hub, a directory, or a config."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.models.archives import find_checkpoint, is_checkpoint
from engine.models.pretrained import Pretrained, load_pretrained, reward_model_error
from engine.models.records import check_shard_index
from engine.models.score_head import (
    AUTO_CLASSES,
    SCORE_WEIGHT,
    finish_score_head,
    has_padding_row,
    head_of_loss,
    is_reward_config,
    prepare_config,
)
from engine.settings.schema import ModelSettings, Settings
from losses import Head
from utils import UserError, clipped, is_out_of_memory

# Keys of a transformers config without effect on log-probs, by the ends of their names. Dropout is turned off.
HARMLESS = re.compile(
    r"^_|(^|_)(architectures|transformers_version|dtype|use_cache|return_dict|output_attentions|output_hidden_states"
    r"|name_or_path|id2label|label2id|problem_type|token_id|token_index|initializer_range|auto_map|tokenizer_class"
    r"|quantization_config|pretraining_tp|dropout|pdrop)$"
)


def reason_of(error: Exception) -> str:
    """Why a file cannot be loaded, on one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch advises to load it all the same
        return "it is damaged, or holds more than plain tensors; loading it could run code"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def loading_error(kind: str, key: str, name: str, error: Exception) -> UserError:
    if is_out_of_memory(error):
        return UserError("MEMORY", f"out of memory while loading the {kind} {name}", "a smaller model, or more memory")
    if "trust_remote_code" in str(error):
        problem = f"{key}: {name} brings Python code of its own, and trust_remote_code is false"
        return UserError("CONFIG", problem, "read that code, then set model.trust_remote_code=true")
    return UserError(
        "CONFIG",
        f"{key}: no {kind} can be loaded from '{name}' ({reason_of(error)})",
        "give a local directory, or a name on the hub (reachable, or in the local cache)",
    )


def load_model(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load the model of config.model, with the head of the loss.

    Its weights come from model.archive if set. A score head not among them is new.

    Args:
        dtype: of the loaded weights, whatever the stored dtype.
        device: of the model. "cuda" with several GPUs: layers of a model from files are split among them.

    Raises:
        UserError: CONFIG if the model cannot be loaded, CHECKPOINT if the archive does not fit it.
    """
    hf_config = hf_config_of(settings.model, tokenizer)
    context = getattr(hf_config, "max_position_embeddings", None)
    if context is not None and settings.max_length > context:
        raise UserError(
            "CONFIG", f"max_length: {settings.max_length} is more than the {context} positions of the model", "lower it"
        )
    turn_off_dropout(hf_config)
    head = head_of_loss(settings)
    prepare_config(hf_config, head, settings.model.trust_remote_code)
    model, has_new_score = _load_weights(settings, hf_config, dtype, device)
    if head == "score":
        finish_score_head(model, settings, tokenizer, is_new=has_new_score)
    if not hasattr(model, "hf_device_map"):
        model = model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if model.generation_config is not None:
        _repair_generation_config(model)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise UserError(
            "CONFIG",
            f"model.tokenizer_name_or_path: the tokenizer has {len(tokenizer)} tokens, the model {num_embeddings}",
            "use the tokenizer that the model was trained with",
        )
    return model


def _load_weights(
    settings: Settings, hf_config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, bool]:
    """A model from its archive, from scratch, or from name_or_path, and whether it needs a new score head."""
    head = head_of_loss(settings)
    name, trusted = settings.model.name_or_path, settings.model.trust_remote_code
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted}
    if device.type == "cuda":
        kwargs["device_map"] = "balanced" if torch.cuda.device_count() > 1 else device
    if settings.model.archive is not None:
        loaded = _load_archive(Path(settings.model.archive), head, hf_config, kwargs)
        return loaded.model, loaded.has_new_score
    if settings.model.architecture is None:
        loaded = _load_name(name, head, hf_config, kwargs)
        return loaded.model, loaded.has_new_score
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # policy and reference start from the same weights
        try:
            return AUTO_CLASSES[head].from_config(hf_config, dtype=dtype, trust_remote_code=trusted), True
        except Exception as error:  # inconsistent values raise nearly anything
            if is_out_of_memory(error):
                raise
            raise _architecture_error(error) from error


def _load_name(name: str, head: Head, hf_config: Any, kwargs: dict[str, Any]) -> Pretrained:
    """A model from model.name_or_path. Weights that the model has no place for are ignored."""
    key = "model.name_or_path"
    check_shard_index(Path(name), key)
    try:
        loaded = load_pretrained(name, head, hf_config, **kwargs)
    except Exception as error:  # damaged files raise nearly anything
        raise loading_error("model", key, name, error) from error
    loaded.check_head(key, name)
    if loaded.missing:  # transformers has filled them with random numbers
        problem = f"{key}: {len(loaded.missing)} weights of the model are not in {name}, such as {min(loaded.missing)}"
        raise UserError("CHECKPOINT", problem, "give a complete model")
    return loaded


def hf_config_of(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The transformers config of config.model."""
    if settings.architecture is None:
        try:
            return AutoConfig.from_pretrained(settings.name_or_path, trust_remote_code=settings.trust_remote_code)
        except Exception as error:  # damaged files raise nearly anything
            raise loading_error("model", "model.name_or_path", settings.name_or_path, error) from error
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **settings.architecture,
    }
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # unknown values raise nearly anything
        raise _architecture_error(error) from error


def differing_values(stored: Any, expected: Any) -> str:
    """Describe the differences between two transformers configs; empty if there are none.

    Compares keys of both configs only. The others are defaults, or come from another version of transformers.
    """

    def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
        for key in sorted(theirs.keys() & ours.keys()):
            if isinstance(ours[key], dict) and key.endswith("_config") and isinstance(theirs[key], dict):
                yield from compare(theirs[key], ours[key])
            elif theirs[key] != ours[key] and not HARMLESS.search(key) and not (has_row and key == "vocab_size"):
                yield f"{key} is {theirs[key]} there, not {ours[key]}"

    has_row = has_padding_row(stored, expected)
    if stored.model_type != expected.model_type:
        return f"model_type is {stored.model_type} there, not {expected.model_type}"
    return clipped(", ".join(compare(stored.to_dict(), expected.to_dict())), 500)


def _architecture_error(error: Exception) -> UserError:
    return UserError(
        "CONFIG",
        f"model.architecture: transformers cannot build it ({type(error).__name__}: {clipped(str(error), 500)})",
        "give a model_type, and values of its transformers config",
    )


def turn_off_dropout(hf_config: Any) -> None:
    """Set all dropout of a transformers config to 0."""
    # In the config, as attention modules read it when built, and apply dropout without a module.
    for name, value in hf_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(hf_config, name, 0.0)


def _repair_generation_config(model: PreTrainedModel) -> None:
    # Some published models set temperature or top_p without do_sample. Their checkpoints could not be saved.
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def _load_archive(archive: Path, head: Head, hf_config: Any, kwargs: dict[str, Any]) -> Pretrained:
    """A model from model.archive."""
    fix = "give the run directory, checkpoint (step-N, LATEST) or policy.pt of a run with this model"
    if archive.is_dir() and not (archive / "config.json").exists():  # a run directory
        archive = find_checkpoint(archive, "model.archive") or archive
    directory = archive.parent if archive.is_file() else archive
    if is_checkpoint(directory):
        find_checkpoint(directory, "model.archive")  # raises if it is damaged
    check_shard_index(directory, "model.archive")
    try:
        if (archive.is_dir() or is_checkpoint(directory)) and (directory / "config.json").exists():
            stored = AutoConfig.from_pretrained(directory, trust_remote_code=kwargs["trust_remote_code"])
            if head == "lm" and is_reward_config(stored):
                raise reward_model_error("model.archive", str(archive))
            if has_padding_row(stored, hf_config):
                hf_config.get_text_config().vocab_size += 1
            if differing := differing_values(stored, hf_config):
                raise UserError("CHECKPOINT", f"model.archive: {archive} does not fit the model ({differing})", fix)
        if archive.is_dir():
            loaded = load_pretrained(archive, head, hf_config, **kwargs)
        else:
            state = torch.load(archive, map_location="cpu", weights_only=True, mmap=True)["state"]
            if head == "lm" and SCORE_WEIGHT in state:  # its embeddings may have other shapes
                raise reward_model_error("model.archive", str(archive))
            loaded = load_pretrained(None, head, hf_config, state=state, **kwargs)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        if is_out_of_memory(error):
            raise
        problem = f"model.archive: cannot load {archive}: {reason_of(error)}"
        raise UserError("CHECKPOINT", problem, fix) from error
    loaded.check_head("model.archive", str(archive))
    if loaded.problems:
        raise UserError("CHECKPOINT", f"model.archive: {archive} does not fit the model ({loaded.problems})", fix)
    return loaded
