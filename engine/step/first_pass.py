"""Losses of the whole batch: gradients of its mean loss, before the pass with gradients.

The first pass gives the log-probs of all examples, without gradients. Every rank computes the loss of these, and its
gradient for each log-prob. The second pass weights the log-probs by them. By the chain rule this is exact, however the
batch is split.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.step.metrics import MetricAccumulator
from engine.step.objectives import LossInputs, Objective


class FirstPass(NamedTuple):
    """What a loss needs of the whole batch.

    Args:
        scalars: further arguments of the loss.
        state: of the objective, after the batch.
        gradients: of the mean loss, with respect to each column of LossInputs, [examples of this rank]; None for a loss
            of single examples.
    """

    scalars: list[Tensor]
    state: dict[str, Tensor]
    gradients: list[Tensor] | None = None

    @classmethod
    def with_zeros(cls, objective: Objective, device: torch.device) -> "FirstPass":
        """Scalars of 0, for measurements of time or memory."""
        num_scalars = ("kl" in objective.needs) + len(objective.state)
        return cls([torch.zeros((), dtype=torch.float64, device=device)] * num_scalars, {})

    def surrogate(self, inputs: LossInputs, examples: slice) -> Tensor:
        """A scalar with the gradient of the mean loss, for some examples of this rank."""
        assert self.gradients is not None
        pairs = zip(inputs.columns, self.gradients, strict=True)
        terms = [(values * gradients[examples]).sum() for values, gradients in pairs if values.requires_grad]
        return torch.stack(terms).sum()


def gather_inputs(
    inputs: Sequence[LossInputs], local: slice, num_examples: int, all_reduce_sum: Callable[[Tensor], None]
) -> LossInputs:
    """The inputs of all ranks' examples, in fp64, on every rank.

    Args:
        inputs: of this rank's microbatches.
        local: the place of their examples in the batch.
        num_examples: of the batch.
    """
    columns = [torch.cat(column) for column in zip(*(each.columns for each in inputs), strict=True)]
    gathered = torch.zeros(len(columns), num_examples, dtype=torch.float64, device=columns[0].device)
    gathered[:, local] = torch.stack([column.double() for column in columns])
    all_reduce_sum(gathered)
    rows = zip(gathered, columns, strict=True)
    return inputs[0].with_columns([row.bool() if column.dtype == torch.bool else row.clone() for row, column in rows])


def run_whole_batch(
    objective: Objective, inputs: LossInputs, local: slice, first: FirstPass, metrics: MetricAccumulator
) -> FirstPass:
    """Add the metrics of this rank's examples, and the gradients to first.

    Args:
        inputs: of all examples of the batch.
        local: this rank's examples.
    """
    differentiable = [column.requires_grad_() for column in inputs.columns if column.is_floating_point()]
    with torch.enable_grad():
        of_batch = MetricAccumulator()
        loss = objective.losses(inputs, first.scalars, of_batch).mean()
    metrics.add_slice(of_batch, local)
    gradients = iter(torch.autograd.grad(loss, differentiable, materialize_grads=True))
    each = [next(gradients) if column.is_floating_point() else column for column in inputs.columns]
    return first._replace(gradients=[gradient[local] for gradient in each])
