"""Objectives: losses and metrics of examples, from log-probs of response tokens or from scores."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.settings.keys import keyword_names
from engine.settings.schema import LossSettings
from engine.step.layout import GroupSpan, Microbatch
from engine.step.logprobs import sum_by_response
from engine.step.metrics import MetricAccumulator
from engine.step.reward_metrics import ScoredRankings
from engine.step.sampled_pairs import pair_loss_of
from losses import LOSSES, BatchKind, Head, Loss, Need
from reward_losses import mean_over_pairs, of_pairs
from utils import UserError

NO_COLUMNS: Mapping[str, Tensor] = {}
ROLES = {"sft": ("chosen",), "pairs": ("chosen", "rejected"), "unpaired": ("response",)}


@dataclass(frozen=True)
class LossInputs:
    """What a loss reads of some examples, [examples] each.

    Args:
        arguments: of the loss function, before its scalars.
        chosen_means: log-prob per token of the chosen response, for sft_weight.
        weights: of the losses.
        lengths: of ranked responses, in tokens, [examples, k], 0 where there is none; for metrics.
    """

    arguments: list[Tensor]
    chosen_means: Tensor
    weights: Tensor
    lengths: Tensor | None = None

    @property
    def columns(self) -> list[Tensor]:
        return [*self.arguments, self.chosen_means, self.weights]

    def with_columns(self, columns: Sequence[Tensor]) -> "LossInputs":
        """The inputs of other examples."""
        *arguments, chosen_means, weights = columns
        return LossInputs(arguments, chosen_means, weights)


class Objective(Protocol):
    """Turns the outputs of a head into losses and metrics.

    Attributes:
        batch: the kind of examples in a batch.
        head: whose outputs it reads.
        needs: of the loss, without "reference" if its settings leave the reference out.
        state: scalars in fp64 that move with every update.
    """

    batch: BatchKind
    head: Head
    needs: Set[Need]
    state: dict[str, Tensor]

    def read(
        self,
        outputs: Tensor,
        batch: Microbatch,
        span: GroupSpan,
        reference_logps: Tensor | None,
        columns: Mapping[str, Tensor] = NO_COLUMNS,
    ) -> LossInputs:
        """What the loss reads of a span's examples.

        Args:
            outputs: of the head: log-probs [targets of the span], or scores [responses of the span].
            reference_logps: of all responses of the batch, [responses], or of all targets, [targets], with the need
                "shared length"; None without a reference, or with the need "token kl".
            columns: of the targets of the span, by TokenNeeds, [targets of the span] each.
        """
        ...

    def next_state(self, inputs: LossInputs, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state after a batch.

        Args:
            inputs: of all its examples.
            state: before it.
        """
        ...

    def losses(self, inputs: LossInputs, scalars: Sequence[Tensor], metrics: MetricAccumulator) -> Tensor:
        """Losses of some examples, [examples].

        Args:
            scalars: the mean log-ratio of mismatched responses, if needed, and the values of the state.
            metrics: gets one value per example and metric.
        """
        ...


class SequenceObjective:
    """Applies a loss of losses.py to one log-prob per response.

    This is the sum or mean over its tokens.
    """

    def __init__(self, loss: Loss, settings: LossSettings):
        self.batch, self.head = loss.batch, loss.head
        self.needs = settings.needs
        initial = loss.state.initial if loss.state else {}
        self.state = {name: torch.tensor(value, dtype=torch.float64) for name, value in initial.items()}
        self._loss, self._settings = loss, settings
        self._averages = loss.log_probs == "means" or settings.average_log_prob

    def read(
        self,
        outputs: Tensor,
        batch: Microbatch,
        span: GroupSpan,
        reference_logps: Tensor | None,
        columns: Mapping[str, Tensor] = NO_COLUMNS,
    ) -> LossInputs:
        lengths = batch.response_lengths[span.responses]
        scale = lengths if self._averages else 1
        sums = sum_by_response(outputs, lengths)  # [responses of the span]

        def by_role(values: Tensor) -> list[Tensor]:  # [responses of the span] -> chosen, rejected [examples]
            roles = (batch.chosen, batch.rejected)
            return [values[role[span.examples] - span.responses.start] for role in roles if role is not None]

        reference_tokens = columns.get("reference")
        if "shared length" in self.needs and reference_logps is not None:
            reference_tokens = reference_logps[span.targets].to(sums.dtype)
        arguments = policy = by_role(sums / scale)
        if reference_tokens is not None:
            arguments = policy + by_role(sum_by_response(reference_tokens, lengths) / scale)
        elif reference_logps is not None:
            arguments = policy + by_role(reference_logps[span.responses].to(sums.dtype) / scale)
        elif "reference" in self._loss.needs:  # reference_free, or a measurement before there is a reference
            arguments = policy + [torch.zeros_like(value) for value in policy]
        if "token kl" in self.needs:
            token_kls = columns["kl"] if "kl" in columns else torch.zeros_like(outputs)
            arguments = arguments + by_role(sum_by_response(token_kls, lengths))
        if "confidence" in self.needs:
            arguments = arguments + by_role(sum_by_response(columns["confidence"], lengths) / lengths)
        if "shared length" in self.needs:
            if reference_tokens is None:
                reference_tokens = torch.zeros_like(outputs)
            arguments = [
                *arguments,
                *_sum_shared(outputs, batch, span),
                *_sum_shared(reference_tokens, batch, span),
            ]
        if self.batch == "unpaired":
            assert batch.labels is not None
            arguments = [*arguments, batch.labels[span.examples]]
        weights = torch.ones_like(policy[0]) if batch.weights is None else batch.weights[span.examples]
        return LossInputs(arguments, by_role(sums / lengths)[0], weights)

    def next_state(self, inputs: LossInputs, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._loss.state is None:
            return {}
        return self._loss.state.update(*inputs.arguments, *state.values())

    def losses(self, inputs: LossInputs, scalars: Sequence[Tensor], metrics: MetricAccumulator) -> Tensor:
        settings = self._settings
        logps = zip(ROLES[self.batch], inputs.arguments, strict=False)
        metrics.add(**{f"logps/{role}": value for role, value in logps})
        output = self._loss.function(*inputs.arguments, *scalars, **settings.keywords)
        losses = self._add_metrics(output, inputs, metrics)
        if settings.sft_weight:
            losses = losses - settings.sft_weight * inputs.chosen_means
        losses = losses * inputs.weights
        metrics.add(loss=losses)
        return losses

    def _add_metrics(self, output: Any, inputs: LossInputs, metrics: MetricAccumulator) -> Tensor:
        """Return the losses of a loss function's output; add the rest to metrics.

        Raises:
            UserError: CONFIG, for an output of another form.
        """
        losses, *rest = output if isinstance(output, tuple) else (output,)
        own_metrics = rest.pop() if rest and isinstance(rest[-1], dict) else {}
        num_rewards = {"sft": 0, "pairs": 2, "unpaired": 1}[self.batch]
        if len(rest) != num_rewards or "loss" in own_metrics:
            problem = f"loss.name: {self._settings.name} returns {len(rest)} rewards and metrics {[*own_metrics]}"
            fix = f"return losses, {num_rewards} rewards, and a dict of metrics with names other than loss"
            raise UserError("CONFIG", problem, fix)
        metrics.add(**own_metrics)
        if self.batch == "pairs":
            if "reference" in self.needs:
                chosen, rejected, reference_chosen, reference_rejected = inputs.arguments[:4]
                metrics.add(
                    **{
                        "logratios/chosen": chosen - reference_chosen,
                        "logratios/rejected": rejected - reference_rejected,
                    }
                )
            chosen_rewards, rejected_rewards = rest
            metrics.add(
                **{
                    "rewards/chosen": chosen_rewards,
                    "rewards/rejected": rejected_rewards,
                    "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
                    "rewards/margins": chosen_rewards - rejected_rewards,
                }
            )
        if self.batch == "unpaired":
            labels = inputs.arguments[-1]
            metrics.add_where(labels, **{"rewards/desirable": rest[0]})
            metrics.add_where(~labels, **{"rewards/undesirable": rest[0]})
        return losses


class WindowObjective(SequenceObjective):
    """Applies a loss to the sum of the log-probs of a window. Weights make the mean over windows one over tokens."""

    def __init__(self, loss: Loss, settings: LossSettings):
        super().__init__(loss, settings)
        assert not loss.needs and loss.state is None and loss.log_probs == "sums"

    def losses(self, inputs: LossInputs, scalars: Sequence[Tensor], metrics: MetricAccumulator) -> Tensor:
        losses = self._loss.function(*inputs.arguments, **self._settings.keywords) * inputs.weights
        metrics.add(loss=losses)
        return losses


def _sum_shared(token_values: Tensor, batch: Microbatch, span: GroupSpan) -> tuple[Tensor, Tensor]:
    """Sums over the first min(|chosen|, |rejected|) tokens of chosen and rejected responses, [examples] each.

    Args:
        token_values: [targets of the span].
    """
    assert batch.shared_index is not None and batch.shared_lengths is not None
    first, last = span.examples.start, span.examples.stop
    index = batch.shared_index[batch.shared_offsets[first] : batch.shared_offsets[last]] - span.targets.start
    sums = sum_by_response(token_values[index], batch.shared_lengths[2 * first : 2 * last])
    return sums[0::2], sums[1::2]


class RankingObjective:
    """Applies a loss of reward_losses.py to one score per ranked response."""

    def __init__(self, loss: Loss, settings: LossSettings):
        self.batch, self.head, self.needs = loss.batch, loss.head, loss.needs
        self.state: dict[str, Tensor] = {}
        self._loss, self._settings = loss, settings

    def read(
        self,
        outputs: Tensor,
        batch: Microbatch,
        span: GroupSpan,
        reference_logps: Tensor | None,
        columns: Mapping[str, Tensor] = NO_COLUMNS,
    ) -> LossInputs:
        assert batch.rankings is not None and batch.pairs is not None
        assert batch.margins is not None and batch.pair_weights is not None
        rankings = batch.rankings[span.examples]  # [examples, k]
        numbers = rankings.clamp(min=span.responses.start)  # any response of the span where there is none
        scores = outputs[numbers - span.responses.start]
        lengths = batch.response_lengths[numbers].where(rankings >= 0, 0)
        margins, pair_weights = (each[span.examples].to(scores.dtype) for each in (batch.margins, batch.pair_weights))
        weights = scores.new_ones(len(scores)) if batch.weights is None else batch.weights[span.examples]
        arguments = [scores, batch.pairs[span.examples], margins, pair_weights]
        return LossInputs(arguments, scores.new_zeros(len(scores)), weights, lengths)

    def next_state(self, inputs: LossInputs, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def losses(self, inputs: LossInputs, scalars: Sequence[Tensor], metrics: MetricAccumulator) -> Tensor:
        output = self._loss.function(*inputs.arguments, **self._settings.keywords)
        losses, own_metrics = output if isinstance(output, tuple) else (output, {})
        losses = losses * inputs.weights
        scores, pairs, _, weights = inputs.arguments
        scores = scores.detach()
        better, worse = of_pairs(scores, pairs)
        of_pair = {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/accuracies": (better > worse).to(scores.dtype),
            "rewards/margins": better - worse,
        }
        means = {name: mean_over_pairs(values, weights) for name, values in of_pair.items()}
        metrics.add(loss=losses, **means, **own_metrics)
        assert inputs.lengths is not None
        metrics.add_spread(inputs.lengths > 0, **{"rewards/std": scores})
        if metrics.rankings is not None:
            metrics.rankings.append(ScoredRankings(scores, inputs.lengths, pairs, weights))
        return losses


@dataclass(frozen=True)
class RolloutInputs(LossInputs):
    """What a loss reads of sampled responses. Columns are of their tokens, [tokens] each.

    Args:
        lengths: of the samples, [samples].
        num_tokens: of the samples of each example, [examples].
        entropies: of the policy's distributions, with the need "entropy".
    """

    num_tokens: Tensor | None = None
    entropies: Tensor | None = None


class RolloutObjective:
    """Applies a loss of online_losses.py to the log-prob of each token of each sample."""

    def __init__(self, loss: Loss, settings: LossSettings):
        self.batch, self.head = loss.batch, loss.head
        self.needs = settings.needs
        self.state = initial_beta(loss, settings)
        self._function, self._ratios = loss.function, loss.ratios
        self._keywords = {name: settings.keywords[name] for name in keyword_names(loss.function)}
        if loss.learns_pairs:
            self._keywords["pair_loss"] = pair_loss_of(settings)
        self._clips = [settings.keywords[name] for name in ("clip_low", "clip_high") if name in settings.keywords]

    def read(
        self,
        outputs: Tensor,
        batch: Microbatch,
        span: GroupSpan,
        reference_logps: Tensor | None,
        columns: Mapping[str, Tensor] = NO_COLUMNS,
    ) -> RolloutInputs:
        assert batch.samples is not None
        samples = batch.samples.of_examples(span.examples)
        logps = outputs[samples.index - span.targets.start]
        zeros = torch.zeros_like(logps)

        def or_zeros(values: Tensor | None) -> Tensor:  # a measurement has no values yet
            return zeros if values is None else values.to(logps.dtype)

        old_logps = logps.detach() if samples.old_logps is None else samples.old_logps.to(logps.dtype)
        return RolloutInputs(
            arguments=[logps, old_logps, or_zeros(samples.reference_logps), or_zeros(samples.advantages)],
            chosen_means=zeros,
            weights=or_zeros(samples.weights),
            lengths=samples.lengths,
            num_tokens=samples.num_tokens,
            entropies=columns["entropy"][samples.index - span.targets.start] if "entropy" in columns else None,
        )

    def next_state(self, inputs: LossInputs, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)

    def losses(self, inputs: LossInputs, scalars: Sequence[Tensor], metrics: MetricAccumulator) -> Tensor:
        assert isinstance(inputs, RolloutInputs) and inputs.num_tokens is not None
        entropies = [] if inputs.entropies is None else [inputs.entropies]
        losses = self._function(*inputs.arguments, inputs.lengths, *entropies, **self._keywords) * inputs.weights
        by_example = sum_by_response(losses, inputs.num_tokens)
        metrics.add(loss=by_example, **{"loss/policy": by_example})
        self._add_metrics(inputs, metrics)
        return by_example

    def _add_metrics(self, inputs: RolloutInputs, metrics: MetricAccumulator) -> None:
        """Add how far the policy has moved from the sampling one, over all tokens or responses."""

        def add_mean(**values: Tensor) -> None:
            for name, value in values.items():
                metrics.add_where(torch.ones_like(value, dtype=torch.bool), **{name: value})

        logps, old_logps, *_ = inputs.arguments
        logratios = logps.detach() - old_logps
        add_mean(**{"policy/approxkl": logratios.square() / 2})
        if self._ratios == "responses":
            assert inputs.lengths is not None
            logratios = sum_by_response(logratios, inputs.lengths)
        ratios = logratios.exp()
        if self._clips:
            low, high = self._clips
            add_mean(**{"policy/clipfrac": ((ratios < 1 - low) | (ratios > 1 + high)).to(ratios.dtype)})
        metrics.add_largest(**{"policy/ratio_max": ratios})


def initial_beta(loss: Loss, settings: LossSettings) -> dict[str, Tensor]:
    """The state of a loss with an adaptive weight of the KL; else empty. Iterations move it, not updates."""
    if loss.next_beta is None or settings.keywords.get("target_kl") is None:
        return {}
    return {"beta": torch.tensor(settings.keywords["beta"], dtype=torch.float64)}


def make_objective(settings: LossSettings) -> Objective:
    """The objective of the settings' loss."""
    loss = LOSSES[settings.name]
    if loss.batch == "ranked":
        return RankingObjective(loss, settings)
    if loss.batch == "tokens":
        return WindowObjective(loss, settings)
    if loss.batch == "rollout":
        return RolloutObjective(loss, settings)
    return SequenceObjective(loss, settings)
