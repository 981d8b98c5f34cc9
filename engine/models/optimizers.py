"""Optimizers by name: torch's, and bitsandbytes' with state in 8 bits or paged memory."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.models.rmsprop_kernel import FusedRMSprop, runs_on
from engine.models.shards import ShardPermutations, copy_to_shard
from utils import quiet_bitsandbytes

FUSED_ON_CPUS_ALONE = ("Adagrad",)


def build_optimizer(name: str, groups: list[dict[str, Any]], lr: float, may_fuse: bool = True) -> torch.optim.Optimizer:
    """Build an optimizer of torch, or else of bitsandbytes.

    Args:
        may_fuse: use a fused version, one pass over the weights, if there is one.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    decays = any(group.get("weight_decay") for group in groups)  # the kernel has none
    if name == "RMSprop" and may_fuse and not decays and runs_on(parameters):
        return FusedRMSprop(groups, lr)
    may_fuse &= name not in FUSED_ON_CPUS_ALONE or all(parameter.device.type == "cpu" for parameter in parameters)
    kind = getattr(torch.optim, name, None)
    if kind is not None:
        fused = {"fused": True} if may_fuse and "fused" in inspect.signature(kind).parameters else {}
        return kind(groups, lr=lr, **fused)
    quiet_bitsandbytes()
    import bitsandbytes.optim

    # Paging is for GPUs. A warning on a CPU helps nobody.
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
    return getattr(bitsandbytes.optim, name)(groups, lr=lr)


def with_weight_decay(model: nn.Module, groups: list[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters, divided by whether they decay: matrices do, but norms, biases and embeddings do not."""
    undecayed = {
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, nn.Embedding) or parameter.ndim < 2
    }
    divided = []
    for group in groups:
        for decays in (True, False):
            parameters = [parameter for parameter in group["params"] if (parameter not in undecayed) == decays]
            if parameters:
                divided.append({**group, "params": parameters, "weight_decay": weight_decay if decays else 0.0})
    return divided


@torch.no_grad()
def load_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, dict[str, Tensor]],
    permutations: ShardPermutations,
) -> None:
    """Load optimizer state, and shard it like the parameters.

    Args:
        state: of full parameters, name -> kind of state -> value; empty to reset the optimizer.
        permutations: of sharded parameters.
    """
    parameters = dict(model.named_parameters())
    loaded: dict[str, dict[str, Tensor]] = {}
    for name, values in state.items():
        parameter = parameters[name]
        loaded[name] = dict(values)
        for key, value in values.items():
            if value.shape == parameter.shape:  # not for counters, nor for factored state (Adafactor)
                loaded[name][key] = torch.zeros_like(parameter, dtype=value.dtype)
                copy_to_shard(loaded[name][key], value, permutations.get(name))
    names = {parameter: name for name, parameter in parameters.items()}
    in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    by_index = {index: loaded[name] for index, name in enumerate(in_order) if name in loaded}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
    _restore_kinds(optimizer)


def _restore_kinds(optimizer: torch.optim.Optimizer) -> None:
    """Convert loaded state of a bitsandbytes optimizer to its own types.

    It holds counts as numbers, and large tensors in paged memory.
    """
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key == "step" and isinstance(value, Tensor):
                state[key] = int(value)
            elif key in ("state1", "state2") and parameter.is_cuda:
                state[key] = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[attr-defined]
                state[key].copy_(value)
