"""Run a model in another dtype than its weights are kept in."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def model_in(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside a with block, model runs in dtype over weights that stay as they are; None leaves all as it is.

    Its embeddings, the output aside, and its head keep their own dtype: only some rows of the embeddings are used, and
    what the head gives is summed over many tokens.
    """
    if dtype is None:
        yield
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    with (
        parameters_in(model, dtype, keep=(embeddings, head)),
        embeddings.register_forward_hook(lambda module, inputs, output: output.to(dtype)),
    ):
        yield


@contextmanager
def parameters_in(module: nn.Module, dtype: torch.dtype, keep: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Inside a with block, the parameters of module are copies in dtype; gradients reach the originals in their own.

    So every operation runs in dtype, as under FSDP's mixed precision, and each weight is cast once, however many
    forward and backward passes the block holds. (Autocast would keep the states between operations in fp32, and cast
    them before each product.)

    Args:
        keep: parts of module that keep their own dtype.
    """
    kept = {module for part in keep for module in part.modules()}
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    copies: dict[int, Tensor] = {}  # a parameter that modules share is copied once
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if child in kept or parameter is None or parameter.dtype == dtype:
                continue
            is_packed = name == "weight" and getattr(child, "is_quantized", False)  # in a dtype that says nothing
            if parameter.is_floating_point() and not is_packed:
                originals.append((child, name, parameter))
    try:
        for child, name, parameter in originals:
            if id(parameter) not in copies:
                copies[id(parameter)] = parameter.to(dtype)
            # A plain tensor may stand in for a parameter here, though not in module.weight = ...
            child._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for child, name, parameter in originals:
            child._parameters[name] = parameter
