"""Objectives: losses and metrics of examples, from the log-probs of their response tokens."""

from typing import Any, Protocol

import torch
from torch import Tensor

from engine.settings.schema import LossSettings
from engine.step.layout import GroupSpan, Microbatch
from engine.step.logprobs import sum_by_response
from engine.step.metrics import MetricAccumulator
from losses import LOSSES, BatchKind, Loss
from utils import UserError


class Objective(Protocol):
    """Turns token log-probs into losses and metrics.

    Attributes:
        batch: the kind of examples in a batch.
        needs_reference: needs log-probs of a frozen reference model.
    """

    batch: BatchKind
    needs_reference: bool

    def losses(
        self,
        token_logps: Tensor,
        batch: Microbatch,
        span: GroupSpan,
        reference_logps: Tensor | None,
        metrics: MetricAccumulator,
    ) -> Tensor:
        """Losses of a span's examples, [examples of the span].

        Args:
            token_logps: of the targets of the span, [targets of the span].
            reference_logps: of all responses of the batch, [responses]; None without a reference.
            metrics: gets one value per example and metric.
        """
        ...


class SequenceObjective:
    """Applies a loss of losses.py to one log-prob per response.

    This is the sum or mean over its tokens.
    """

    def __init__(self, loss: Loss, settings: LossSettings):
        self.batch = loss.batch
        self.needs_reference = "reference" in loss.needs and not settings.keywords.get("reference_free", False)
        self._loss, self._settings = loss, settings
        self._averages = loss.log_probs == "means" or settings.average_log_prob

    def losses(
        self,
        token_logps: Tensor,
        batch: Microbatch,
        span: GroupSpan,
        reference_logps: Tensor | None,
        metrics: MetricAccumulator,
    ) -> Tensor:
        settings, lengths = self._settings, batch.response_lengths[span.responses]
        scale = lengths if self._averages else 1
        sums = sum_by_response(token_logps, lengths)  # [responses of the span]

        def by_role(values: Tensor) -> list[Tensor]:  # [responses of the span] -> chosen, rejected [examples]
            roles = (batch.chosen, batch.rejected)
            return [values[role[span.examples] - span.responses.start] for role in roles if role is not None]

        policy = by_role(sums / scale)
        metrics.add(**{f"logps/{role}": value for role, value in zip(("chosen", "rejected"), policy, strict=False)})
        reference: list[Tensor] = []
        if reference_logps is not None:
            reference = by_role(reference_logps[span.responses].to(sums.dtype) / scale)
        elif "reference" in self._loss.needs:  # reference_free
            reference = [torch.zeros_like(value) for value in policy]
        losses = self._add_metrics(self._loss.function(*policy, *reference, **settings.keywords), metrics)
        if settings.sft_weight:
            losses = losses - settings.sft_weight * by_role(sums / lengths)[0]
        metrics.add(loss=losses)
        return losses

    def _add_metrics(self, output: Any, metrics: MetricAccumulator) -> Tensor:
        """Return the losses of a loss function's output; add the rest to metrics.

        Raises:
            UserError: CONFIG, for an output of another form.
        """
        losses, *rest = output if isinstance(output, tuple) else (output,)
        own_metrics = rest.pop() if rest and isinstance(rest[-1], dict) else {}
        num_rewards = 2 if self.batch == "pairs" else 0
        if len(rest) != num_rewards or "loss" in own_metrics:
            problem = f"loss.name: {self._settings.name} returns {len(rest)} rewards and metrics {[*own_metrics]}"
            fix = f"return losses, {num_rewards} rewards, and a dict of metrics with names other than loss"
            raise UserError("CONFIG", problem, fix)
        metrics.add(**own_metrics)
        if rest:
            chosen_rewards, rejected_rewards = rest
            metrics.add(
                **{
                    "rewards/chosen": chosen_rewards,
                    "rewards/rejected": rejected_rewards,
                    "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
                    "rewards/margins": chosen_rewards - rejected_rewards,
                }
            )
        return losses


def make_objective(settings: LossSettings) -> Objective:
    """The objective of the settings' loss."""
    return SequenceObjective(LOSSES[settings.name], settings)
