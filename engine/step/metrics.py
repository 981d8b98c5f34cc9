"""Metrics of a step: exact means over examples, and timestamps on a device."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class ReducedMetrics(NamedTuple):
    """Metrics of all ranks: scalars in fp64, on the device of the values."""

    means: dict[str, Tensor]
    num_tokens: Tensor
    stop: Tensor  # how many ranks were told to stop


class MetricAccumulator:
    """Exact means over examples. Values stay on their device until reduce()."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self.num_tokens = 0  # fed tokens

    def add(self, **values: Tensor) -> None:
        """Add values, [examples] each. Every name needs one value per example."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach())

    def reduce(self, all_reduce_sum: Callable[[Tensor], None], stop: bool = False) -> ReducedMetrics:
        """The means over all ranks, in one collective.

        Args:
            all_reduce_sum: adds the tensors of all ranks, in place.
            stop: whether this rank was told to stop.
        """
        joined = [torch.cat(values).double() for values in self._values.values()]
        counts = joined[0].new_tensor([len(joined[0]), self.num_tokens, stop])
        totals = torch.cat([torch.stack([values.sum() for values in joined]), counts])
        all_reduce_sum(totals)
        *sums, num_examples, num_tokens, num_stopped = totals.unbind()
        means = totals[: len(sums)] / num_examples
        return ReducedMetrics(dict(zip(self._values, means.unbind(), strict=True)), num_tokens, num_stopped)


def to_floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of scalars, in one transfer to the CPU."""
    device = next(iter(scalars.values())).device  # layers may be split among GPUs
    values = torch.stack([value.double().to(device) for value in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def prefix_metrics(means: Mapping[str, Tensor], split: str) -> dict[str, Tensor]:
    """Metrics under the names that users see: loss/train, rewards_train/chosen, logps_eval/rejected, ..."""
    return {_prefixed(name, split): value for name, value in means.items()}


def _prefixed(name: str, split: str) -> str:
    group, slash, rest = name.partition("/")
    return f"{group}_{split}/{rest}" if slash else f"{name}/{split}"


class DeviceTimestamp:
    """The end of all work queued so far on a device."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.monotonic()

    def seconds_since(self, earlier: "DeviceTimestamp") -> float:
        """Seconds from earlier to this moment. Waits for the device if it must."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
