"""A step that has been started. A GPU may still be running it."""

from dataclasses import dataclass

from engine.step.metrics import DeviceTimestamp, PendingScalars
from engine.step.microbatches import Batch


@dataclass
class Step:
    """A started update of the policy. It is logged when it is done.

    Args:
        values: known once the update is done.
        facts: metrics known already.
    """

    values: PendingScalars
    facts: dict[str, float]
    batch: Batch
    start: DeviceTimestamp
    end: DeviceTimestamp
    ends_iteration: bool = False
