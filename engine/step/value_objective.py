"""The objective of a critic: its values of sampled tokens against their returns."""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from engine.settings.keys import keyword_names
from engine.settings.schema import LossSettings
from engine.step.layout import GroupSpan, Microbatch
from engine.step.logprobs import sum_by_response
from engine.step.metrics import MetricAccumulator
from engine.step.objectives import NO_COLUMNS, LossInputs, RolloutInputs
from losses import LOSSES, BatchKind, Head, Need


class ValueObjective:
    """Applies the value_loss of a loss to the value of each token of each sample."""

    batch: BatchKind = "rollout"
    head: Head = "value"
    needs: Set[Need] = frozenset()

    def __init__(self, settings: LossSettings):
        function = LOSSES[settings.name].value_loss
        assert function is not None
        self.state: dict[str, Tensor] = {}
        self._function, self._clip = function, settings.keywords.get("value_clip")
        self._keywords = {name: settings.keywords[name] for name in keyword_names(function)}

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
        values = outputs[samples.index - span.targets.start]
        zeros = torch.zeros_like(values)
        old_values = values.detach() if samples.values is None else samples.values.to(values.dtype)
        return RolloutInputs(
            arguments=[values, old_values, zeros if samples.returns is None else samples.returns.to(values.dtype)],
            chosen_means=zeros,
            weights=zeros if samples.weights is None else samples.weights.to(values.dtype),
            lengths=samples.lengths,
            num_tokens=samples.num_tokens,
        )

    def next_state(self, inputs: LossInputs, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def losses(self, inputs: LossInputs, scalars: Sequence[Tensor], metrics: MetricAccumulator) -> Tensor:
        assert isinstance(inputs, RolloutInputs) and inputs.num_tokens is not None
        values, old_values, _ = inputs.arguments
        losses = self._function(*inputs.arguments, **self._keywords) * inputs.weights
        by_example = sum_by_response(losses, inputs.num_tokens)
        metrics.add(loss=by_example)
        if self._clip is not None:
            is_clipped = ((values - old_values).detach().abs() > self._clip).to(values.dtype)
            metrics.add_where(torch.ones_like(is_clipped, dtype=torch.bool), clipfrac=is_clipped)
        return by_example
