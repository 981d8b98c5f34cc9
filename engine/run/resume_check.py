"""Check that a run may resume from a checkpoint: same settings, data and models."""

from pathlib import Path
from typing import Any

from engine.models.archives import STATE_FILE
from engine.models.records import TrainingState, parse_record
from engine.settings.schema import Settings
from engine.settings.secrets import comparable
from engine.settings.unused import is_shipped
from utils import UserError

# Keys with no effect on the trained weights. They may change on resume.
FREE_ON_RESUME = {
    "exp_name", "local_dirs", "local_run_dir", "cache_dir", "data_dir", "resume", "debug", "wandb", "mlflow",
    "trackio", "tensorboard",
    "minimum_log_interval_secs", "save_every", "keep_checkpoints", "keep_best", "compile", "do_first_eval",
    "eval_every",
    "eval_batch_size", "n_eval_examples", "sample_during_eval", "n_eval_model_samples", "resume_allow",
    "on_nonfinite", "max_nonfinite", "plan", "plan_hardware", "trainer", "num_processes", "tensor_parallel_size",
    "tensor_parallel", "fsdp", "collective_timeout", "warnings", "sweep",
}  # fmt: skip


def check_settings(checkpoint: Path, settings: Settings) -> None:
    """Raise a UserError if settings differ from those of the checkpoint's run. It names the keys."""
    before, now = read_state_file(checkpoint)["settings"], settings_of(settings)
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not {key, key.split(".")[0]} & set(settings.resume_allow)
        # A key newer than the checkpoint has its default.
        and (key in before or not is_shipped(settings, key, now[key], has_experiment=False))
    ]
    if differing:
        changes = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in differing)
        raise UserError(
            "CONFIG",
            f"resume: the run at {checkpoint} had another config: {changes}",
            "repeat its command and add resume=, permit the change with "
            f"resume_allow=[{','.join(differing)}], or start a new run from its weights with model.archive",
        )


def settings_of(settings: Settings) -> dict[str, Any]:
    """The settings a resumed run must share, by dotted key."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    add("", comparable(settings.source))
    return {key: value for key, value in flat.items() if key.split(".")[0] not in FREE_ON_RESUME}


def read_state(checkpoint: Path, data: str, reference: str | None, base: str | None) -> dict[str, Any]:
    """The training state in a checkpoint: counters, sizes of logs, and more.

    Args:
        data: the hash of the training examples.
        reference: the hash of the reference's weights.
        base: the hash of the weights below the adapters.

    Raises:
        UserError: CHECKPOINT if the checkpoint is unreadable, or a model has other weights; DATA for other examples.
    """
    state = read_state_file(checkpoint)
    for model, key, expected in (("reference", "reference", reference), ("base model", "base", base)):
        if state.get(key) != expected:
            raise UserError(
                "CHECKPOINT",
                f"resume: the {model} of the run at {checkpoint} had other weights than the model has now",
                "give the run's original model, or start a new run from its weights with model.archive",
            )
    if state["data"] != data:
        raise UserError(
            "DATA",
            f"resume: the run at {checkpoint} was trained on other examples",
            "give the same data, or start a new run from its weights with model.archive",
        )
    return state


def read_state_file(checkpoint: Path) -> dict[str, Any]:
    try:
        return parse_record(TrainingState, (checkpoint / STATE_FILE).read_bytes())
    except OSError as error:
        raise unreadable(checkpoint, error) from error
    except ValueError as error:
        raise unreadable(checkpoint, ValueError(f"{STATE_FILE}: {error}")) from error


def unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError("CHECKPOINT", f"the checkpoint {checkpoint} cannot be read ({error})", "resume from another one")
