"""Run a model in another dtype than its stored weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def run_in_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Run model in dtype in a with block; None does nothing.

    - Embeddings keep their dtype, as few of their rows are used. Their output is cast.
    - The head keeps its dtype, as its results are summed over many tokens.
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
    """Replace the parameters of module by copies in dtype in a with block.

    - Gradients reach the originals, in the originals' dtype.
    - Every operation runs in dtype, as under FSDP's mixed precision.
    - Each weight is cast once for all passes in the block. Autocast would keep states in fp32 and cast them before
      each product.

    Args:
        keep: submodules with their own dtype.
    """
    kept = {module for submodule in keep for module in submodule.modules()}
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    copies: dict[int, Tensor] = {}  # one per parameter, shared or not
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if child in kept or parameter is None or parameter.dtype == dtype:
                continue
            is_packed = name == "weight" and getattr(child, "is_quantized", False)  # its dtype is for storage only
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
