"""KL divergences of policy and reference, estimated on sampled responses."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.data.examples import Example
from engine.models.hashing import reference_hash_spec, weights_hash
from engine.placement.memory import fits_twice
from engine.placement.placement import Placement
from engine.settings.schema import Settings
from engine.step.divergence import Divergence, compare
from engine.step.layout import Microbatch
from engine.step.microbatches import MicrobatchRunner
from engine.step.reference import LiveReference
from engine.step.reference_cache import CachedReference
from utils import is_out_of_memory


class KLMeter:
    """Measures KL divergences of policy and reference, in nats per response.

    - forward_kl_eval: KL(reference || policy), on the reference's samples. These are drawn once. With cached log-probs
      it costs one forward pass of the policy.
    - kl_eval: KL(policy || reference), on the policy's samples. It needs the reference as a model. If none is loaded,
      it is measured in the last evaluation alone: the reference is loaded for it.

    Args:
        say: prints a notice.

    Attributes:
        prompts: of the samples.
        reference_samples: the reference's response to each prompt, int32 [response tokens]; empty without a reference.
        adapters_off: the policy as its own reference; None if it cannot be.
        reference_hash: of the reference's weights; None without a reference.
    """

    def __init__(
        self,
        settings: Settings,
        placement: Placement,
        runner: MicrobatchRunner,
        prompts: Sequence[np.ndarray],
        say: Callable[[str], None],
    ):
        self.reference_samples: list[np.ndarray] = []
        self.adapters_off: LiveReference | None = None
        self.reference_hash: str | None = None
        self._settings, self._placement, self._runner = settings, placement, runner
        self.prompts, self._say = prompts, say

    def microbatches(self, responses: Sequence[np.ndarray], token_budget: int) -> list[list[Example]]:
        """The prompts with one response each, split into microbatches for all ranks."""
        pairs = zip(self.prompts, responses, strict=True)
        examples = [Example(prompt, (response,), index) for index, (prompt, response) in enumerate(pairs)]
        return self._placement.split_batch(examples, 1, token_budget)

    @torch.no_grad()
    def measure(self, samples: Sequence[np.ndarray], token_budget: int, is_last: bool) -> dict[str, float]:
        """Metrics of the policy. All ranks call this together.

        Args:
            samples: the policy's response to each prompt.
            is_last: this evaluation is the last of the run.
        """
        reference = self._runner.reference
        if reference is None:
            return {}
        model = reference if isinstance(reference, LiveReference) else self.adapters_off
        if model is not None or not is_last:
            return self._measure(samples, token_budget, model)
        try:
            return self._measure(samples, token_budget, self._load_reference())
        except RuntimeError as error:  # on one of several ranks: the others wait in it, so the run ends
            if not is_out_of_memory(error) or self._placement.num_ranks > 1:
                raise
            self._say(f"kl_eval is left out: the reference beside the policy needs too much memory ({error})")
        return self._measure(samples, token_budget, None)

    def _measure(
        self, samples: Sequence[np.ndarray], token_budget: int, model: LiveReference | None
    ) -> dict[str, float]:
        """Metrics of the policy.

        Args:
            model: the reference; None if its log-probs are cached alone.
        """
        runner, reference = self._runner, self._runner.reference
        policy = LiveReference(runner.policy, runner.compute_dtype)
        metrics: dict[str, float] = {}
        with runner.in_mixed_precision(), model.in_mixed_precision() if model else nullcontext():
            if model is not None:
                divergence = partial(compare, policy, model)
                metrics |= self._estimate("kl_eval", samples, token_budget, divergence)
            if self._settings.reference_refresh.every is None:  # else the samples are of an earlier reference
                assert reference is not None
                divergence = partial(_compare_forward, model or reference, policy)
                metrics |= self._estimate("forward_kl_eval", self.reference_samples, token_budget, divergence)
        return metrics

    def _estimate(
        self,
        name: str,
        responses: Sequence[np.ndarray],
        token_budget: int,
        divergence: Callable[[Microbatch], Divergence],
    ) -> dict[str, float]:
        """Means over the responses of all ranks, with their standard errors."""
        found = []
        for examples in self._placement.rank_slice(self.microbatches(responses, token_budget)):
            of_batch = divergence(self._runner.lay_out(examples))
            found.append([None if values is None else values.double().cpu() for values in of_batch])
        of_ranks = [each for of_rank in self._placement.gather_from_data_ranks(found) for each in of_rank]
        metrics: dict[str, float] = {}
        for key, values in zip((name, f"{name}/next_token"), zip(*of_ranks, strict=True), strict=True):
            if values[0] is not None:
                metrics |= mean_and_error(key, torch.cat(values))
        if not all(map(math.isfinite, metrics.values())):
            self._say(f"{name} is left out: it is NaN or Inf")
            return {}
        return metrics

    def _load_reference(self) -> LiveReference | None:
        """The reference as a model, or None with a notice. It takes the memory that training had for gradients."""
        settings, placement, device = self._settings, self._placement, self._placement.device
        lacks_room = torch.tensor([not fits_twice(self._runner.policy)], dtype=torch.float64, device=device)
        placement.all_reduce_sum(lacks_room)
        try:
            if lacks_room.item():
                raise OSError("the GPU has no room for it")
            dtype = settings.model.reference_dtype or settings.model.policy_dtype
            model = placement.place_again(getattr(torch, dtype))
            found = weights_hash(model, placement.permutations, *reference_hash_spec(model))
            if found != self.reference_hash:
                raise OSError("its files have changed since the start of the run")
        except OSError as error:
            self._say(f"kl_eval is left out: the reference cannot be loaded ({error})")
            return None
        return LiveReference(model.requires_grad_(False), placement.compute_dtype)


def _compare_forward(
    reference: LiveReference | CachedReference, policy: LiveReference, batch: Microbatch
) -> Divergence:
    if isinstance(reference, CachedReference):
        return Divergence(reference.logps(batch) - policy.logps(batch), None)
    return compare(reference, policy, batch)


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """The mean of independent values [samples], and its standard error if there are two or more."""
    metrics = {name: values.mean().item()}
    if len(values) > 1:
        metrics[f"{name}/standard_error"] = values.std().item() / math.sqrt(len(values))
    return metrics
