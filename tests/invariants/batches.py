"""Run a batch as training does, for comparisons with its parts run alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.settings.schema import LossSettings
from engine.step.first_pass import FirstPass
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import Batch, MicrobatchRunner
from engine.step.objectives import Objective, make_objective
from tests.invariants.test_packing import gradient


def make_runner(
    model: PreTrainedModel, objective: Objective, layout: str = "packed", **options: Any
) -> MicrobatchRunner:
    """The runner of training for a tiny model on a CPU."""
    cpu = torch.device("cpu")
    return MicrobatchRunner(model, objective, layout=layout, pad_token_id=0, device=cpu, compute_dtype=None, **options)


def run_batch(
    loss: LossSettings, model: PreTrainedModel, microbatches: Sequence[list[Example]], layout: str = "packed"
) -> tuple[tuple[float, Tensor], dict[str, float], int]:
    """Loss and gradient of a batch by the runner of training, what it logs, and the number of tokens fed."""
    runner = make_runner(model, make_objective(loss), layout)
    examples = [example for part in microbatches for example in part]
    batch, metrics = Batch(examples, 0, [runner.prepare(part) for part in microbatches]), MetricAccumulator()
    losses = list(runner.losses(batch, FirstPass([], {}), metrics))
    torch.stack(losses).sum().backward()
    means, num_tokens, _ = metrics.reduce(lambda totals: None)
    logged = {name: value.item() for name, value in means.items()}
    return (sum(each.item() for each in losses), gradient(model)), logged, int(num_tokens)
