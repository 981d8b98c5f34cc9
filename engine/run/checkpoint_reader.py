"""Restore weights and optimizer state from a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models.archives import CRITIC_OPTIMIZER, OPTIMIZER, REFERENCE
from engine.models.weight_files import tensors_of, weights_kind
from engine.placement.placement import Placement
from engine.run.critic import Critic
from engine.run.resume_check import read_state_file, unreadable
from engine.step.sources import Source
from utils import UserError, is_out_of_memory


def restore_checkpoint(
    checkpoint: Path,
    placement: Placement,
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    reference: PreTrainedModel | None = None,
    critic: Critic | None = None,
) -> None:
    """Load weights and optimizer state. Each rank reads its shards, whatever ranks wrote them.

    Args:
        reference: a moving reference. A checkpoint without one leaves it: it had not moved.
        critic: of PPO.

    Raises:
        UserError: CHECKPOINT if the checkpoint is unreadable or does not fit the model.
    """
    has_reference = any(checkpoint.glob(f"{REFERENCE}*.safetensors"))
    if has_reference and reference is None:
        problem = f"resume: the reference of the run at {checkpoint} moved, and reference_refresh.every is null"
        raise UserError("CONFIG", problem, "set it, or start a new run from its weights with model.archive")
    with _as_checkpoint_errors(checkpoint):
        state = state_by_parameter(checkpoint, optimizer)
        placement.restore(policy, optimizer, tensors_of(checkpoint, weights_kind(policy)), state)
        if reference is not None and has_reference:
            placement.restore_weights(reference, tensors_of(checkpoint, REFERENCE))
        if critic is not None:
            critic.restore(checkpoint, state_by_parameter(checkpoint, critic.optimizer, CRITIC_OPTIMIZER))


def restore_source(source: Source, checkpoint: Path) -> None:
    """Load what a checkpoint keeps of the source.

    Raises:
        UserError: CHECKPOINT if it is unreadable.
    """
    with _as_checkpoint_errors(checkpoint):
        source.restore(checkpoint)


@contextmanager
def _as_checkpoint_errors(checkpoint: Path) -> Iterator[None]:
    """Turn every error inside a with block into CHECKPOINT, but for a lack of memory."""
    try:
        yield
    except Exception as error:  # a damaged file raises nearly anything
        if is_out_of_memory(error) or (isinstance(error, UserError) and error.code == "CHECKPOINT"):
            raise
        raise unreadable(checkpoint, error) from error


def state_by_parameter(
    checkpoint: Path, optimizer: torch.optim.Optimizer, kind: str = OPTIMIZER
) -> dict[str, dict[str, Tensor]]:
    """The optimizer state in a checkpoint: parameter name -> kind of state -> value.

    Empty, with a notice, for another kind of optimizer. Only resume_allow permits one.

    Args:
        kind: the prefix of its files.
    """
    state: dict[str, dict[str, Tensor]] = {}
    before, now = read_state_file(checkpoint)["settings"]["optimizer"], type(optimizer).__name__
    if before != now:
        print(f"optimizer: the state of {now} is reset, as the checkpoint holds the state of {before}")
        return state
    for name, tensor in tensors_of(checkpoint, kind):
        owner, _, key = name.rpartition(".")
        state.setdefault(owner, {})[key] = tensor
    return state
