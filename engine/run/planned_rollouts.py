"""Online training in a plan: the longest responses in place of samples, and the memory of sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache

from engine.data.examples import Example, Rollout
from engine.models.generation import ready_to_sample
from engine.run.simulation import Simulated, gathered_shape
from engine.settings.schema import Settings
from engine.step.rollout_source import SampledResponses

if TYPE_CHECKING:  # trainers import the engine, not the other way round
    from trainers import BasicTrainer

PROBE_TOKENS = 8


def plan_rollouts(trainer: "BasicTrainer", source: SampledResponses) -> None:
    """Give a simulated trainer the longest responses, and evaluations those whose KL they measure."""
    settings = trainer.settings
    source.roll_out = LongestResponses(settings)
    measured = trainer.evaluator.examples if settings.has_live_reference else []
    trainer.evaluator.examples = [longest_responses(settings, prompt, 1) for prompt in measured]


class LongestResponses:
    """Gives each prompt responses that are as long as they can be."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.metrics: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def make(self, first_prompt: int, prompts: Sequence[Example], *, again: bool = False) -> list[Example]:
        return [longest_responses(self._settings, prompt, self._settings.rollout.num_responses) for prompt in prompts]


def longest_responses(settings: Settings, prompt: Example, number: int) -> Example:
    """A prompt with some of the longest responses to it. All of them differ, as samples do."""
    num_tokens = min(settings.max_new_tokens, settings.max_length - len(prompt.prompt))
    responses = tuple(np.full(num_tokens, index, dtype=np.int32) for index in range(number))
    values = (np.zeros(num_tokens),) * number
    return replace(prompt, responses=responses, rollout=Rollout((), values, values, values))


@dataclass(frozen=True)
class PlannedSampling:
    """The memory of sampling an iteration, in a process.

    Args:
        num_rows: responses at a time.
        num_tokens: of a prompt and its response, at most.
        cache: bytes of their keys and values.
        peak: bytes held at most, with all that stays between steps.
    """

    num_rows: int
    num_tokens: int
    cache: int
    peak: int


def measure_sampling(trainer: "BasicTrainer", state: int) -> PlannedSampling:
    """The memory of sampling with the longest prompt and responses.

    Args:
        state: bytes held between steps.
    """
    placement, policy, rollout = trainer.placement, trainer.policy, trainer.settings.rollout
    assert isinstance(placement, Simulated)
    settings = trainer.settings
    with placement.simulated(), torch.no_grad(), ready_to_sample(policy):
        cache = DynamicCache()
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)
        policy(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        states = tree_leaves([(layer.keys, layer.values) for layer in cache.layers])
        per_token = sum(each.nbytes for each in states if isinstance(each, torch.Tensor)) / PROBE_TOKENS
    longest = max(len(example.prompt) for example in trainer.train_examples)
    num_tokens = min(longest + settings.max_new_tokens, settings.max_length)
    num_prompts = -(-(rollout.prompts or settings.batch_size) // placement.num_data_ranks)
    num_rows = min(rollout.num_responses * num_prompts, max(rollout.max_rows, rollout.num_responses))
    num_bytes = int(per_token * num_rows * num_tokens)
    gathered = 0
    if placement.mesh_or_none is not None:
        gathered = sum(
            torch.Size(gathered_shape(parameter)).numel() * parameter.itemsize for parameter in policy.parameters()
        )
    # Rows that leave are copied out of the others, so both are there for a moment.
    return PlannedSampling(num_rows, num_tokens, num_bytes, state + gathered + 2 * num_bytes)
