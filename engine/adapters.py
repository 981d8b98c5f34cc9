"""Which parameters are trained: all but those that are frozen, or LoRA adapters on a base model that may be quantised.

peft puts the adapters into the model, which stays the transformers model that it was. A checkpoint of adapters is a
directory in peft's own form, that names its base model. Before the first step the policy is the reference: the base
model alone where adapters are new (their B is 0), the base with the archived adapter where one is trained further.
"""

import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from engine.batching import Microbatch
from engine.checkpoint import MANIFEST_FILE, find_checkpoint, install, named_aliases
from engine.commands import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_base
from engine.models import differing_values, find_blocks, hf_config_of, load_model
from engine.quantization import QuantizedLinear, quantize
from engine.reference import LiveReference, weights_hash
from engine.sharding import fill
from utils import UserError, as_os_errors, clipped, quiet_bitsandbytes

ADAPTER = "adapter_model"  # beginning of the names of its files
OWN, REFERENCE = "default", "reference"  # the adapter that is trained, and a frozen copy of what it started as
BASE = "base_model.model."  # before the names of parameters in peft's files
ATTENTION = ("attn", "attention", "self_attn", "self_attention")  # beginnings of the names of its modules
VALUES = ("q_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv")  # or fused with what they come with
# What an archived adapter must share with the config: peft's name of it -> ours.
SHARED = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "bias": "bias",
    "target_modules": "target_modules",
    "modules_to_save": "full_modules",
}
# And what may differ: what is of no adapter's function, is settled by the model, or is how training began. Others of
# peft's are not done here.
FREE = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_dropout",
    "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others take from the base what they give the adapter


@dataclass
class Adapter:
    """The adapters of a model, as its attribute `adapter`.

    config: peft's, as it is saved: for the base model before it was quantised.
    full_modules: names of modules of the base model that are trained in full.
    archive: the checkpoint that they were loaded from; None if they are new.
    has_own_reference: whether the model gives the log-probs it started with too; see AdapterReference.
    base_hash: of the weights of the base model, as they are before they are quantised: that differs among devices.
    """

    config: Any
    full_modules: list[str]
    archive: Path | None
    has_own_reference: bool
    compute_dtype: str | None
    base_hash: str

    @property
    def is_new(self) -> bool:
        """Whether the model started as its base, bit for bit; DoRA scales what is exactly the same in other words."""
        return self.archive is None and not self.config.use_dora

    @property
    def description(self) -> str:
        """Of the reference."""
        base = self.config.base_model_name_or_path
        return f"the base model {base}, adapters off" if self.is_new else f"{base} with {self.archive or 'new DoRA'}"


def adapter_of(model: nn.Module) -> Adapter | None:
    return getattr(model, "adapter", None)


# ---- Loading ----


def load_policy(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    run_dir: Path | None,
    load: Callable[..., PreTrainedModel] = load_model,
) -> PreTrainedModel:
    """The model of config, with adapters if it says so, in which what is to be trained requires gradients.

    Args:
        dtype: of its weights. Those of adapters have at least fp32; frozen ones have the dtype that they run in.
        run_dir: takes the weights of a base model that is nowhere else on disk, if there is one.
        load: gives the base model.
    """
    if config.peft.name == "none":
        if config.model.archive is not None and _adapter_archive(Path(config.model.archive)) is not None:
            problem = f"model.archive: {config.model.archive} is an adapter"
            raise UserError("CONFIG", problem, "peft=lora or peft=qlora trains it further; export.py merges it")
        model = load(config, tokenizer, dtype, device)
        freeze(model, config)
        return model
    peft, mixed = config.peft, config.mixed_precision
    runs_in = getattr(torch, mixed) if mixed else dtype
    is_quantized = peft.name == "qlora"
    archive = None if config.model.archive is None else _adapter_archive(Path(config.model.archive))
    config, base = _with_base(config, archive, tokenizer)
    stored = _stored_dtype(base, config.model.trust_remote_code)
    is_narrow = stored in (torch.bfloat16, torch.float16) and (is_quantized or mixed)  # nothing is lost in it
    loading_device = torch.device("cpu") if is_quantized else device
    model = load(config, tokenizer, stored if is_narrow and stored else dtype, loading_device)
    blocks = find_blocks(model, config.model.block_name)
    targets, has_conv1d = _find_targets(model, blocks, peft.target_modules)
    if base is None and run_dir is not None:
        base = str(_save_base(model, tokenizer, run_dir, config.debug))

    base_hash = "" if device.type == "meta" else weights_hash(model, {})  # of a shape there is none
    lora = _lora_config(peft, targets, has_conv1d, base)
    full_modules = _find_full_modules(model, list(peft.full_modules), blocks, is_quantized, lora.target_modules)
    lora.modules_to_save = full_modules or None
    if archive is not None:
        _check_same(archive, lora)
    if is_quantized or peft.target_modules == "all_linear":
        _tell_of_others(blocks)
    if is_quantized:
        quantize(model, blocks, device=device, **_quantization(peft))
        model = model.to(device)
    has_own_reference = config.reference == "live" and not full_modules and not _trains_biases(model, lora)
    needs_copy = has_own_reference and (archive is not None or peft.dora)
    adapter = Adapter(lora, full_modules, archive, has_own_reference, peft.get("compute_dtype"), base_hash)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject(model, adapter, with_copy=needs_copy)
    # In mixed precision the head keeps its dtype, and embeddings that scale what they give; what others give is cast.
    kept = {*model.get_output_embeddings().parameters()}
    if type(model.get_input_embeddings()) is not nn.Embedding:
        kept |= {*model.get_input_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        is_adapter = _is_adapter(name)
        parameter.requires_grad_(_is_trained(name, adapter))
        if _is_quantized_weight(model, name):
            continue
        if is_adapter:
            wanted = torch.promote_types(dtype, torch.float32)
        else:
            wanted = dtype if parameter in kept or parameter.requires_grad else runs_in
        parameter.data = parameter.data.to(wanted)
    if config.trainer == "FSDPTrainer":
        _check_one_dtype(blocks)
    if archive is not None:
        _load_weights(model, archive)
    if needs_copy:
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if f".{REFERENCE}" in name:
                parameter.data = parameters[name.replace(f".{REFERENCE}", f".{OWN}")].detach().clone()
    return model


def freeze(model: PreTrainedModel, config: DictConfig) -> None:
    """Freeze what config.freeze names."""
    blocks, settings = find_blocks(model, config.model.block_name), config.freeze
    if settings.first_n_layers > len(blocks):
        problem = f"freeze.first_n_layers: {settings.first_n_layers} is more than the {len(blocks)} blocks of the model"
        raise UserError("CONFIG", problem, "lower it")
    for block in blocks[: settings.first_n_layers]:
        block.requires_grad_(False)
    for pattern in settings.patterns:
        found = [p for name, p in model.named_parameters(remove_duplicate=False) if re.search(pattern, name)]
        if not found:
            names = ", ".join(name for name, _ in model.named_parameters())
            problem = f"freeze.patterns: {pattern} is found in no name of a parameter"
            raise UserError("CONFIG", problem, f"the names are {names[:300]}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("CONFIG", "freeze: nothing is left to train", "freeze less")


def _quantization(peft: DictConfig) -> dict[str, Any]:
    return {
        "quant_type": peft.quant_type,
        "double_quant": peft.double_quant,
        "compute_dtype": getattr(torch, peft.compute_dtype) if peft.compute_dtype else None,
        "storage_dtype": getattr(torch, peft.storage_dtype),
    }


def _adapter_archive(archive: Path) -> Path | None:
    """The adapter checkpoint that a path names, itself or the newest of a run; None if it is none."""
    if archive.is_dir() and not any((archive / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        archive = find_checkpoint(archive, "model.archive") or archive
    elif (archive / MANIFEST_FILE).exists():
        archive = find_checkpoint(archive, "model.archive") or archive  # or say what is wrong with it
    return archive.resolve() if (archive / ADAPTER_CONFIG).is_file() else None


def _with_base(
    config: DictConfig, archive: Path | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[DictConfig, str | None]:
    """The config of the base model, and the name or absolute path by which others find it, None if there is none.

    What an archived adapter was trained on decides, as its weights mean nothing on any other model.
    """
    model = config.model
    if archive is not None:
        named = _read_adapter_config(archive).get("base_model_name_or_path")
        path = find_base(archive, named) if named else None
        config = copy.deepcopy(config)
        config.model.archive = None if path is None else str(path.resolve())
        if path is None and model.architecture is not None:
            what = f"the base model of {archive}, {named}, is not there" if named else f"{archive} names no base model"
            raise UserError("CHECKPOINT", f"model.archive: {what}", "put it back, or name it in adapter_config.json")
        if path is None and not named:
            print(
                f"model.archive: {archive} names no base model, so {model.name_or_path} is taken (model.name_or_path)"
            )
            return _with_base(config, None, tokenizer)
        base = named if path is None else str(path.resolve())
        config.model.name_or_path, config.model.architecture = base, None
        differing = differing_values(hf_config_of(config.model, tokenizer), hf_config_of(model, tokenizer))
        if differing:
            problem = f"model.archive: {base}, the base model of {archive}, does not fit the model of this config"
            raise UserError("CONFIG", f"{problem} ({differing})", f"model=blank_model model.name_or_path={base}")
        return config, base
    if model.archive is not None:
        path = Path(model.archive)
        path = path.parent if path.name == "policy.pt" else path
        if not (path / "config.json").exists() and path.is_dir():
            path = find_checkpoint(path, "model.archive") or path
        return config, str(path.resolve()) if (path / "config.json").exists() else None
    if model.architecture is not None:
        return config, None
    return config, os.path.abspath(model.name_or_path) if os.path.exists(model.name_or_path) else model.name_or_path


def _stored_dtype(base: str | None, trusted: bool) -> torch.dtype | None:
    """The dtype that the weights of a model have on disk, if its config tells."""
    try:
        return None if base is None else AutoConfig.from_pretrained(base, trust_remote_code=trusted).dtype
    except Exception:  # damaged files raise nearly anything; it is told when the model is loaded
        return None


def _save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: Path, debug: bool) -> Path:
    """Write a base model whose weights are nowhere on disk into the run directory, whole or not at all."""
    target = (run_dir / "base").resolve()
    if target.exists() or debug:
        return target
    temporary = target.with_name(".base.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        with as_os_errors():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            install(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        problem = f"the base model could not be written to {target} ({error})"
        raise UserError("STORAGE", problem, "make room or set local_run_dir elsewhere") from error
    print(f"base model: its weights are in {target}, where checkpoints of adapters look for them")
    return target


# ---- Targets ----


def _linear_names(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def _find_targets(model: PreTrainedModel, blocks: list[nn.Module], wanted: Any) -> tuple[list[str], bool]:
    """The linear layers inside blocks that a preset or a list of names means, by their names in a block; and whether
    there are any of GPT-2's kind among them."""
    inside = sorted({name for block in blocks for name in _linear_names(block)})
    of_attention = [name for name in inside if any(part.startswith(ATTENTION) for part in name.split(".")[:-1])]
    if wanted == "all_linear":
        found = inside
    elif wanted == "attention":
        found = of_attention
    elif wanted == "attention_qv":
        found = [name for name in of_attention if name.split(".")[-1] in VALUES]
    else:
        found, names = [], list(wanted)
        for name in names:
            matches = [other for other in inside if f".{other}".endswith(f".{name}")]
            if not matches:
                problem = f"peft.target_modules: {name} is no linear layer inside the blocks of {type(model).__name__}"
                fix = "peft.full_modules trains others in full" if hasattr(model, name) else "correct it"
                raise UserError("CONFIG", problem, f"choose of {', '.join(inside)}; {fix}")
            found += matches
    if not found:
        problem = f"peft.target_modules: {type(model).__name__} has no layers that {wanted} knows"
        raise UserError("CONFIG", problem, f"name some of {', '.join(inside)}")
    modules = [module for block in blocks for name, module in block.named_modules() if name in found]
    return sorted(set(found)), any(isinstance(module, Conv1D) for module in modules)


def _tell_of_others(blocks: list[nn.Module]) -> None:
    """Say how much of the blocks is in no linear layer, such as experts, which are one tensor each, if it is much."""
    sizes = {id(parameter): parameter.numel() for block in blocks for parameter in block.parameters()}
    layers = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    share = sum(size for key, size in sizes.items() if key not in inside) / sum(sizes.values())
    if share > 0.05:
        names = sorted(
            {name for block in blocks for name, p in block.named_parameters() if id(p) not in inside and p.ndim > 1}
        )
        some = f" ({clipped(', '.join(names), 200)})" if names else ""
        print(f"peft: {share:.0%} of the blocks' weights are in no linear layer{some}: neither quantised nor adapted")


def _lora_config(peft: DictConfig, targets: list[str], has_conv1d: bool, base: str | None) -> Any:
    quiet_bitsandbytes()
    from peft import LoraConfig

    alpha = 2 * peft.rank if peft.alpha is None and peft.scaling is None else peft.alpha
    if peft.scaling is not None:
        alpha = peft.scaling * peft.rank
    return LoraConfig(
        r=peft.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=peft.dropout,
        bias=peft.bias,
        target_modules=targets,
        use_rslora=peft.rslora,
        use_dora=peft.dora,
        fan_in_fan_out=has_conv1d,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def _find_full_modules(
    model: PreTrainedModel, names: list[str], blocks: list[nn.Module], is_quantized: bool, targets: set[str]
) -> list[str]:
    """The whole names of the modules that names mean, and of those that share a weight with them."""
    modules, found = dict(model.named_modules()), set[str]()
    inside = {module for block in blocks for module in block.modules()}
    for name in names:
        matches = [other for other, module in modules.items() if f".{other}".endswith(f".{name}")]
        if not matches or not any([*modules[other].parameters()] for other in matches):
            problem = f"peft.full_modules: {type(model).__name__} has no module {name} with parameters"
            raise UserError("CONFIG", problem, "correct it")
        for match in matches:
            linear = [f"{match}.{other}".rstrip(".") for other in _linear_names(modules[match])]
            adapted = [other for other in linear if any(other.endswith(f".{target}") for target in targets)]
            if adapted or (is_quantized and any(modules[other] in inside for other in linear)):
                problem = f"peft.full_modules: {match} is quantised or has an adapter"
                raise UserError("CONFIG", problem, "leave it out, here or in target_modules")
        found |= set(matches)
    for alias, first in named_aliases(model).items():
        pair = {alias.rpartition(".")[0], first.rpartition(".")[0]}
        if pair & found:
            found |= pair
    # One inside another would be a module to save within a module to save, which peft cannot load.
    return sorted(name for name in found if not any(name.startswith(f"{other}.") for other in found))


# ---- Adapters in a model ----


def inject(model: PreTrainedModel, adapter: Adapter, with_copy: bool) -> None:
    """Put new adapters into a model, and with_copy a second one of each for the reference."""
    quiet_bitsandbytes()  # which peft imports
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    is_meta = model.get_input_embeddings().weight.is_meta
    names = (OWN, REFERENCE) if with_copy else (OWN,)
    for name in names:
        config = copy.deepcopy(adapter.config)
        config.modules_to_save, config.base_model_name_or_path = None, None
        config.bias = "none"  # what requires gradients is settled here
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        if name == REFERENCE:
            config.lora_dropout = 0.0
        with warnings.catch_warnings(action="ignore"):  # of a second adapter, and of layers of another kind
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=is_meta)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [OWN]
    model.adapter = adapter


def _check_one_dtype(blocks: list[nn.Module]) -> None:
    """Raise a UserError if the weights of a block that are trained have several dtypes, which FSDP cannot mix."""
    for block in blocks:
        dtypes = {p.dtype: name for name, p in block.named_parameters() if p.requires_grad}
        if len(dtypes) > 1:
            low = min(dtypes, key=lambda dtype: dtype.itemsize)
            shown = str(low).removeprefix("torch.")
            problem = f"peft: {dtypes[low]} trains in {shown} beside adapters in fp32, which shards cannot mix"
            raise UserError("CONFIG", problem, f"set mixed_precision={shown} in place of that dtype")


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _is_trained(name: str, adapter: Adapter) -> bool:
    if _is_adapter(name):
        return f".{OWN}" in name
    if name.rpartition(".")[0] in adapter.full_modules or any(name.startswith(f"{m}.") for m in adapter.full_modules):
        return True
    if name.endswith("bias"):
        return adapter.config.bias == "all" or (adapter.config.bias == "lora_only" and ".base_layer." in name)
    return False


def _trains_biases(model: nn.Module, lora: Any) -> bool:
    """Whether the base model, before it has adapters, has biases that are trained with them."""
    layers = [name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")]
    if lora.bias == "lora_only":
        return any(layer.endswith(f".{target}") for layer in layers for target in lora.target_modules)
    return lora.bias == "all" and bool(layers)


def _is_quantized_weight(model: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key == "weight" and isinstance(model.get_submodule(owner), QuantizedLinear)


def match_structure(
    model: PreTrainedModel, full: PreTrainedModel | None, config: DictConfig, block_name: str | None
) -> PreTrainedModel:
    """Give a model without weights the adapters, quantised layers, dtypes and frozen parameters of the one that rank 0
    has in full. All processes call this together."""
    described: list[Any] = [None]
    if full is not None:
        facts = {name: (p.dtype, p.requires_grad) for name, p in full.named_parameters()}
        has_copy = any(f".{REFERENCE}" in name for name in facts)
        described = [(adapter_of(full), has_copy, facts)]
    dist.broadcast_object_list(described, src=0)
    adapter, has_copy, facts = described[0]
    if adapter is not None:
        if config.peft.name == "qlora":
            how = _quantization(config.peft)
            quantize(model, find_blocks(model, block_name), device=torch.device("cpu"), **how)
        inject(model, adapter, has_copy)
    for name, parameter in model.named_parameters():
        dtype, requires_grad = facts[name]
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(requires_grad)
    return model.eval()


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Inside this, a model that has its own reference is it: its adapters are off, or those that it started with."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:  # not by peft's methods, which also change what requires gradients
        if REFERENCE in layer.lora_A:
            layer._active_adapter = [REFERENCE]
        else:
            layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [OWN]
            layer._disable_adapters = False


class AdapterReference(LiveReference):
    """Runs the policy as it was before it was trained."""

    def logps(self, batch: Microbatch) -> Tensor:
        with as_reference(self.model):
            return super().logps(batch)


def hashing_of(model: nn.Module) -> tuple[Callable[[str], str | None], list[Any]]:
    """What of a model decides its log-probs before training: the name that a tensor is hashed under, None for one that
    does not matter, and settings. A model with new adapters has those of its base."""
    adapter = adapter_of(model)
    if adapter is None:
        return (lambda name: name), []

    def name_of(name: str) -> str | None:
        if _is_adapter(name) and (adapter.is_new or f".{REFERENCE}" in name):
            return None
        return name.replace(".base_layer.", ".")

    settings = [] if adapter.compute_dtype is None else [adapter.compute_dtype]
    if not adapter.is_new:
        own = adapter.config
        settings += [own.r, own.lora_alpha, own.use_rslora, own.use_dora]
    return name_of, settings


# ---- Numbers ----


def num_weights(model: nn.Module) -> tuple[int, int]:
    """How many weights are trained, and how many there are; packed ones count as what they stand for."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)}
    copies = sum(p.numel() for name, p in model.named_parameters() if f".{REFERENCE}" in name and _is_adapter(name))
    return trained, sum(packed.get(id(p), p.numel()) for p in model.parameters()) - copies


def flops_per_token(model: nn.Module) -> int:
    """Of a forward and a backward pass: a frozen weight needs no gradient of its own."""
    trained, total = num_weights(model)
    return 4 * total + 2 * trained


# ---- Checkpoints ----


def _peft_name(name: str) -> str:
    """What peft calls a parameter in its files."""
    name = name.replace(f".{OWN}", "")
    return BASE + (name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in peft's files, those that have two names twice."""
    both = model.named_parameters(remove_duplicate=False)
    return {_peft_name(name): parameter for name, parameter in both if parameter.requires_grad}


def write_adapter_config(adapter: Adapter, directory: Path) -> None:
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # peft has a set, whose order changes
    config.save_pretrained(directory)


def _read_adapter_config(archive: Path) -> dict[str, Any]:
    try:
        return json.loads((archive / ADAPTER_CONFIG).read_text())
    except (OSError, ValueError) as error:
        problem = f"model.archive: {archive / ADAPTER_CONFIG} cannot be read ({error})"
        raise UserError("CHECKPOINT", problem, "give another checkpoint") from error


def _check_same(archive: Path, config: Any) -> None:
    """Raise a UserError if an archived adapter is not what the config describes."""
    stored = _read_adapter_config(archive)
    wanted = config.to_dict()
    if stored.get("peft_type") != "LORA":
        problem = f"model.archive: {archive} is {stored.get('peft_type')}, no LoRA adapter"
        raise UserError("CHECKPOINT", problem, "give a LoRA adapter")
    foreign = [
        f"{name}={value}"
        for name, value in sorted(stored.items())
        if name not in SHARED and name not in FREE and (value or None) != (wanted.get(name) or None)
    ]
    if (start := stored.get("init_lora_weights", True)) not in PLAIN_STARTS:
        foreign.append(f"init_lora_weights={start}")
    if foreign:
        problem = f"model.archive: the adapter in {archive} has {', '.join(foreign)}, which adapters here have not"
        raise UserError("CONFIG", problem, "merge it into its base model with export.py, and name that")
    targets = stored.get("target_modules") or []
    same_targets = isinstance(targets, list) and {t.split(".")[-1] for t in targets} == {
        t.split(".")[-1] for t in wanted["target_modules"]
    }
    differing = [
        f"peft.{ours} is {stored.get(name)} there, not {wanted[name]}"
        for name, ours in SHARED.items()
        if (not same_targets if name == "target_modules" else (stored.get(name) or None) != (wanted[name] or None))
    ]
    if differing:
        problem = f"model.archive: the adapter in {archive} is another than the config's: {', '.join(differing)}"
        raise UserError("CONFIG", problem, "give the same values here")


@torch.no_grad()
def _load_weights(model: PreTrainedModel, archive: Path) -> None:
    """Give the trained parameters of a model what an adapter checkpoint has."""
    parameters = trained_parameters(model)
    fix = "give a checkpoint of adapters of this model"
    try:
        with safe_open(archive / ADAPTER_WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            if names != parameters.keys():
                odd = sorted(names ^ parameters.keys())
                raise ValueError(f"{len(odd)} tensors are in one of both only, such as {odd[0]}")
            for name, parameter in parameters.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
                fill(parameter, tensor)
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError("CHECKPOINT", f"model.archive: cannot load {archive}: {error}", fix) from error
