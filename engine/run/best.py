"""The best checkpoint of a run, by keep_best."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.data.examples import Example, fingerprint
from engine.run.resume_check import settings_of
from engine.run.run_files import update_link
from engine.settings.choices import BestMetric, is_better
from engine.settings.schema import Settings
from utils import UserError

SAMPLING = ("n_eval_model_samples", "max_length", "max_prompt_length")
REWARDS = ("rewards", "reward_weights", "reward_clip", "reward_options", "on_bad_reward")
# Absent from an evaluation without rewards or verdicts.
OF_REWARDS = ("rewards_eval/sampled", "rewards_eval/greedy")
WIN_RATE = "win_rate_eval"
# Keys of rollout that evaluations do not read.
OF_TRAINING = {
    *("num_responses", "prompts", "epochs", "max_rows", "truncated", "max_resamples"),
    *("top_p", "engine", "vllm_memory", "offload"),
}


def check_best(settings: Settings, num_eval_examples: int, has_ground_truth: bool) -> None:
    """Raise a UserError if evaluations of the run will lack keep_best's metric."""
    best, problem = settings.keep_best, None
    if best is None:
        return
    if not num_eval_examples:
        problem = "there are no examples to evaluate on"
    elif best.startswith("kl") and "reference" not in settings.loss.needs:
        problem = f"{best} is a distance to the reference, and loss={settings.loss.name} has none here"
    elif best.startswith("ground_truth") and not has_ground_truth:
        problem = f"{best} needs a data set with a ground truth, and {','.join(settings.datasets)} has none"
    elif best == WIN_RATE and not settings.measures_win_rates(has_ground_truth):
        problem = f"{best} needs a judge of samples of the policy and of a reference, and there is none"
    if problem:
        raise UserError("CONFIG", f"keep_best: {problem}", "choose another metric, or leave it out")


def settings_of_metric(settings: Settings) -> dict[str, Any]:
    """The settings that keep_best's metric is measured with, by dotted key."""
    of_win_rate: dict[str, Any] = {}
    if settings.keep_best == WIN_RATE:
        of_win_rate = {f"win_rate.{key}": value for key, value in settings.win_rate.model_dump().items()}
    if settings.loss.is_online:
        names = [] if settings.keep_best in ("kl_eval", WIN_RATE) else REWARDS
        rollout = settings.rollout.model_dump(exclude=OF_TRAINING) | {"max_new_tokens": settings.max_new_tokens}
        return (
            {f"rollout.{key}": value for key, value in rollout.items()}
            | {key: getattr(settings, key) for key in ("max_length", *names)}
            | of_win_rate
        )
    if settings.keep_best and settings.keep_best.startswith(("ground_truth", "kl", WIN_RATE)):  # of sampled responses
        return {key: getattr(settings, key) for key in SAMPLING} | of_win_rate
    measured_with = {key: value for key, value in settings_of(settings).items() if key.startswith("loss.")}
    if {"kl", "whole batch"} & settings.loss.needs:  # the loss of an example depends on those beside it
        measured_with["eval_batch_size"] = settings.eval_batch_size
    return measured_with


class BestCheckpoint:
    """Keeps track of the saved checkpoint with the best evaluation.

    Args:
        measured_with: settings_of_metric().

    Attributes:
        record: metric, value, checkpoint, a hash of the evaluated examples, and measured_with; empty without one.
    """

    def __init__(self, metric: BestMetric | None, examples: Iterable[Example], measured_with: Mapping[str, Any]):
        self._metric = metric
        self._evaluated = fingerprint(examples) if metric else None
        self._measured_with = dict(measured_with)
        self.record: dict[str, Any] = {}

    def resume(
        self, record: dict[str, Any], run_settings: Mapping[str, Any], run_dir: Path, is_first_rank: bool
    ) -> None:
        """Continue from the record of a checkpoint, if it is comparable.

        It needs the same metric, the same examples and settings of the metric, and its checkpoint.

        Args:
            run_settings: of the run that saved the checkpoint, by dotted key. Old records have none of their own.
        """
        if record.get("metric") != self._metric or not (run_dir / record.get("checkpoint", "")).is_dir():
            return
        if record and record.get("evaluated", self._evaluated) != self._evaluated:  # old records have no hash
            print("keep_best: the comparison starts anew, as the evaluation has other examples than before the resume")
            return
        before = record.get("measured_with", run_settings)
        changes = [
            f"{key} was {before[key]} and is {value}"
            for key, value in self._measured_with.items()
            if key in before and before[key] != value
        ]
        if record and changes:
            print(f"keep_best: the comparison starts anew, as {', '.join(changes)}")
            return
        self.record = record
        if record and is_first_rank:  # a killed run may have saved the checkpoint but not the link
            update_link(run_dir / record["checkpoint"], "BEST")

    def update(self, metrics: Mapping[str, float], checkpoint: str) -> bool:
        """Record checkpoint if its evaluation beats all earlier ones; returns whether it does."""
        if self._metric is None:
            return False
        if self._metric not in metrics and self._metric in (*OF_REWARDS, WIN_RATE):
            missing = "pair has a verdict" if self._metric == WIN_RATE else "response has a reward"
            print(f"keep_best: this evaluation has no {self._metric}, as no {missing}", flush=True)
            return False
        if self._metric not in metrics:
            found = ", ".join(sorted(metrics))
            raise UserError("CONFIG", f"keep_best: the evaluation has no {self._metric}", f"choose one of {found}")
        value = metrics[self._metric]
        if self.record and not is_better(self._metric, value, self.record["value"]):
            return False
        self.record = {
            "metric": self._metric,
            "value": value,
            "checkpoint": checkpoint,
            "evaluated": self._evaluated,
            "measured_with": self._measured_with,
        }
        return True
