"""Warnings that explain a run: signs in its metrics, their usual causes, and keys that help.

They read the rows of metrics.jsonl and nothing else. Their limits are the keys of config/config.yaml under warnings.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from engine.settings.schema import Settings

Row = Mapping[str, float]

METRICS_FILE, WARNINGS_FILE = "metrics.jsonl", "warnings.jsonl"
WINDOW = 128  # examples: means over fewer are chance
FEWEST_STEPS = 50  # of a run, for a share of steps
SETTLED = 20, 256  # steps and examples after warm-up, for a verdict on the loss
FLAT_MARGIN = 0.05  # rewards differ by less while the policy has hardly moved
EARLY = 0.1  # the share of a run that counts as its start
FIRST_LOSS = 1e-2  # how far from ln 2 a loss may start, relatively: low dtypes round


class History:
    """What the warnings need of a run's rows so far.

    Attributes:
        recent: the last training steps, with WINDOW examples or more.
        after_warmup: the first training steps after warm-up, until there are as many as SETTLED says.
        evaluations: all of them.
        first_loss: of the first step; None if its row is missing.
    """

    def __init__(self, settings: Settings, num_examples: int, num_updates: int):
        self.settings, self.num_examples, self.num_updates = settings, num_examples, num_updates
        self.recent: deque[Row] = deque()
        self.after_warmup: list[Row] = []
        self.evaluations: list[Row] = []
        self.first_loss: float | None = None
        self.num_clipped = 0
        self._before = 0.0  # examples before the first of recent

    def add(self, row: Row) -> None:
        """Add a row of metrics.jsonl."""
        if "loss/train" not in row:
            self.evaluations.append(row)
            return
        if row.get("counters/updates") == 1:
            self.first_loss = row["loss/train"]
        if row.get("counters/updates", 0) > self.settings.warmup_steps and not self.is_settled:
            self.after_warmup.append(row)
        self.num_clipped += row.get("grad_norm", 0.0) >= self.settings.max_grad_norm
        if not self.recent:
            self._before = max(0, row["counters/examples"] - self.settings.batch_size)
        self.recent.append(row)
        while row["counters/examples"] - self.recent[0]["counters/examples"] >= WINDOW:
            self._before = self.recent.popleft()["counters/examples"]

    @property
    def is_settled(self) -> bool:
        """Whether after_warmup is complete."""
        num_steps, num_examples = len(self.after_warmup), len(self.after_warmup) * self.settings.batch_size
        return num_steps >= SETTLED[0] and num_examples >= SETTLED[1]

    def recent_mean(self, name: str) -> float | None:
        """The mean over at least WINDOW examples; None without so many."""
        if not self.recent:
            return None
        if self.recent[-1]["counters/examples"] - self._before < WINDOW or any(name not in row for row in self.recent):
            return None
        total, before = 0.0, self._before
        for row in self.recent:
            total += row[name] * (row["counters/examples"] - before)
            before = row["counters/examples"]
        return total / (before - self._before)

    def is_chance(self, difference: float, *errors: float | None) -> bool:
        """Whether a difference is within warnings.standard_errors of 0. One sample has no error: it may be chance."""
        known = [error for error in errors if error is not None]
        limit = self.settings.warnings.standard_errors * math.hypot(*known)
        return len(known) < len(errors) or abs(difference) <= limit


@dataclass(frozen=True)
class Check:
    """A warning, named like its key.

    Args:
        find: takes a history and the limit; returns what the metrics show, or None.
        meaning: what this usually means.
        help: what to do, and the keys for it.
    """

    name: str
    find: Callable[[History, Any], str | None]
    meaning: str
    help: str


def _chosen_falls(history: History, num_evaluations: int) -> str | None:
    name = "logratios_eval/chosen"
    values = [0.0, *(row[name] for row in history.evaluations if name in row)]  # a run starts at 0
    last = values[-num_evaluations - 1 :]
    if len(last) <= num_evaluations or max(last[1:]) >= 0 or any(after >= before for before, after in pairwise(last)):
        return None
    return f"{name} is negative and falls: {', '.join(f'{value:.3g}' for value in last[1:])}"


def _early_accuracy(history: History, limit: float) -> str | None:
    accuracy = history.recent_mean("rewards_train/accuracies")
    if accuracy is None or accuracy < limit:
        return None
    share = history.recent[-1]["counters/examples"] / history.num_examples
    if share > EARLY:
        return None
    return f"rewards_train/accuracies is {accuracy:.3g} after {share:.0%} of the run"


def _flat_loss(history: History, limit: float) -> str | None:
    start = math.log(2)
    if history.first_loss is None or abs(history.first_loss / start - 1) > FIRST_LOSS:
        return None  # another loss, with another start
    if not history.is_settled:
        return None
    loss = fmean(row["loss/train"] for row in history.after_warmup)
    margin = fmean(row.get("rewards_train/margins", 0.0) for row in history.after_warmup)
    if abs(loss / start - 1) > limit or abs(margin) > FLAT_MARGIN:
        return None
    return f"loss/train is {loss:.4f} after the warm-up, and was ln 2 = 0.6931 at the start"


def _length_ratio(history: History, limit: float) -> str | None:
    row = history.evaluations[-1] if history.evaluations else {}
    change = row.get("samples_eval/length_change", 0.0)
    length = row.get("samples_eval/length", 0.0)
    if change <= 0 or length < limit * (length - change):
        return None
    if history.is_chance(change, row.get("samples_eval/length_change/standard_error")):
        return None
    return f"samples have {length:.1f} tokens, and those of the reference {length - change:.1f}"


def _unfinished_rise(history: History, limit: float) -> str | None:
    name, error = "samples_eval/unfinished", "samples_eval/unfinished/standard_error"
    rows = [row for row in history.evaluations if name in row]
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    change, errors = last[name] - first[name], [first.get(error), last.get(error)]
    if f"{name}_change" in last:  # from the reference
        change, errors = last[f"{name}_change"], [last.get(f"{name}_change/standard_error")]
    if change < limit or history.is_chance(change, *errors):
        return None
    return f"{last[name]:.0%} of samples have no end of text, {100 * change:.0f} points more than at the start"


def _clipped_share(history: History, limit: float) -> str | None:
    # Of the whole run: a run from scratch often starts with clipped steps, and leaves them soon.
    num_updates = history.num_updates
    if num_updates < FEWEST_STEPS or history.num_clipped <= limit * num_updates:
        return None
    norm = history.settings.max_grad_norm
    return (
        f"grad_norm was at least max_grad_norm={norm:g} in {history.num_clipped:,} of {num_updates:,} steps of the run"
    )


def _kl(history: History, limit: float) -> str | None:
    row = history.evaluations[-1] if history.evaluations else {}
    for direction in ("kl_eval", "forward_kl_eval"):
        name = next((name for name in (f"{direction}/next_token", direction) if name in row), None)
        if name and row[name] > limit and not history.is_chance(row[name], row.get(f"{name}/standard_error")):
            return f"{name} is {row[name]:.3g} nats per response, above {limit:g}"
    return None


def _bad_rewards(history: History, limit: float) -> str | None:
    number = history.recent[-1].get("rollout/bad_rewards", 0.0) if history.recent else 0.0
    return f"{number:,.0f} rewards of an iteration failed, and their responses are left out" if number > limit else None


CHECKS = (
    Check(
        "chosen_falls",
        _chosen_falls,
        "the loss widens its margins by making both responses unlikely, the rejected ones faster. Probability moves to"
        " responses of neither kind. It is common where chosen and rejected are much alike",
        "add loss.sft_weight=0.1, try loss=dpop, raise loss.beta or lower lr",
    ),
    Check(
        "early_accuracy",
        _early_accuracy,
        "the pairs are told apart by something easy, such as length, format or their source. Or the learning rate is"
        " too high. The policy then hardly improves on what you care for",
        "look for what differs in the pairs; lower lr or n_epochs",
    ),
    Check(
        "flat_loss",
        _flat_loss,
        "the policy hardly moves, so the run learns nothing yet. The learning rate is too low for this optimizer, or"
        " chosen and rejected responses are the same after truncation, or labels are random",
        "raise lr; with peft=lora about tenfold; check max_length and the data",
    ),
    Check(
        "length_ratio",
        _length_ratio,
        "the policy learns that longer is better, as chosen responses are often longer. Judges and rewards like length"
        " too, so compare at equal length",
        "try loss=simpo, loss=ld_dpo or loss.average_log_prob=true, raise loss.beta, or balance lengths in the data."
        " In online training, loss=dr_grpo or a reward of length",
    ),
    Check(
        "unfinished_rise",
        _unfinished_rise,
        "the policy forgets to end its responses. Often the end of text was truncated in training, or both responses"
        " have it and its probability falls with theirs",
        "raise max_length, add loss.sft_weight=0.1, lower lr or raise loss.beta. In online training, set"
        " rollout.missing_eos_penalty",
    ),
    Check(
        "clipped_share",
        _clipped_share,
        "clipping sets the size of most steps, not the learning rate. The clip is too low for this model and loss, or"
        " the learning rate too high",
        "raise max_grad_norm, lower lr, or raise batch_size or warmup_steps",
    ),
    Check(
        "kl",
        _kl,
        "the policy has left the responses of the reference. The preferences say little about its new ones: rewards may"
        " rise while responses get worse",
        "raise loss.beta, lower lr or n_epochs, and read samples.jsonl",
    ),
    Check(
        "bad_rewards",
        _bad_rewards,
        "a reward function raises for some rows or responses, or returns NaN. The others are then learned alone",
        "on_bad_reward=raise shows the error and its prompt",
    ),
)


class RunWarnings:
    """Reads the rows of a run, and gives each warning once.

    Args:
        num_examples, num_updates: of the whole run.
        run_dir: its logs are read, so a resumed run continues with them.
    """

    def __init__(self, settings: Settings, num_examples: int, num_updates: int, run_dir: Path):
        self._history = History(settings, num_examples, num_updates)
        self._limits = {check.name: getattr(settings.warnings, check.name) for check in CHECKS}
        self._pending = [check for check in CHECKS if self._limits[check.name] is not None]
        for row in _rows(run_dir / METRICS_FILE):
            self._history.add(row)
        given = {row.get("warning") for row in _rows(run_dir / WARNINGS_FILE)}
        self._pending = [check for check in self._pending if check.name not in given]

    def see(self, row: Row) -> list[dict[str, Any]]:
        """Add a row of metrics.jsonl; returns new warnings, as rows of warnings.jsonl."""
        self._history.add(row)
        found = []
        for check in [*self._pending]:
            text = check.find(self._history, self._limits[check.name])
            if text is not None:
                self._pending.remove(check)
                counters = {key: row[key] for key in ("counters/examples", "counters/updates") if key in row}
                texts = {"warning": check.name, "found": text, "meaning": check.meaning, "help": check.help}
                found.append({**counters, **texts})
        return found


def describe(warning: Mapping[str, Any]) -> str:
    """A row of warnings.jsonl as a line of the log."""
    return (
        f"warning: {warning['found']}. Usually {warning['meaning']}. What helps: {warning['help']}"
        f" (docs/warnings.md; warnings.{warning['warning']}=null turns it off)"
    )


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """The intact rows of a log."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if isinstance(row, dict) and "counters/examples" in row:
            yield row
