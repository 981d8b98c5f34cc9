"""Find the transformer layers of a model."""

from torch import nn
from transformers import PreTrainedModel

from utils import UserError


def find_layers(model: nn.Module, block_name: str | None) -> list[nn.Module]:
    """The transformer layers, in order.

    Args:
        block_name: their class; None for the longest list of modules of one class.

    Raises:
        UserError: CONFIG, if there are none.
    """
    if block_name is not None:
        layers = [module for module in model.modules() if type(module).__name__ == block_name]
        if not layers:
            classes = sorted({type(child).__name__ for module in _lists(model) for child in module})
            raise UserError(
                "CONFIG",
                f"model.block_name: the model has no {block_name}",
                f"one of {', '.join(classes)}, or null to find it",
            )
        return layers
    layers = max((list(modules) for modules in _lists(model)), key=len, default=[])
    if not layers:
        problem = f"model.architecture: {type(model).__name__} has no transformer layers"
        raise UserError("CONFIG", problem, "give it at least one, or set model.block_name to their class")
    return layers


def recompute_activations(model: PreTrainedModel, block_name: str | None, number: int) -> None:
    """Let the first layers, so many, recompute their activations in the backward pass."""
    if not number:
        return
    old_name = model.gradient_checkpointing_enable  # transformers 5.17 has no other
    getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    for layer in find_layers(model, block_name)[number:]:
        setattr(layer, "gradient_checkpointing", False)  # noqa: B010  mypy knows no such attribute


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of modules of one class."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
