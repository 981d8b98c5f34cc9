"""Metrics of a step: exact means over examples, and timestamps on a device."""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from engine.step.reward_metrics import ScoredRankings
from utils import to_host


class ReducedMetrics(NamedTuple):
    """Metrics of all ranks: scalars in fp64, on the device of the values."""

    means: dict[str, Tensor]
    num_tokens: Tensor
    stop: Tensor  # how many ranks were told to stop


class MetricAccumulator:
    """Exact means over examples. Values stay on their device until reduce().

    Attributes:
        rankings: scores of an evaluation, for its metrics; None outside of one.
    """

    def __init__(self, keeps_rankings: bool = False) -> None:
        self.rankings: list[ScoredRankings] | None = [] if keeps_rankings else None
        self._values: dict[str, list[Tensor]] = {}
        self._selected: dict[str, list[Tensor]] = {}  # whether each value counts
        self._moments: dict[str, list[Tensor]] = {}
        self._largest: dict[str, list[Tensor]] = {}
        self.num_tokens = 0  # fed tokens
        self.num_continued = 0  # examples that are a later part of one, and count with its first part

    def add(self, **values: Tensor) -> None:
        """Add values, [examples] each. Every name needs one value per example."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach())

    def add_where(self, selected: Tensor, **values: Tensor) -> None:
        """Add values of the selected examples alone.

        Their mean is over these. Without any, on no rank, it is NaN.

        Args:
            selected: bool [examples].
            values: [examples] each.
        """
        self.add(**{name: value.where(selected, 0) for name, value in values.items()})
        for name in values:
            self._selected.setdefault(name, []).append(selected)

    def values_of(self, prefix: str) -> dict[str, Tensor]:
        """The values so far by name, for names with a prefix, [selected examples] each, on the CPU."""
        found = {}
        for name, parts in self._values.items():
            if name.startswith(prefix):
                values = torch.cat(parts)
                if name in self._selected:
                    values = values[torch.cat(self._selected[name])]
                found[name] = values.double().cpu()
        return found

    def add_spread(self, selected: Tensor, **values: Tensor) -> None:
        """Add the selected values, of any shape. Their metric is the standard deviation over all of them."""
        for name, value in values.items():
            value = value.detach().double().where(selected, 0)
            moments = torch.stack([selected.sum().double(), value.sum(), value.square().sum()])
            self._moments.setdefault(name, []).append(moments)

    def add_largest(self, **values: Tensor) -> None:
        """Add values of any shape. Their metric is the largest of all."""
        for name, value in values.items():
            largest = value.detach().double().max() if value.numel() else value.new_full((), -math.inf).double()
            self._largest.setdefault(name, []).append(largest)

    def add_slice(self, other: "MetricAccumulator", examples: slice) -> None:
        """Add the values that another accumulator has of some examples."""
        for own, others in ((self._values, other._values), (self._selected, other._selected)):
            for name, values in others.items():
                own.setdefault(name, []).append(torch.cat(values)[examples])

    def reduce(
        self,
        all_reduce_sum: Callable[[Tensor], None],
        stop: bool = False,
        all_reduce_max: Callable[[Tensor], None] | None = None,
    ) -> ReducedMetrics:
        """The means over all ranks, in one collective; largest values take another one.

        Args:
            all_reduce_sum: adds the tensors of all ranks, in place.
            stop: whether this rank was told to stop.
            all_reduce_max: leaves the largest values of all ranks, in place; for add_largest().
        """
        joined = [torch.cat(values).double() for values in self._values.values()]
        selected = [torch.cat(each).double() for each in self._selected.values()]
        num_examples = len(joined[0]) - self.num_continued
        # Filled on the device: a copy from the host would wait for the queue.
        counts = [joined[0].new_full((), count) for count in (num_examples, self.num_tokens, stop)]
        moments = [moment for each in self._moments.values() for moment in torch.stack(each).sum(0)]
        totals = torch.stack([*(values.sum() for values in (*joined, *selected)), *moments, *counts])
        all_reduce_sum(totals)
        num_of_all, num_tokens, num_stopped = totals[-3:].unbind()
        of_selected, of_moments = totals[len(joined) : -3].split([len(selected), len(moments)])
        num_selected = dict(zip(self._selected, of_selected.unbind(), strict=True))
        means = dict(zip(self._values, (totals[: len(joined)] / num_of_all).unbind(), strict=True))
        means |= {name: means[name] * num_of_all / number for name, number in num_selected.items()}
        for name, (number, total, squares) in zip(self._moments, of_moments.view(-1, 3), strict=True):
            means[name] = (squares / number - (total / number).square()).clamp(min=0).sqrt()
        if self._largest:
            largest = torch.stack([torch.stack(values).max() for values in self._largest.values()])
            if all_reduce_max is not None:
                all_reduce_max(largest)
            largest = largest.where(largest > -math.inf, math.nan)  # of no values
            means |= dict(zip(self._largest, largest.unbind(), strict=True))
        return ReducedMetrics(means, num_tokens, num_stopped)


def to_floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of scalars, in one transfer to the CPU. Waits for the device."""
    return dict(zip(scalars, _stack(scalars).tolist(), strict=True)) if scalars else {}


def without_nan(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without means over no examples."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


class HostCopy:
    """A copy of a tensor, on its way to the CPU. Starting it does not wait for the device."""

    def __init__(self, tensor: Tensor):
        self._copy, self._end = to_host(tensor), DeviceTimestamp(tensor.device)

    def read(self) -> Tensor:
        """The copy, once it is there."""
        self._end.wait()
        return self._copy


class PendingScalars:
    """Scalars on their way to the CPU, in one transfer."""

    def __init__(self, scalars: Mapping[str, Tensor]):
        self._names, self._values = [*scalars], HostCopy(_stack(scalars))

    def read(self) -> dict[str, float]:
        """The values, once they are there."""
        return dict(zip(self._names, self._values.read().tolist(), strict=True))


def _stack(scalars: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(scalars.values())).device  # layers may be split among GPUs
    return torch.stack([value.double().to(device) for value in scalars.values()])


def prefix_metrics(means: Mapping[str, Tensor], split: str) -> dict[str, Tensor]:
    """Metrics under the names that users see: loss/train, rewards_train/chosen, logps_eval/rejected, ..."""
    return {_prefixed(name, split): value for name, value in means.items()}


def _prefixed(name: str, split: str) -> str:
    group, slash, rest = name.partition("/")
    if group == "policy" or name == "loss/policy":  # metrics of online training have the names they have elsewhere
        return name
    return f"{group}_{split}/{rest}" if slash else f"{name}/{split}"


class DeviceTimestamp:
    """The end of all work queued so far on a device."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.monotonic()

    def wait(self) -> None:
        """Wait until the work is done."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "DeviceTimestamp") -> float:
        """Seconds from earlier to this moment. Waits for the device if it must."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self.wait()
        return earlier._event.elapsed_time(self._event) / 1000
