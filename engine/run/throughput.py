"""Metrics of speed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.data.examples import Example
from engine.run.workload import Work
from engine.settings.hardware import peak_flops

if TYPE_CHECKING:  # trainers import the engine, not the other way round
    from trainers import BasicTrainer


class TrainingTime:
    """Adds up the seconds of the steps of an iteration of online training."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def add(self, seconds: float, ends_iteration: bool) -> dict[str, float]:
        """Add a step; the last of an iteration returns the metric."""
        total = self._seconds + seconds
        self._seconds = 0.0 if ends_iteration else total
        return {"time/train": total} if ends_iteration else {}


def throughput(
    trainer: "BasicTrainer", examples: Sequence[Example], num_tokens: float, seconds: float
) -> dict[str, float]:
    """Examples and tokens per second; on a known GPU also MFU, the fraction of its peak FLOP/s.

    MFU counts the work of fed tokens: no padding, no embeddings, no recomputation. The head's is for targets alone.

    Args:
        examples, num_tokens: of a step, over all ranks.
    """
    metrics = {"examples_per_second": len(examples) / seconds, "tokens_per_second": num_tokens / seconds}
    device = trainer.device
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        work = replace(Work.of(examples, "packed", trainer.placement.feeds_last_token), tokens=int(num_tokens))
        metrics["mfu"] = trainer.flops(work, True) / (seconds * peak * trainer.placement.num_ranks)
    return metrics
