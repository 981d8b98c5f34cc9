"""Lines a run prints when it starts."""

import math
from collections.abc import Mapping

from engine.settings.schema import LoraSettings, Settings
from engine.step.schedule import learning_rate

# Smaller margins come from a cache that was filled with other microbatches: their sums round differently.
FIRST_MARGIN = 1e-3


def describe_training(settings: Settings, *, num_examples: int, num_train: int, num_eval: int) -> str:
    """How long training will be.

    Args:
        num_examples: of the whole run, all epochs together.
        num_train, num_eval: examples in the training split, and in an evaluation.
    """
    num_updates = math.ceil(num_examples / settings.batch_size)
    per_epoch = math.ceil(num_train / settings.batch_size)
    line = f"training on {num_examples:,} examples in {_steps(num_updates)} of {settings.batch_size}"
    line += f" ({per_epoch:,} an epoch), evaluating on {num_eval:,}"
    if num_eval < settings.n_eval_examples:
        line += f" (all there are; n_eval_examples={settings.n_eval_examples})"
    if settings.n_examples is not None and num_examples < settings.n_examples:
        line += f"; n_epochs={settings.n_epochs} ends it before n_examples={settings.n_examples}"
    return line


def _steps(number: int) -> str:
    return f"{number:,} step" if number == 1 else f"{number:,} steps"


def warn_of_warmup(settings: Settings, num_updates: int) -> str | None:
    """A warning if the run ends before its warm-up does."""
    if settings.warmup_steps < num_updates or not num_updates:
        return None
    reached = learning_rate(settings, num_updates - 1, num_updates)
    return (
        f"warning: warmup_steps={settings.warmup_steps} is not below the {_steps(num_updates)} of this run: the"
        f" learning rate reaches {reached:.3g} in place of lr={settings.lr:g}"
    )


def describe_parameters(num_trained: int, num_all: int) -> str:
    return f"parameters: {num_trained:,} of {num_all:,} are trained ({num_trained / num_all:.2%})"


def warn_of_first_margin(settings: Settings, metrics: Mapping[str, float]) -> str | None:
    """A warning if policy and reference differ much before the first update, else None.

    Args:
        metrics: of a step.
    """
    margin = metrics.get("rewards_train/margins", 0.0)
    has_other_dtype = settings.model.reference_dtype not in (None, settings.model.policy_dtype)
    has_dropout = isinstance(settings.peft, LoraSettings) and settings.peft.dropout > 0
    if metrics["counters/updates"] != 1 or has_other_dtype or has_dropout or abs(margin) < FIRST_MARGIN:
        return None
    cause = "; compiled layers round differently without gradients" if settings.compile else ""
    return (
        f"warning: the margin before the first update is {margin:.3g}, not 0{cause}."
        " All margins are off by about as much"
    )
