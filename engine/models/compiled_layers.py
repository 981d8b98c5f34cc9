"""Compile transformer layers. With and without gradients, they give the same bits."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache

from utils import UserError, has_c_compiler

Call = Callable[..., Any]


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where nothing builds the code: Triton wants a C compiler, a CPU's code one of C++.

    Raises:
        UserError: there is none.
    """
    if device.type == "cuda":
        has_compiler, name, variable = has_c_compiler(), "C", "CC"
    else:
        from torch._inductor import config  # slow to import

        names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple) else (config.cpp.cxx,)
        has_compiler, name, variable = any(shutil.which(each) for each in names if each), "C++", "CXX"
    if not has_compiler:
        what = f"compile=true: no {name} compiler was found"
        raise UserError("CONFIG", what, f"install gcc and g++, name a compiler in {variable}, or set compile=false")


def compile_layers(layers: Sequence[nn.Module], embeddings: nn.Module) -> None:
    """Compile layers in place, as one graph for all of them and for all row lengths.

    Without gradients a compiler would fuse other operations, and add a bias before or after rounding. So evaluations
    and the reference run the graph of training too, layer by layer: no activations are kept.

    Args:
        layers: in order.
        embeddings: what gives the first layer its input.
    """
    has_trained_input = any(parameter.requires_grad for parameter in embeddings.parameters())
    for layer in layers:
        # Round wherever the plain layer rounds.
        layer.compile(dynamic=True, options={"emulate_precision_casts": True})
        assert layer._compiled_call_impl is not None
        layer._compiled_call_impl = as_in_training(layer._compiled_call_impl, layer, has_trained_input)
        has_trained_input |= any(parameter.requires_grad for parameter in layer.parameters())


def as_in_training(compiled: Call, layer: nn.Module, has_trained_input: bool) -> Call:
    """A compiled call of a layer that also runs the graph of training where gradients are off."""
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    without_dropout = [module for module in layer.modules() if not getattr(module, "p", 0)]

    def call(*arguments: Any, **options: Any) -> Any:
        samples = any(isinstance(value, Cache) for value in (*arguments, *options.values()))
        # A cache would keep the graphs of all its tokens. Some models of the hub name their arguments.
        if torch.is_grad_enabled() or samples or not arguments:
            return compiled(*arguments, **options)
        hidden, *others = arguments
        hidden = hidden.detach().requires_grad_(has_trained_input)
        with torch.enable_grad(), _requiring_grad(layer, trained), _training(without_dropout):
            return tree_map_only(Tensor, Tensor.detach, compiled(hidden, *others, **options))

    return call


@contextmanager
def _requiring_grad(layer: nn.Module, names: set[str]) -> Iterator[None]:
    """Let the weights of these names require gradients in a with block. Copies in another dtype do not."""
    named = layer.named_parameters(remove_duplicate=False)
    frozen = [weight for name, weight in named if name in names and not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def _training(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set modules to training mode in a with block."""
    changed = [module for module in modules if not module.training]
    for module in changed:
        module.training = True
    try:
        yield
    finally:
        for module in changed:
            module.training = False
