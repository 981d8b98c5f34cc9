"""Lines a run prints when it starts."""

import math
from collections.abc import Mapping, Sequence

from engine.data.example_table import labels_of
from engine.data.examples import Example
from engine.settings.schema import LoraSettings, Settings
from engine.step.schedule import learning_rate

# Smaller margins come from a cache that was filled with other microbatches: their sums round differently.
FIRST_MARGIN = 1e-3
# The weight of desirable responses over that of undesirable ones: 1 to 4/3, but for rounded weights.
LEAST_RATIO, MOST_RATIO = 0.99, 1.35


def describe_training(settings: Settings, *, num_examples: int, num_updates: int, num_train: int, num_eval: int) -> str:
    """How long training will be.

    Args:
        num_examples, num_updates: of the whole run, all epochs together.
        num_train, num_eval: examples in the training split, and in an evaluation.
    """
    per_epoch = math.ceil(num_train / settings.batch_size)
    line = f"training on {num_examples:,} examples in {_steps(num_updates)} of {settings.batch_size}"
    line += f" ({per_epoch:,} an epoch), evaluating on {num_eval:,}"
    if settings.loss.is_online:
        rollout, num_prompts = settings.rollout, settings.rollout.prompts or settings.batch_size
        passes = "once" if rollout.epochs == 1 else f"{rollout.epochs} times"
        num_sampled = math.ceil(num_examples / rollout.epochs)
        line = f"training on {num_sampled:,} prompts in {_steps(num_updates)} of {settings.batch_size}"
        line += f"; {rollout.num_responses} responses to each of {num_prompts:,} prompts at a time, learned {passes}"
        line += f", evaluating on {num_eval:,}"
    if settings.loss.learns_windows:
        num_tokens = num_examples * settings.max_length
        line = f"training on {num_examples:,} windows of {settings.max_length:,} tokens, {num_tokens:,} tokens at most,"
        line += (
            f" in {_steps(num_updates)} of {settings.batch_size} ({per_epoch:,} an epoch), evaluating on {num_eval:,}"
        )
    if num_eval < settings.n_eval_examples:
        line += f" (all there are; n_eval_examples={settings.n_eval_examples})"
    if settings.n_examples is not None and num_examples < settings.n_examples:
        line += f"; n_epochs={settings.n_epochs} ends it before n_examples={settings.n_examples}"
    return line


def describe_complete(num_examples: int) -> str:
    """What a resumed run says that has nothing to train."""
    extension = "n_examples or n_epochs extends it, with resume_allow=[n_examples,n_epochs]"
    return f"the run is complete, after {num_examples:,} examples: nothing is left to train; {extension}"


def _steps(number: int) -> str:
    return f"{number:,} step" if number == 1 else f"{number:,} steps"


def warnings_at_start(settings: Settings, num_updates: int, examples: Sequence[Example]) -> list[str]:
    """Lines about a run that may not learn as planned.

    Args:
        examples: for training.
    """
    labels = [] if settings.loss.learns_windows else labels_of(examples)
    found = (warn_of_warmup(settings, num_updates), warn_of_imbalance(settings, labels))
    return [warning for warning in found if warning]


def warn_of_warmup(settings: Settings, num_updates: int) -> str | None:
    """A warning if the run ends before its warm-up does."""
    if settings.warmup_steps < num_updates or not num_updates:
        return None
    reached = learning_rate(settings, num_updates - 1, num_updates)
    return (
        f"warning: warmup_steps={settings.warmup_steps} is not below the {_steps(num_updates)} of this run: the"
        f" learning rate reaches {reached:.3g} in place of lr={settings.lr:g}"
    )


def warn_of_imbalance(settings: Settings, labels: Sequence[bool | None]) -> str | None:
    """A line if one label outweighs the other, with the weight that balances them.

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8: desirable responses weigh 1 to 4/3 of undesirable ones.

    Args:
        labels: of the training examples; None for examples of another kind.
    """
    num_desirable, num_undesirable = labels.count(True), labels.count(False)
    if num_desirable + num_undesirable == 0:
        return None
    if not num_desirable or not num_undesirable:
        kind = "desirable" if num_desirable else "undesirable"
        return f"warning: all training examples are {kind}: loss={settings.loss.name} learns from the difference"
    keywords = settings.loss.keywords
    if "desirable_weight" not in keywords:
        return None
    desirable = num_desirable * keywords["desirable_weight"]
    undesirable = num_undesirable * keywords["undesirable_weight"]
    ratio = desirable / undesirable
    if LEAST_RATIO <= ratio <= MOST_RATIO:
        return None
    name, weight = "undesirable_weight", desirable / num_undesirable
    if ratio < 1:
        name, weight = "desirable_weight", undesirable / num_desirable
    return (
        f"warning: {num_desirable:,} desirable and {num_undesirable:,} undesirable responses weigh {ratio:.3g} to 1;"
        f" 1 to 1.33 is advised: loss.{name}={weight:.3g} balances them"
    )


def describe_parameters(num_trained: int, num_all: int) -> str:
    return f"parameters: {num_trained:,} of {num_all:,} are trained ({num_trained / num_all:.2%})"


def warn_of_first_margin(settings: Settings, metrics: Mapping[str, float]) -> str | None:
    """A warning if policy and reference differ much before the first update, else None.

    Args:
        metrics: of a step.
    """
    if "reference" not in settings.loss.needs:
        return None
    kind = "margin" if "rewards_train/margins" in metrics else "reward"
    names = ("rewards_train/margins",) if kind == "margin" else ("rewards_train/desirable", "rewards_train/undesirable")
    margin = max((metrics.get(name, 0.0) for name in names), key=abs)
    has_other_dtype = settings.model.reference_dtype not in (None, settings.model.policy_dtype)
    has_dropout = isinstance(settings.peft, LoraSettings) and settings.peft.dropout > 0
    if metrics["counters/updates"] != 1 or has_other_dtype or has_dropout or abs(margin) < FIRST_MARGIN:
        return None
    return f"warning: the {kind} before the first update is {margin:.3g}, not 0. All {kind}s are off by about as much"
