"""LoRA adapters in a model.

peft puts the adapters into a transformers model, and the model keeps its class. The reference is the policy before the
first step:
- With new adapters it is the base model alone, as their B is 0.
- With archived adapters it is the base model with a frozen copy of them.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.models.layers import find_layers
from engine.models.quantization import QuantizedLinear, quantization_settings, quantize
from engine.settings.schema import LoraSettings, QLoraSettings, Settings
from utils import quiet_bitsandbytes

TRAINED_ADAPTER = "default"
REFERENCE_ADAPTER = "reference"  # a frozen copy of the trained adapter, from before training


@dataclass
class Adapter:
    """Describes the adapters of a model, in its attribute `adapter`.

    Attributes:
        config: LoraConfig of peft, as saved, for the base model before quantisation.
        full_modules: names of modules of the base model, trained in full.
        archive: the checkpoint they were loaded from; None for new adapters.
        has_own_reference: the model itself can give the reference's log-probs; see AdapterReference.
        compute_dtype: of quantised layers.
        base_hash: of the base model's weights before quantisation. Quantised weights differ among devices.
    """

    config: Any
    full_modules: list[str]
    archive: Path | None
    has_own_reference: bool
    compute_dtype: str | None
    base_hash: str

    @property
    def is_new(self) -> bool:
        """Whether the model equalled its base before training, bitwise.

        Not with DoRA: it rescales the weights, with other rounding.
        """
        return self.archive is None and not self.config.use_dora

    @property
    def description(self) -> str:
        """Description of the reference, for the log."""
        base = self.config.base_model_name_or_path
        return f"the base model {base}, adapters off" if self.is_new else f"{base} with {self.archive or 'new DoRA'}"


def adapter_of(model: nn.Module) -> Adapter | None:
    return getattr(model, "adapter", None)


def seed_dropout(settings: Settings, num_updates: int, rank: int) -> None:
    """Seed the masks of adapters' dropout for an update: a resumed run has the same."""
    if isinstance(settings.peft, LoraSettings) and settings.peft.dropout:
        torch.manual_seed(hash((settings.seed, num_updates, rank)) % 2**32)


def inject(model: PreTrainedModel, adapter: Adapter, with_copy: bool) -> None:
    """Put new adapters into a model.

    Args:
        with_copy: add a second adapter to each layer, for the reference.
    """
    quiet_bitsandbytes()  # peft imports it
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    from engine.models.lora_linear import fuse_lora

    is_meta = model.get_input_embeddings().weight.is_meta
    names = (TRAINED_ADAPTER, REFERENCE_ADAPTER) if with_copy else (TRAINED_ADAPTER,)
    for name in names:
        config = copy.deepcopy(adapter.config)
        config.modules_to_save, config.base_model_name_or_path = None, None
        config.bias = "none"  # load_policy sets requires_grad
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        if name == REFERENCE_ADAPTER:
            config.lora_dropout = 0.0
        with warnings.catch_warnings(action="ignore"):  # about second adapters and Conv1D
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=is_meta)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [TRAINED_ADAPTER]
    fuse_lora(model)
    model.adapter = adapter


def copy_to_reference_adapter(model: PreTrainedModel) -> None:
    """Copy the trained adapters' weights to the frozen adapters of the reference."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if f".{REFERENCE_ADAPTER}" in name:
            parameter.data = parameters[name.replace(f".{REFERENCE_ADAPTER}", f".{TRAINED_ADAPTER}")].detach().clone()


def is_adapter_weight(name: str) -> bool:
    return ".lora_" in name


def is_trained(name: str, adapter: Adapter) -> bool:
    if is_adapter_weight(name):
        return f".{TRAINED_ADAPTER}" in name
    if name.rpartition(".")[0] in adapter.full_modules or any(name.startswith(f"{m}.") for m in adapter.full_modules):
        return True
    if name.endswith("bias"):
        return adapter.config.bias == "all" or (adapter.config.bias == "lora_only" and ".base_layer." in name)
    return False


def is_quantized_weight(model: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key == "weight" and isinstance(model.get_submodule(owner), QuantizedLinear)


def match_structure(model: PreTrainedModel, full: PreTrainedModel | None, settings: Settings) -> PreTrainedModel:
    """Give a model without weights the structure of rank 0's model.

    All ranks call this together.

    Copies adapters, quantised layers, dtypes and requires_grad.

    Args:
        full: the model on rank 0; None on the others.
    """
    description: list[Any] = [None]
    if full is not None:
        facts = {name: (p.dtype, p.requires_grad) for name, p in full.named_parameters()}
        has_copy = any(f".{REFERENCE_ADAPTER}" in name for name in facts)
        description = [(adapter_of(full), has_copy, facts)]
    dist.broadcast_object_list(description, src=0)
    adapter, has_copy, facts = description[0]
    if adapter is not None:
        if isinstance(settings.peft, QLoraSettings):
            layers = find_layers(model, settings.model.block_name)
            quantize(model, layers, device=torch.device("cpu"), **quantization_settings(settings.peft))
        inject(model, adapter, has_copy)
    for name, parameter in model.named_parameters():
        dtype, requires_grad = facts[name]
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(requires_grad)
    return model.eval()


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Turn the policy into its reference in a with block.

    Its adapters are off, or replaced by the frozen copy.
    """
    from peft.tuners.lora import LoraLayer

    lora_layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in lora_layers:  # peft's own methods would also change requires_grad
        if REFERENCE_ADAPTER in layer.lora_A:
            layer._active_adapter = [REFERENCE_ADAPTER]
        else:
            layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in lora_layers:
            layer._active_adapter = [TRAINED_ADAPTER]
            layer._disable_adapters = False
