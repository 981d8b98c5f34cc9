"""Load the policy, in full or as a base model with adapters.

The base model may be quantised. A checkpoint of adapters names its base model, and archived adapters run on no other.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from engine.models.adapter_files import adapter_archive, check_same_adapter, load_adapter_weights, read_adapter_config
from engine.models.adapter_targets import find_full_modules, find_targets, lora_config
from engine.models.adapters import (
    Adapter,
    copy_to_reference_adapter,
    inject,
    is_adapter_weight,
    is_quantized_weight,
    is_trained,
)
from engine.models.archives import check_base_exists, find_base_model, find_checkpoint, locate, missing_archive
from engine.models.hashing import weights_hash
from engine.models.layers import find_layers
from engine.models.loading import differing_values, hf_config_of, load_model
from engine.models.quantization import quantization_settings, quantize
from engine.models.score_head import SCORE_NAME, has_score_head, head_of
from engine.settings.schema import LoraSettings, QLoraSettings, Settings
from utils import UserError, apply_umask, as_os_errors, clipped, install_directory


def load_policy(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    run_dir: Path | None,
    load: Callable[..., PreTrainedModel] = load_model,
) -> PreTrainedModel:
    """Load the model of the settings, with adapters if set.

    Trained parameters require gradients.

    Args:
        dtype: of trained weights. Adapters have at least fp32. Frozen weights have the dtype of forward passes.
        run_dir: receives the weights of a base model from scratch. None: they are not saved.
        load: loads the base model.

    Raises:
        UserError: CONFIG or CHECKPOINT, if settings, model and archive do not match.
    """
    if settings.model.archive is not None and not Path(settings.model.archive).exists():
        raise missing_archive("model.archive", Path(settings.model.archive))
    archive = None if settings.model.archive is None else adapter_archive(Path(settings.model.archive))
    if isinstance(settings.peft, LoraSettings):
        return _load_with_adapters(settings, settings.peft, archive, tokenizer, dtype, device, run_dir, load)
    if archive is not None:
        problem = f"model.archive: {settings.model.archive} is an adapter"
        raise UserError("CONFIG", problem, "train it further with peft=lora or peft=qlora, or merge it with export.py")
    model = load(settings, tokenizer, dtype, device)
    freeze(model, settings)
    return model


def _load_with_adapters(
    settings: Settings,
    peft: LoraSettings,
    archive: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    run_dir: Path | None,
    load: Callable[..., PreTrainedModel],
) -> PreTrainedModel:
    """load_policy() with adapters: new ones, or those of archive."""
    settings, base = _with_base(settings, archive, tokenizer)
    loading_device = torch.device("cpu") if isinstance(peft, QLoraSettings) else device
    model = load(settings, tokenizer, _loading_dtype(settings, base, dtype), loading_device)
    layers = find_layers(model, settings.model.block_name)
    targets, has_conv1d = find_targets(model, layers, peft.target_modules)
    if base is None and run_dir is not None:
        base = str(_save_base(model, tokenizer, run_dir, settings.debug))

    lora = lora_config(peft, targets, has_conv1d, base, "SEQ_CLS" if has_score_head(model) else "CAUSAL_LM")
    adapter, needs_copy = _describe_adapter(model, layers, settings, peft, lora, archive)
    if isinstance(peft, QLoraSettings) or peft.target_modules == "all_linear":
        _warn_of_other_weights(layers)
    if isinstance(peft, QLoraSettings):
        quantize(model, layers, device=device, **quantization_settings(peft))
        model = model.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject(model, adapter, with_copy=needs_copy)

    run_dtype = getattr(torch, settings.mixed_precision) if settings.mixed_precision else dtype
    _set_dtypes(model, adapter, dtype, run_dtype)
    if archive is not None:
        load_adapter_weights(model, archive)
    if needs_copy:
        copy_to_reference_adapter(model)
    return model


def _loading_dtype(settings: Settings, base: str | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a base model in memory.

    Weights stored in 16 bits lose nothing if loaded so.
    """
    stored = _stored_dtype(base, settings.model.trust_remote_code)
    may_be_narrow = isinstance(settings.peft, QLoraSettings) or settings.mixed_precision
    return stored if stored in (torch.bfloat16, torch.float16) and may_be_narrow else dtype


def _describe_adapter(
    model: PreTrainedModel,
    layers: list[nn.Module],
    settings: Settings,
    peft: LoraSettings,
    lora: Any,
    archive: Path | None,
) -> tuple[Adapter, bool]:
    """Describe the adapters of a base model, before it is quantised.

    Sets lora.modules_to_save.

    Returns:
        the description, and whether the reference needs a copy of the adapters.

    Raises:
        UserError: CONFIG or CHECKPOINT, if an archived adapter does not match.
    """
    is_meta = model.get_input_embeddings().weight.is_meta
    base_hash = "" if is_meta else weights_hash(model, {})  # meta tensors have no hash
    is_quantized = isinstance(peft, QLoraSettings)
    full_names = [*peft.full_modules, SCORE_NAME] if has_score_head(model) else peft.full_modules
    full_modules = find_full_modules(model, full_names, layers, is_quantized, lora.target_modules)
    lora.modules_to_save = full_modules or None
    if archive is not None:
        check_same_adapter(archive, lora)
    is_reference = settings.has_live_reference or settings.measures_kl
    has_own_reference = is_reference and not full_modules and not _trains_biases(model, lora)
    needs_copy = has_own_reference and (archive is not None or peft.dora)
    compute_dtype = peft.compute_dtype if isinstance(peft, QLoraSettings) else None
    return Adapter(lora, full_modules, archive, has_own_reference, compute_dtype, base_hash), needs_copy


def _set_dtypes(model: PreTrainedModel, adapter: Adapter, dtype: torch.dtype, run_dtype: torch.dtype) -> None:
    """Mark trained parameters, and give each parameter its dtype."""
    # In mixed precision the head keeps its dtype, and so do embeddings with a scaled output.
    kept = {*head_of(model).parameters()}
    score_weights = kept.copy() if has_score_head(model) else set()
    if type(model.get_input_embeddings()) is not nn.Embedding:
        kept |= {*model.get_input_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, adapter))
        if is_quantized_weight(model, name):
            continue
        if is_adapter_weight(name) or parameter in score_weights:
            wanted = torch.promote_types(dtype, torch.float32)
        else:
            wanted = dtype if parameter in kept or parameter.requires_grad else run_dtype
        parameter.data = parameter.data.to(wanted)


def freeze(model: PreTrainedModel, settings: Settings) -> None:
    """Freeze the layers and parameters of settings.freeze."""
    layers, first_n_layers = find_layers(model, settings.model.block_name), settings.freeze.first_n_layers
    if first_n_layers > len(layers):
        problem = f"freeze.first_n_layers: {first_n_layers} is more than the {len(layers)} layers of the model"
        raise UserError("CONFIG", problem, "lower it")
    for layer in layers[:first_n_layers]:
        layer.requires_grad_(False)
    for pattern in settings.freeze.patterns:
        found = [p for name, p in model.named_parameters(remove_duplicate=False) if re.search(pattern, name)]
        if not found:
            names = ", ".join(name for name, _ in model.named_parameters())
            problem = f"freeze.patterns: {pattern} matches no parameter name"
            raise UserError("CONFIG", problem, f"the names are {names[:300]}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("CONFIG", "freeze: nothing is left to train", "freeze fewer parameters")


def _with_base(
    settings: Settings, archive: Path | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[Settings, str | None]:
    """Settings of the base model, and its name or absolute path.

    The latter is None if it is not on disk.

    An archived adapter decides the base model, as its weights are useless on another.
    """
    if archive is not None:
        return _with_base_of_adapter(settings, archive, tokenizer)
    model = settings.model
    if model.archive is not None:
        path = Path(model.archive)
        path = path.parent if path.name == "policy.pt" else path
        if not (path / "config.json").exists() and path.is_dir():
            path = find_checkpoint(path, "model.archive") or path
        return settings, str(locate(path)) if (path / "config.json").exists() else None
    if model.architecture is not None:
        return settings, None
    return settings, os.path.abspath(model.name_or_path) if os.path.exists(model.name_or_path) else model.name_or_path


def _with_base_of_adapter(
    settings: Settings, archive: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[Settings, str | None]:
    """_with_base() for an archived adapter."""
    model = settings.model
    name = read_adapter_config(archive).get("base_model_name_or_path")
    if name:
        check_base_exists(archive, name, "model.archive", "by its path in that file")
    path = find_base_model(archive, name) if name else None
    if path is None and model.architecture is not None:
        problem = f"{name}, the base model of {archive}, is not on disk" if name else f"{archive} names no base model"
        raise UserError("CHECKPOINT", f"model.archive: {problem}", "restore it, or name it in adapter_config.json")
    if path is None and not name:
        print(f"model.archive: {archive} names no base model; using model.name_or_path={model.name_or_path}")
        without = model.model_copy(update={"archive": None})
        return _with_base(settings.model_copy(update={"model": without}), None, tokenizer)
    base = name if path is None else str(locate(path))
    source = None if path is None else base
    base_model = model.model_copy(update={"archive": source, "name_or_path": base, "architecture": None})
    differing = differing_values(hf_config_of(base_model, tokenizer), hf_config_of(model, tokenizer))
    if differing:
        problem = f"model.archive: {base}, the base model of {archive}, does not match the model of this config"
        raise UserError("CONFIG", f"{problem} ({differing})", f"model=blank_model model.name_or_path={base}")
    return settings.model_copy(update={"model": base_model}), base


def _stored_dtype(base: str | None, trusted: bool) -> torch.dtype | None:
    """The dtype of a model's weights on disk; None if its config has none."""
    try:
        return None if base is None else AutoConfig.from_pretrained(base, trust_remote_code=trusted).dtype
    except Exception:  # damaged files raise nearly anything; loading reports it
        return None


def _save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: Path, debug: bool) -> Path:
    """Write a base model from scratch into the run directory, atomically.

    Returns:
        its path.
    """
    target = (run_dir / "base").resolve()
    # save_pretrained() sets this, and weights_hash() covers it. A run resumed in place saves no base again.
    model.config.architectures = [type(model).__name__]
    if target.exists() or debug:
        return target
    temporary = target.with_name(".base.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        with as_os_errors():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            apply_umask(temporary)
            install_directory(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        problem = f"the base model could not be written to {target} ({error})"
        raise UserError("STORAGE", problem, "free disk space, or set another local_run_dir") from error
    print(f"base model: saved in {target} for checkpoints of adapters")
    return target


def _warn_of_other_weights(layers: list[nn.Module]) -> None:
    """Print the share of weights outside linear layers, if it is large.

    Experts in one tensor are an example.
    """
    sizes = {id(parameter): parameter.numel() for layer in layers for parameter in layer.parameters()}
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    inside = {id(parameter) for linear in linears for parameter in linear.parameters()}
    share = sum(size for key, size in sizes.items() if key not in inside) / sum(sizes.values())
    if share > 0.05:
        names = sorted(
            {name for layer in layers for name, p in layer.named_parameters() if id(p) not in inside and p.ndim > 1}
        )
        some = f" ({clipped(', '.join(names), 200)})" if names else ""
        where = f"in no linear layer{some}"
        print(f"peft: {share:.0%} of the transformer layers' weights are {where}: neither quantised nor adapted")


def _trains_biases(model: nn.Module, lora: Any) -> bool:
    """Whether biases of the base model are trained.

    Call this before adapters are injected.
    """
    with_bias = [name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")]
    if lora.bias == "lora_only":
        return any(name.endswith(f".{target}") for name in with_bias for target in lora.target_modules)
    return lora.bias == "all" and bool(with_bias)
