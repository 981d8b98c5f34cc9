"""Stored responses learned beside sampled ones: the PPO-ptx of Ouyang et al. 2022 (arXiv 2203.02155), equation 2."""

import sys
from collections.abc import Callable, Iterator

from torch import Tensor

from engine.data.examples import Example, Split
from engine.placement.placement import Placement
from engine.settings.schema import LossSettings, Settings
from engine.step.first_pass import FirstPass
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import MicrobatchRunner
from engine.step.objectives import make_objective
from engine.step.sources import StoredExamples

SFT = LossSettings(name="sft", average_log_prob=True, keywords={})


def mix_settings(settings: Settings) -> Settings:
    """Settings to load the stored responses with."""
    changes = {"datasets": settings.ptx.datasets or [], "weights": None, "format": None, "loss": SFT}
    return settings.model_copy(update=changes)


class PretrainingMix:
    """One batch of stored responses for each update, in a seeded order.

    Args:
        runner: of the policy.
        split: the stored responses.
    """

    def __init__(self, settings: Settings, placement: Placement, runner: MicrobatchRunner, split: Split):
        self._settings, self._placement = settings, placement
        self._runner = runner.with_objective(make_objective(SFT))
        self._size = settings.batch_size
        self.source = StoredExamples(  # without end
            split.examples, batch_size=self._size, seed=settings.seed, n_epochs=None, n_examples=sys.maxsize
        )
        self._batches: Iterator[list[Example]] = iter(())
        self._examples: list[Example] = []  # of the last batch
        self._number = -2  # of its update
        self._metrics = MetricAccumulator()

    def losses(self, num_updates: int, token_budget: int) -> Iterator[Tensor]:
        """Each microbatch's share of the weighted loss of an update's batch, scalars for backward().

        Args:
            num_updates: before this one. The same number again gives the same batch.
        """
        self._metrics = MetricAccumulator()
        num_parts = self._settings.gradient_accumulation_steps
        parts = self._placement.split_batch(self._batch_of(num_updates), num_parts, token_budget)
        batch = self._placement.prepare_batch(self._runner, parts, num_parts, token_budget)
        for loss in self._runner.losses(batch, FirstPass([], {}), self._metrics):
            yield self._settings.ptx.weight * loss

    def _batch_of(self, num_updates: int) -> list[Example]:
        if num_updates != self._number:
            if num_updates != self._number + 1:
                self._batches = self.source.batches(num_updates * self._size)
            self._examples, self._number = next(self._batches), num_updates
        return self._examples

    def metrics(self, all_reduce_sum: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """The loss of the last batch, without its weight. All ranks call this together."""
        return {"loss/ptx": self._metrics.reduce(all_reduce_sum).means["loss"]}
