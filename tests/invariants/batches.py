"""Run a batch as training does, for comparisons with its parts run alone."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.settings.schema import LossSettings
from engine.step.first_pass import FirstPass
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import Batch, MicrobatchRunner
from engine.step.objectives import make_objective
from tests.invariants.test_packing import gradient


def run_batch(
    loss: LossSettings, model: PreTrainedModel, microbatches: Sequence[list[Example]], layout: str = "packed"
) -> tuple[tuple[float, Tensor], dict[str, float], int]:
    """Loss and gradient of a batch by the runner of training, what it logs, and the number of tokens fed."""
    runner = MicrobatchRunner(
        model,
        make_objective(loss),
        layout=layout,
        pad_token_id=0,
        device=torch.device("cpu"),
        compute_dtype=None,
    )
    examples = [example for part in microbatches for example in part]
    batch, metrics = Batch(examples, 0, [runner.prepare(part) for part in microbatches]), MetricAccumulator()
    losses = list(runner.losses(batch, FirstPass([], {}), metrics))
    torch.stack(losses).sum().backward()
    means, num_tokens, _ = metrics.reduce(lambda totals: None)
    logged = {name: value.item() for name, value in means.items()}
    return (sum(each.item() for each in losses), gradient(model)), logged, int(num_tokens)
