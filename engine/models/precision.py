"""Run a model in another dtype than its stored weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.models.shards import local_shard
from engine.models.wide_products import copy_for_products, has_wide_products


@contextmanager
def run_in_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Run model in dtype in a with block; None does nothing.

    - Embeddings keep their dtype, as few of their rows are used. Their output is cast.
    - The head keeps its dtype, as its results are summed over many tokens. It gets a copy in dtype for products with
      wide sums.
    """
    if dtype is None:
        yield
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    with (
        parameters_in(model, dtype, keep=(embeddings, head)),
        embeddings.register_forward_hook(lambda module, inputs, output: output.to(dtype)),
        low_weight_in(head, dtype, is_trained=any(parameter.requires_grad for parameter in model.parameters())),
    ):
        yield


@contextmanager
def low_weight_in(head: nn.Module, dtype: torch.dtype, is_trained: bool) -> Iterator[None]:
    """Keep one low_weight() of a head for all passes in a with block.

    Args:
        is_trained: whether the model has trained weights. A CPU needs the copy for gradients alone.
    """
    weight: Tensor = head.weight  # type: ignore[assignment]
    is_needed = has_wide_products(weight.device) or (is_trained and torch.is_grad_enabled())
    if not is_needed or low_weight(head, dtype) is not None:  # an outer block has made it
        yield
        return
    head.low_weight = weight, copy_for_products(weight, dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.low_weight


def low_weight(head: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The head's copy in dtype, [rows of copy_for_products(), hidden size]; None outside of low_weight_in()."""
    weight, copy = getattr(head, "low_weight", (None, None))
    return copy if weight is head.weight and copy is not None and copy.dtype == dtype else None


def cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The working copy of a weight; gradients reach the weight."""
    return parameter.to(dtype)


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
    originals = list(_cast_parameters(module, dtype, keep))
    copies: dict[int, Tensor] = {}  # one per parameter, shared or not
    try:
        for child, name, parameter in originals:
            if id(parameter) not in copies:
                copies[id(parameter)] = cast(parameter, dtype)
            # A plain tensor may stand in for a parameter here, though not in module.weight = ...
            child._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for child, name, parameter in originals:
            child._parameters[name] = parameter


@torch.no_grad()
def round_masters(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Round trained weights in place to dtype, where run_in_dtype() casts.

    Weights stored in fp16 often lie halfway between two bf16 values. The smallest update would move their copies by a
    whole bf16 step. Rounding leaves the copies as they are.

    Returns:
        whether a weight of this rank changed.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # The output of plain embeddings is cast, so they are rounded too. A scaled output is cast after the product.
    keep = [head] if type(embeddings) is nn.Embedding else [embeddings, head]
    kept = {id(parameter) for module in keep for parameter in module.parameters()}  # embeddings tied to the head too
    has_changed = False
    for _, _, parameter in _cast_parameters(model, dtype, keep):
        if parameter.requires_grad and id(parameter) not in kept:
            master = local_shard(parameter)
            rounded = master.to(dtype).to(master.dtype)
            has_changed = has_changed or not torch.equal(master, rounded)
            master.copy_(rounded)
    return has_changed


def _cast_parameters(
    module: nn.Module, dtype: torch.dtype, keep: Iterable[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (owner, name, parameter) of all parameters in another dtype, but for modules to keep."""
    kept = {module for submodule in keep for module in submodule.modules()}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if child in kept or parameter is None or parameter.dtype == dtype:
                continue
            is_packed = name == "weight" and getattr(child, "is_quantized", False)  # its dtype is for storage only
            if parameter.is_floating_point() and not is_packed:
                yield child, name, parameter
