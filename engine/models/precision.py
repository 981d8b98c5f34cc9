"""Run a model in another dtype than its stored weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.models.adapters import REFERENCE_ADAPTER, TRAINED_ADAPTER
from engine.models.rounding import (
    CUT_OFF,
    RoundedCopy,
    embedding_thresholds,
    has_thresholds,
    round_by,
    weight_thresholds,
)
from engine.models.score_head import has_score_head, head_of
from engine.models.shards import ShardPermutations, local_shard
from engine.models.wide_products import copy_for_products, takes_low_weight

UPPER_HALF = -1 << CUT_OFF  # of the bits of an int32
HEAD = "head"  # its name for thresholds, in every model


@contextmanager
def run_in_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Run model in dtype in a with block.

    - None is for the dtype of the weights, and for shards: FSDP casts them. Here they are rounded.
    - Embeddings keep their dtype, as few of their rows are used. Their output is cast.
    - The head keeps its dtype, as its results are summed over many tokens. An LM head gets a copy in dtype for products
      with wide sums.
    """
    if dtype is None:
        with getattr(model, "rounded_shards", nullcontext)():
            yield
        return
    embeddings, head = model.get_input_embeddings(), head_of(model)
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    with (
        parameters_in(model, dtype, keep=(embeddings, head)),
        embeddings.register_forward_hook(partial(cast_embeddings, dtype)),
        nullcontext() if has_score_head(model) else low_weight_in(head, dtype, is_trained),
    ):
        yield


@contextmanager
def low_weight_in(head: nn.Module, dtype: torch.dtype, is_trained: bool) -> Iterator[None]:
    """Keep one low_weight() of a head for all passes in a with block.

    Args:
        is_trained: whether the model has trained weights. Their gradients need the copy everywhere.
    """
    weight: Tensor = head.weight  # type: ignore[assignment]
    is_needed = takes_low_weight(weight.device, dtype) or (is_trained and torch.is_grad_enabled())
    if not is_needed or _kept_copy(head, dtype) is not None:  # an outer block has made it
        yield
        return
    head.low_weight = weight, _low_copy(head, dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.low_weight


def low_weight(head: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """This rank's copy of the head's weight in dtype, [rows of copy_for_products(), hidden size].

    It is the one of low_weight_in() inside of that block. Without gradients it is None where fp32 weights are used.
    """
    kept = _kept_copy(head, dtype)
    if kept is not None:
        return kept
    is_needed = torch.is_grad_enabled() or takes_low_weight(head.weight.device, dtype)  # type: ignore[arg-type]
    return _low_copy(head, dtype) if is_needed else None


def _kept_copy(head: nn.Module, dtype: torch.dtype) -> Tensor | None:
    weight, copy = getattr(head, "low_weight", (None, None))
    return copy if weight is head.weight and copy is not None and copy.dtype == dtype else None


def _low_copy(head: nn.Module, dtype: torch.dtype) -> Tensor:
    weight: Tensor = head.weight  # type: ignore[assignment]
    thresholds = weight_thresholds(HEAD, weight) if has_thresholds(weight, dtype) else None
    return copy_for_products(local_shard(weight), dtype, thresholds)


def cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The working copy of a weight; gradients reach the weight."""
    if not has_thresholds(weight, dtype):
        return weight.to(dtype)
    return RoundedCopy.apply(weight, weight_thresholds(name, weight))


def cast_embeddings(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Cast the output of embeddings; a forward hook, once dtype is given."""
    if not has_thresholds(output, dtype):
        return output.to(dtype)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return RoundedCopy.apply(output, embedding_thresholds(inputs[0], weight.shape[0], output))


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
    names = _threshold_names(module)
    originals = list(_cast_parameters(module, dtype, keep))
    copies: dict[int, Tensor] = {}  # one per parameter, shared or not
    try:
        for child, name, parameter in originals:
            if id(parameter) not in copies:
                copies[id(parameter)] = cast(names[id(parameter)], parameter, dtype)
            # A plain tensor may stand in for a parameter here, though not in module.weight = ...
            child._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for child, name, parameter in originals:
            child._parameters[name] = parameter


@contextmanager
def rounded_shards(model: PreTrainedModel, permutations: ShardPermutations) -> Iterator[None]:
    """Round FSDP's shards to bf16 in a with block, by thresholds.

    FSDP's own cast then changes nothing. The fp32 weights return after the block, bitwise:
    - Two bytes per weight keep the lower half of its bits.
    - The lowest bit in the shard says whether the upper half was rounded up.
    """
    if getattr(model, "has_rounded_shards", False):  # by an outer block
        yield
        return
    names = _threshold_names(model)
    keep = (model.get_input_embeddings(), head_of(model))
    weights = {id(weight): weight for _, _, weight in _cast_parameters(model, torch.bfloat16, keep)}
    kept = []  # bits of a shard, and the lower half of each weight
    try:
        model.has_rounded_shards = True
        for weight in weights.values():  # each once, shared or not
            if has_thresholds(weight, torch.bfloat16):
                shard, name = local_shard(weight).detach(), names[id(weight)]
                rounded = round_by(shard, weight_thresholds(name, weight, permutations.get(name)))
                bits, upper = shard.view(torch.int32), rounded.view(torch.int16).int() << CUT_OFF
                marked = upper | (upper != bits & UPPER_HALF)  # FSDP's cast drops so small a part
                kept.append((bits, bits.to(torch.int16)))
                bits.copy_(marked)
        yield
    finally:
        if any(bits.device.type == "cpu" for bits, _ in kept) and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies of offloaded shards to the GPU may be under way
        for bits, lower in kept:
            bits.copy_((bits & UPPER_HALF) - ((bits & 1) << CUT_OFF) | (lower.int() & ~UPPER_HALF))
        model.has_rounded_shards = False


def _threshold_names(module: nn.Module) -> dict[int, str]:
    """id of a parameter -> its name, for thresholds.

    The reference's frozen adapters take the names of the trained ones.
    """
    named = module.named_parameters()
    return {id(weight): name.replace(f".{REFERENCE_ADAPTER}", f".{TRAINED_ADAPTER}") for name, weight in named}


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
