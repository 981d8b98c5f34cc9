"""Metrics of speed."""

import torch
from torch import nn

from engine.models.parameters import flops_per_token
from engine.settings.hardware import peak_flops


def throughput(
    policy: nn.Module, device: torch.device, num_ranks: int, num_examples: int, num_tokens: float, seconds: float
) -> dict[str, float]:
    """Examples and tokens per second; on a known GPU also MFU, the fraction of its peak FLOP/s.

    Args:
        num_examples, num_tokens: of a step, over all ranks.
    """
    metrics = {"examples_per_second": num_examples / seconds, "tokens_per_second": num_tokens / seconds}
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        metrics["mfu"] = flops_per_token(policy) * metrics["tokens_per_second"] / (peak * num_ranks)
    return metrics
