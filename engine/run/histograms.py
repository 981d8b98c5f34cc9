"""Histograms of held-out rewards, for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_BINS = 40
ROLES = ("chosen", "rejected", "desirable", "undesirable")


def reward_histograms(by_rank: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Histograms of the rewards of each role over the same bins, as in histograms.jsonl.

    Args:
        by_rank: values of rewards/ROLE on each rank, [examples] each.

    Returns:
        low and high end, and the counts of NUM_BINS equal bins, for each role; empty without finite rewards.
    """
    values = {role: torch.cat([part for rank in by_rank for part in _of_role(rank, role)]) for role in ROLES}
    values = {role: each[each.isfinite()] for role, each in values.items()}
    values = {role: each for role, each in values.items() if len(each)}
    if not values:
        return {}
    low, high = (choose(torch.cat([*values.values()])).item() for choose in (torch.min, torch.max))
    if low == high:  # as before the first step
        low, high = low - 0.5, high + 0.5
    return {
        f"rewards_eval/{role}": {"low": low, "high": high, "counts": _counts(each, low, high)}
        for role, each in values.items()
    }


def _of_role(values: Mapping[str, Tensor], role: str) -> list[Tensor]:
    return [values[f"rewards/{role}"]] if f"rewards/{role}" in values else [torch.zeros(0, dtype=torch.float64)]


def _counts(values: Tensor, low: float, high: float) -> list[int]:
    return torch.histc(values, NUM_BINS, low, high).int().tolist()
