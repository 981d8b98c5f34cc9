"""Run policy, reference and objective over microbatches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.models.precision import run_in_dtype
from engine.step.heads import run_head
from engine.step.layout import GroupSpan, Microbatch, empty_microbatch, lay_out
from engine.step.metrics import MetricAccumulator
from engine.step.objectives import Objective
from engine.step.reference import LiveReference, Reference
from engine.step.reference_cache import CachedReference


class Prepared(NamedTuple):
    """A microbatch on the device, with cached reference log-probs [responses]."""

    microbatch: Microbatch
    reference_logps: Tensor | None


@dataclass
class Batch:
    """The examples of one step on all ranks, and the microbatches of this rank."""

    examples: list[Example]
    token_budget: int
    microbatches: list[Prepared]


class MicrobatchRunner:
    """Lays examples out, and computes their loss with policy, reference and objective.

    Args:
        layout: "packed" or "padded".
        device: of the LM head; batches go there.
        compute_dtype: dtype of forward and backward passes; None for the dtype of the weights.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        objective: Objective,
        *,
        layout: str,
        pad_token_id: int,
        device: torch.device,
        compute_dtype: torch.dtype | None,
    ):
        self.policy, self.objective = policy, objective
        self.compute_dtype = compute_dtype
        self.reference: Reference | None = None
        self._layout, self._pad_token_id, self._device = layout, pad_token_id, device

    def lay_out(self, examples: Sequence[Example]) -> Microbatch:
        """Examples as one microbatch on the device. Without examples, an empty one."""
        if not examples:
            return empty_microbatch(2 if self.objective.batch == "pairs" else 1, self._layout).to(self._device)
        return lay_out(examples, self._layout, self._pad_token_id).to(self._device)

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """lay_out(), with the log-probs of a cached reference."""
        microbatch = self.lay_out(examples)
        logps = self.reference.logps(microbatch) if isinstance(self.reference, CachedReference) else None
        return Prepared(microbatch, logps)

    def loss(self, prepared: Prepared, num_examples: int, metrics: MetricAccumulator) -> Tensor:
        """A microbatch's share of the mean loss, a scalar for backward().

        The mean is over num_examples examples of the batch.
        """
        batch, reference_logps = prepared
        if isinstance(self.reference, LiveReference):
            reference_logps = self.reference.logps(batch)

        def span_loss(token_logps: Tensor, span: GroupSpan) -> Tensor:
            losses = self.objective.losses(token_logps, batch, span, reference_logps, metrics)
            return losses.sum() / num_examples

        loss, _ = run_head(self.policy, batch, span_loss)
        metrics.num_tokens += batch.num_tokens
        return loss

    @contextmanager
    def in_mixed_precision(self) -> Iterator[None]:
        """Run policy and live reference in compute_dtype in a with block.

        Each weight is cast once.
        """
        reference = self.reference.in_mixed_precision() if isinstance(self.reference, LiveReference) else nullcontext()
        with run_in_dtype(self.policy, self.compute_dtype), reference:
            yield
