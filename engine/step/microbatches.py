"""Run policy, reference and objective over microbatches."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.dialogues import count_turns
from engine.data.examples import Example
from engine.models.precision import run_in_dtype
from engine.step.first_pass import FirstPass, gather_inputs, run_whole_batch
from engine.step.heads import response_logps, run_head
from engine.step.layout import GroupSpan, Microbatch, empty_microbatch, lay_out
from engine.step.metrics import MetricAccumulator
from engine.step.objectives import LossInputs, Objective
from engine.step.reference import LiveReference, Reference
from engine.step.reference_cache import CachedReference
from engine.step.token_needs import TokenNeeds


class Prepared(NamedTuple):
    """A microbatch on the device, with cached reference log-probs.

    Args:
        reference_logps: [responses], or [targets] with the need "shared length".
    """

    microbatch: Microbatch
    reference_logps: Tensor | None


@dataclass
class Batch:
    """The examples of one step on all ranks, and the microbatches of this rank.

    Args:
        first_example: the number of this rank's first loss, with the examples in the order of ranks.
        mismatched: microbatches with the mismatched responses of the examples, for losses with the need "kl".
    """

    examples: list[Example]
    token_budget: int
    microbatches: list[Prepared]
    first_example: int = 0
    mismatched: Sequence[Prepared] = ()

    @property
    def num_losses(self) -> int:
        """Losses in the mean: one of each example, and of each earlier turn of a dialogue."""
        return count_turns(self.examples)


class MicrobatchRunner:
    """Lays examples out, and computes their loss with policy, reference and objective.

    Args:
        layout: "packed" or "padded".
        device: of the LM head; batches go there.
        compute_dtype: dtype of forward and backward passes; None for the dtype of the weights.
        temperature: of log-probs; that of sampling for rollouts.
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
        temperature: float = 1.0,
    ):
        self.policy, self.objective = policy, objective
        self.compute_dtype, self.temperature = compute_dtype, temperature
        self.reference: Reference | None = None
        self.next_state: dict[str, Tensor] = {}  # of the objective, after the batch
        self._layout, self._pad_token_id, self._device = layout, pad_token_id, device

    def with_objective(self, objective: Objective) -> "MicrobatchRunner":
        """The same model for another objective, without a reference, at temperature 1."""
        other = copy.copy(self)
        other.objective, other.reference, other.temperature, other.next_state = objective, None, 1.0, {}
        return other

    def lay_out(self, examples: Sequence[Example]) -> Microbatch:
        """Examples as one microbatch on the device. Without examples, an empty one."""
        feeds_last_token = self.objective.head == "score"
        laid_out = [example for example in examples if example.responses]
        if laid_out:
            batch = lay_out(
                laid_out,
                self._layout,
                self._pad_token_id,
                with_shared="shared length" in self.objective.needs,
                feeds_last_token=feeds_last_token,
            )
        else:
            num_responses = 2 if self.objective.batch == "pairs" else 1
            batch = empty_microbatch(num_responses, self._layout, feeds_last_token)
        num_continued = sum(example.part is not None and example.part.number > 0 for example in laid_out)
        num_left_out = len(examples) - len(laid_out)
        return replace(batch, num_left_out=num_left_out, num_continued=num_continued).to(self._device)

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """lay_out(), with the log-probs of a cached reference."""
        microbatch = self.lay_out(examples)
        return Prepared(microbatch, self._reference_logps(microbatch, CachedReference))

    def with_reference(self, prepared: Prepared) -> Prepared:
        """The microbatch with its reference log-probs, if the loss needs them."""
        if prepared.reference_logps is None:
            return prepared._replace(reference_logps=self._reference_logps(prepared.microbatch, LiveReference))
        return prepared

    def _reference_logps(self, batch: Microbatch, kind: type[LiveReference] | type[CachedReference]) -> Tensor | None:
        """Log-probs of a reference of this kind, as the loss needs them; None for another kind."""
        reference = self.reference
        if not isinstance(reference, kind) or "token kl" in self.objective.needs:  # which come with the KL
            return None
        if self.objective.batch == "rollout":  # computed with the responses
            return None
        return reference.token_logps(batch) if "shared length" in self.objective.needs else reference.logps(batch)

    @contextmanager
    def _token_needs(self, batch: Microbatch) -> Iterator[TokenNeeds]:
        """What the loss needs of each token, at hand inside a with block. A live reference runs for it."""
        objective, reference = self.objective, self.reference
        if "token kl" in objective.needs and isinstance(reference, LiveReference):
            with reference.distributions(batch) as distributions:
                yield TokenNeeds("confidence" in objective.needs, distributions)
        else:
            yield TokenNeeds("confidence" in objective.needs, temperature=self.temperature, entropy=self._needs_entropy)

    @property
    def _needs_entropy(self) -> bool:
        return "entropy" in self.objective.needs

    @torch.no_grad()
    def sample_logps(self, examples: Sequence[Example]) -> list[tuple[list[Tensor], list[Tensor] | None]]:
        """Log-probs of the tokens of sampled responses, as training will compute them; of a critic its values.

        Args:
            examples: of a microbatch.

        Returns:
            for each example with responses, in_group_order(): log-probs of each response under the policy, and under
            the reference if there is one, [response tokens] each.
        """
        # With the entropy as in training: it changes the last bits of log-probs.
        needs = TokenNeeds(temperature=self.temperature, entropy=self._needs_entropy)
        batch = self.lay_out(examples)
        models = [run_head(self.policy, batch, needs=needs)[1]]
        if isinstance(self.reference, LiveReference):
            models.append(self.reference.token_logps(batch, needs))
        assert batch.samples is not None
        samples, offsets = batch.samples, batch.samples.sample_offsets
        by_model = [logps[samples.index].cpu().split(samples.lengths.tolist()) for logps in models]
        found: list[tuple[list[Tensor], list[Tensor] | None]] = []
        for start, end in pairwise(offsets):
            policy, *reference = ([*logps[start:end]] for logps in by_model)
            found.append((policy, reference[0] if reference else None))
        return found

    def first_pass(
        self, batch: Batch, all_reduce_sum: Callable[[Tensor], None], metrics: MetricAccumulator, *, trains: bool
    ) -> FirstPass:
        """Compute what the loss needs of the whole batch. All ranks call this together.

        Args:
            all_reduce_sum: adds the tensors of all ranks, in place.
            metrics: gets the metrics of a loss of the whole batch.
            trains: whether the state moves.
        """
        objective = self.objective
        first = FirstPass([], {name: value.to(self._device) for name, value in objective.state.items()})
        if not {"kl", "whole batch"} & objective.needs:
            return first
        devices = {parameter.device for parameter in self.policy.parameters() if parameter.device.type == "cuda"}
        # Dropout draws the same masks again in the pass with gradients.
        with torch.no_grad(), torch.random.fork_rng(devices):
            if "kl" in objective.needs:
                first.scalars.append(self._mean_logratio(batch.mismatched, all_reduce_sum))
            if "whole batch" not in objective.needs:
                return first
            batch.microbatches = [self.with_reference(prepared) for prepared in batch.microbatches]
            inputs = [inputs for prepared in batch.microbatches for inputs in self._read(prepared)]
            local = slice(batch.first_example, batch.first_example + sum(len(each.weights) for each in inputs))
            of_batch = gather_inputs(inputs, local, batch.num_losses, all_reduce_sum)
            if trains:
                first = first._replace(state=objective.next_state(of_batch, first.state))
        first.scalars.extend(first.state.values())
        return run_whole_batch(objective, of_batch, local, first, metrics)

    def _read(self, prepared: Prepared) -> list[LossInputs]:
        """What the loss reads of a microbatch, by span."""
        batch, reference_logps = prepared
        inputs: list[LossInputs] = []

        def keep(token_logps: Tensor, span: GroupSpan, **columns: Tensor) -> Tensor:
            inputs.append(self.objective.read(token_logps.detach(), batch, span, reference_logps, columns))
            return token_logps.new_zeros(())

        with self._token_needs(batch) as needs:
            run_head(self.policy, batch, keep, needs)
        return inputs

    def _mean_logratio(self, microbatches: Sequence[Prepared], all_reduce_sum: Callable[[Tensor], None]) -> Tensor:
        """The mean of log(policy / reference) over the responses of all ranks."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch, reference_logps in map(self.with_reference, microbatches):
            assert reference_logps is not None
            logratios = response_logps(self.policy, batch).double() - reference_logps.double()
            totals += torch.stack([logratios[batch.chosen].sum(), totals.new_full((), batch.num_examples)])
        all_reduce_sum(totals)
        return totals[0] / totals[1]

    def measure(self, batch: Batch, all_reduce_sum: Callable[[Tensor], None], metrics: MetricAccumulator) -> None:
        """Add the metrics of a batch. All ranks call this together, without gradients."""
        first = self.first_pass(batch, all_reduce_sum, metrics, trains=False)
        if first.gradients is None:
            list(self.losses(batch, first, metrics))

    def move_state(self, is_updated: Tensor) -> None:
        """Give the objective its next state, if the batch updated the policy.

        Args:
            is_updated: bool, a scalar.
        """
        before = self.objective.state
        self.objective.state = {
            name: after.where(is_updated, before[name].to(after.device)) for name, after in self.next_state.items()
        }

    def restore_state(self, saved: Mapping[str, float]) -> None:
        """Give the objective a saved state; what it lacks stays."""
        state = self.objective.state
        for name, value in state.items():
            if name in saved:
                state[name] = torch.full_like(value, saved[name])

    def losses(self, batch: Batch, first: FirstPass, metrics: MetricAccumulator) -> Iterator[Tensor]:
        """Each microbatch's share of the mean loss of the batch, a scalar for backward()."""
        first_example = 0
        for prepared in batch.microbatches:
            yield self.loss(prepared, batch.num_losses, first, metrics, first_example)
            first_example += prepared.microbatch.num_examples
            metrics.num_continued += prepared.microbatch.num_continued
            if prepared.microbatch.num_left_out:
                metrics.add(loss=torch.zeros(prepared.microbatch.num_left_out, device=self._device))

    def loss(
        self,
        prepared: Prepared,
        num_examples: int,
        first: FirstPass,
        metrics: MetricAccumulator,
        first_example: int = 0,
    ) -> Tensor:
        """A microbatch's share of the mean of num_examples losses, a scalar for backward().

        Args:
            first_example: of the microbatch, among this rank's.
        """
        batch, reference_logps = self.with_reference(prepared)

        def span_loss(token_logps: Tensor, span: GroupSpan, **columns: Tensor) -> Tensor:
            inputs = self.objective.read(token_logps, batch, span, reference_logps, columns)
            if first.gradients is None:
                return self.objective.losses(inputs, first.scalars, metrics).sum() / num_examples
            examples = span.examples
            return first.surrogate(inputs, slice(first_example + examples.start, first_example + examples.stop))

        with self._token_needs(batch) as needs:
            loss, _ = run_head(self.policy, batch, span_loss, needs)
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
