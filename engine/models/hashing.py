"""Hashes of a model's weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import xxhash
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from engine.models.adapters import REFERENCE_ADAPTER, adapter_of, is_adapter_weight
from engine.models.shards import ShardPermutations, full_tensor
from utils import content_hash


def weights_hash(
    model: PreTrainedModel,
    permutations: ShardPermutations,
    name_of: Callable[[str], str | None] = lambda name: name,
    settings: Iterable[Any] = (),
) -> str:
    """A hash of a model's weights, their dtypes and its config.

    Args:
        permutations: of sharded parameters.
        name_of: parameter name -> hashed name, or None to skip the weight.
        settings: further values to hash.
    """
    digest = xxhash.xxh3_128()  # as fast as memory: seconds for billions of weights, so no hash is stored
    for parameter_name, tensor in model.state_dict().items():
        name = name_of(parameter_name)
        if name is None:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        full = full_tensor(tensor.detach(), permutations.get(parameter_name)).cpu().contiguous()
        digest.update(full.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    values = model.config.to_diff_dict().items()
    config = {key: value for key, value in values if not key.startswith("_") and key != "transformers_version"}
    model_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))  # before sharding
    return content_hash([digest.digest(), model_class.__name__, str(config), *settings])


def reference_hash_spec(model: nn.Module) -> tuple[Callable[[str], str | None], list[Any]]:
    """Describe the hash of a model's log-probs before training, as arguments of weights_hash.

    A model with new adapters has the hash of its base.

    Returns:
        name_of and settings of weights_hash.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return (lambda name: name), []

    def name_of(name: str) -> str | None:
        if is_adapter_weight(name) and (adapter.is_new or f".{REFERENCE_ADAPTER}" in name):
            return None
        return name.replace(".base_layer.", ".")

    settings = [] if adapter.compute_dtype is None else [adapter.compute_dtype]
    if not adapter.is_new:
        lora = adapter.config
        settings += [lora.r, lora.lora_alpha, lora.use_rslora, lora.use_dora]
    return name_of, settings
