"""Parameters of a model: counts, and names for checkpoints."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.models.adapters import REFERENCE_ADAPTER, is_adapter_weight
from engine.models.quantization import QuantizedLinear
from engine.models.shards import local_shard


def num_weights(model: nn.Module) -> tuple[int, int]:
    """(trained weights, all weights).

    Quantised weights count unpacked. Reference adapters do not count.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)}
    copies = sum(
        p.numel() for name, p in model.named_parameters() if f".{REFERENCE_ADAPTER}" in name and is_adapter_weight(name)
    )
    return trained, sum(packed.get(id(p), p.numel()) for p in model.parameters()) - copies


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model by name.

    Shared parameters appear under their first name.
    """
    first_names = dict(model.named_parameters())
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    all_names = dict(model.named_parameters(remove_duplicate=False))
    return first_names | {name: tensor for name, tensor in state.items() if name not in all_names}


def named_aliases(model: PreTrainedModel) -> dict[str, str]:
    """Second names of shared parameters -> their first names."""
    first_names = {parameter: name for name, parameter in model.named_parameters()}
    all_names = model.named_parameters(remove_duplicate=False)
    return {name: first_names[parameter] for name, parameter in all_names if first_names[parameter] != name}


@torch.no_grad()
def move_weights(model: PreTrainedModel, target: PreTrainedModel, mix: float) -> None:
    """Replace weights by mix * target + (1 - mix) * weights, in place, each rank its shards.

    Args:
        target: the same model, with shards in the same places.
        mix: 1 copies the target's weights exactly.
    """
    for parameter, other in zip(model.parameters(), target.parameters(), strict=True):
        weight, wanted = local_shard(parameter), local_shard(other)
        if mix == 1:
            weight.copy_(wanted)
        else:
            weight.lerp_(wanted.to(weight.device), mix)


def named_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as tensors, by name <parameter>.<key>."""
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
