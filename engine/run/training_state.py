"""The training state of a checkpoint."""

from typing import TYPE_CHECKING, Any

from engine.models.adapters import adapter_of
from engine.models.score_head import has_score_head, record_rewards
from engine.run.resume_check import settings_of
from engine.run.run_files import log_sizes
from engine.step.metrics import to_floats

if TYPE_CHECKING:  # trainers import the engine, not the other way round
    from trainers import BasicTrainer


def training_state(trainer: "BasicTrainer", evaluation_due: bool, is_evaluated: bool) -> dict[str, Any]:
    """What a run needs to resume, beside tensors; see records.TrainingState.

    Args:
        evaluation_due: the evaluation here was skipped.
        is_evaluated: the last evaluation was here.
    """
    adapter = adapter_of(trainer.policy)
    state = {
        "counters": dict(trainer.counters),
        "evaluation_due": evaluation_due,
        "log_sizes": log_sizes(trainer.run_dir),
        "settings": settings_of(trainer.settings),
        "data": trainer.data_hash,
        "reference": trainer.reference_hash,
        "base": trainer.base_hash,
        "token_budget": trainer.token_budget,
        "best": trainer.best.record,
        "chat_template": trainer.chat_template_text,
        "loss_state": to_floats(trainer.runner.objective.state),
        "critic_base": None if trainer.critic is None else trainer.critic.base_hash,
    }
    if has_score_head(trainer.policy):
        metrics = trainer.eval_metrics if is_evaluated else {}
        rewards = [metrics.get(f"rewards_eval/{name}") for name in ("mean", "std")]
        record_rewards(trainer.policy, *rewards)
        state |= {"reward_mean": rewards[0], "reward_std": rewards[1]}
    if adapter is not None and trainer.runner.reference is not None:
        state["reference_model"] = adapter.description
    return state
