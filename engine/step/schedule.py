"""The learning-rate schedule."""

import math

from engine.settings.schema import Settings


def learning_rate(settings: Settings, update: int, num_updates: int) -> float:
    """The learning rate of an update, counted from 0.

    A linear warm-up, then constant, or a decay to min_lr after the last update.
    """
    if update < settings.warmup_steps:
        return settings.lr * (update + 1) / (settings.warmup_steps + 1)
    done = (update - settings.warmup_steps) / max(1, num_updates - settings.warmup_steps)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    if settings.lr_schedule == "constant":
        return settings.lr
    return settings.min_lr + (settings.lr - settings.min_lr) * decay[settings.lr_schedule]
