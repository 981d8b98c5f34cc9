"""The contents of a checkpoint: weights, optimizer state, model config, tokenizer and training state."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.models.adapter_files import write_adapter_config
from engine.models.adapters import adapter_of
from engine.models.archives import OPTIMIZER, REFERENCE, STATE_FILE
from engine.models.weight_files import weights_kind, write_policy_pt
from engine.placement.placement import Placement
from engine.run.checkpoint_writer import CheckpointWriter, Contents
from engine.run.critic import Critic


def start_save(
    writer: CheckpointWriter,
    placement: Placement,
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    *,
    policy_pt_metrics: dict[str, float] | None,
    is_best: bool,
    reference: PreTrainedModel | None = None,
    critic: Critic | None = None,
    write_source: Callable[[Path], None] | None = None,
) -> None:
    """Copy weights and optimizer state to the CPU, and start writing a checkpoint. All ranks call this together.

    Args:
        state: the training state; contains counters["examples"].
        policy_pt_metrics: metrics for a policy.pt; None for a checkpoint without one.
        is_best: BEST will link to the checkpoint.
        reference: a moving reference, to be saved too; critic: likewise.
        write_source: writes the state of the source into a directory.
    """
    num_examples, adapter = state["counters"]["examples"], adapter_of(policy)
    contents = Contents()
    weights, optimizer_state = placement.named_tensors(policy, optimizer)
    contents.add(weights_kind(policy), weights, placement.permutations, in_one=adapter is not None)
    contents.add(OPTIMIZER, optimizer_state, placement.permutations)
    if reference is not None:
        contents.add(REFERENCE, placement.named_weights(reference), placement.permutations)
    if critic is not None:
        critic.add_to(contents)
    # Copies: sampling changes the originals while the writer runs.
    model_config, generation_config = copy.deepcopy((policy.config, policy.generation_config))
    has_policy_pt = policy_pt_metrics is not None and adapter is None  # for adapters, export.py makes one

    def write_rest(directory: Path) -> None:
        if adapter is not None:
            write_adapter_config(adapter, directory)
        else:
            model_config.save_pretrained(directory)
            if generation_config is not None:
                generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / STATE_FILE).write_text(json.dumps(state, indent=1))
        if write_source is not None:
            write_source(directory)
        if has_policy_pt:
            write_policy_pt(directory, num_examples, placement.aliases, policy_pt_metrics or {})

    policy_pt_bytes = sum(tensor.nbytes for tensor in weights.values()) if has_policy_pt else 0
    writer.start(num_examples, contents, write_rest, policy_pt_bytes, is_best)
