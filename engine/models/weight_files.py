"""The weights of checkpoints: by name, and one tensor at a time from files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from engine.models.adapter_files import ADAPTER, trained_parameters
from engine.models.adapters import adapter_of
from engine.models.archives import WEIGHTS
from engine.models.parameters import named_weights


def weights_kind(policy: PreTrainedModel) -> str:
    """The prefix of a policy's weight files: adapter or full model."""
    return WEIGHTS if adapter_of(policy) is None else ADAPTER


def checkpoint_weights(policy: PreTrainedModel) -> dict[str, Tensor]:
    """The weights in a policy's checkpoints, by name: trained with adapters, else all."""
    return named_weights(policy) if adapter_of(policy) is None else dict(trained_parameters(policy))


def tensors_of(directory: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all files of a kind, one at a time."""
    for path in sorted([*directory.glob(f"{kind}.safetensors"), *directory.glob(f"{kind}-*-of-*.safetensors")]):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                yield name, file.get_tensor(name)


def write_policy_pt(directory: Path, num_examples: int, aliases: Mapping[str, str], metrics: dict[str, float]) -> None:
    """Add a policy.pt {step_idx, state, metrics}, as the reference implementation writes it.

    Args:
        directory: with the weights.
        aliases: second names of shared weights -> first names.
    """
    state = dict(tensors_of(directory, WEIGHTS))  # memory-mapped
    state |= {name: state[first] for name, first in aliases.items()}
    torch.save({"step_idx": num_examples, "state": state, "metrics": metrics}, directory / "policy.pt")
