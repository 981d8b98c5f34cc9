"""Settings that change nothing beside the others: refuse the mistakes, and warn of the rest."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from engine.settings.keys import keyword_names
from engine.settings.messages import shown
from engine.settings.presets import CONFIG_DIR
from engine.settings.schema import CriticSettings, RolloutSettings, Settings, SweepSettings
from utils import UserError

EMBEDDED = {"films"}  # data sets that read no files


@dataclass(frozen=True)
class Context:
    """A run's settings, and facts about them.

    Args:
        named: data sets chosen by name.
        files: data sets chosen by path.
        has_reference: the loss compares with a reference model.
        learns_dialogues: the loss learns every response of a dialogue.
        is_sweep: the run is a job of a sweep.
    """

    settings: Settings
    named: list[str]
    files: list[str]
    has_reference: bool
    learns_dialogues: bool
    is_sweep: bool


@dataclass(frozen=True)
class Unused:
    """A key without an effect in some contexts.

    Args:
        key: dotted.
        reason: of a context; None where the key has an effect.
        is_mistake: the run would not do what the key asks.
    """

    key: str
    reason: Callable[[Context], str | None]
    is_mistake: bool = False


def _of_windows(run: Context) -> str | None:
    return f"loss={run.settings.loss.name} learns text" if run.settings.loss.learns_windows else None


def _without_windows(run: Context) -> str | None:
    loss = run.settings.loss
    return None if loss.learns_windows else f"loss={loss.name} learns responses, not text"


def _with_trained_tokenizer(run: Context) -> str | None:
    size = run.settings.tokenizer.train
    return None if size is None else f"tokenizer.train={size} trains one"


def _only_named(run: Context) -> str | None:
    if run.settings.loss.learns_windows:
        return _of_windows(run)
    return _without_files(run)


def _without_files(run: Context) -> str | None:
    return None if run.files else f"it is for files, and datasets={','.join(run.named)} names none"


def _without_published_files(run: Context) -> str | None:
    if {*run.named} - EMBEDDED:
        return None
    return f"it holds data sets such as hh, and datasets={','.join(run.settings.datasets)} names none"


def _sft_turns(run: Context) -> str | None:
    if run.learns_dialogues or run.settings.loss.learns_windows:
        return _only_named(run)
    learned = "sampled responses" if run.settings.loss.is_online else "preferences"
    return f"loss={run.settings.loss.name} learns {learned}, not dialogues"


def _without_reference(run: Context) -> str | None:
    return None if run.has_reference else f"loss={run.settings.loss.name} has no reference model here"


def _offline(run: Context) -> str | None:
    return None if run.settings.loss.is_online else f"loss={run.settings.loss.name} learns stored responses"


def _online_sizes(run: Context) -> str | None:
    loss = run.settings.loss
    return f"loss={loss.name} evaluates by rollout.max_rows and token_budget" if loss.is_online else None


def _without_critic(run: Context) -> str | None:
    return None if run.settings.loss.has_critic else f"loss={run.settings.loss.name} has no critic"


def _without_target_kl(run: Context) -> str | None:
    return "loss.target_kl is null" if run.settings.loss.keywords.get("target_kl") is None else None


def _without_samples(run: Context) -> str | None:
    if not run.settings.sample_during_eval:
        return "sample_during_eval=false"
    return _without_reference(run) or ("n_eval_model_samples=0" if not run.settings.n_eval_model_samples else None)


def _without_judge(run: Context) -> str | None:
    return _without_samples(run) or ("win_rate.judge is null" if run.settings.win_rate.judge is None else None)


def _without_vllm(run: Context) -> str | None:
    engine = run.settings.rollout.engine
    return _offline(run) or (None if engine == "vllm" else f"rollout.engine={engine}")


def _without_overlong_buffer(run: Context) -> str | None:
    return _offline(run) or ("rollout.overlong_buffer is null" if not run.settings.rollout.overlong_buffer else None)


def _without_sweep(run: Context) -> str | None:
    return None if run.is_sweep else "there is one job; -m starts a sweep"


def _without_logger(name: str) -> Callable[["Context"], str | None]:
    def reason(run: Context) -> str | None:
        if run.settings.debug:
            return f"debug=true logs nothing to {name}"
        return None if getattr(run.settings, name).enabled else f"{name}.enabled=false"

    return reason


def _without_checkpoints(run: Context) -> str | None:
    return "debug=true keeps no checkpoints" if run.settings.debug else None


def _in_one_process(run: Context) -> str | None:
    return "trainer=BasicTrainer is one process" if run.settings.trainer == "BasicTrainer" else None


def _without_alpha(run: Context) -> str | None:
    divergence = run.settings.loss.keywords.get("divergence", "alpha")
    return None if divergence == "alpha" else f"loss.divergence={divergence}"


def _without_beta(run: Context) -> str | None:
    from losses import LOSSES  # imports torch, which takes seconds

    pair_loss = run.settings.loss.keywords.get("pair_loss")
    if pair_loss is None or "beta" in keyword_names(LOSSES[pair_loss].function):
        return None
    return f"loss.pair_loss={pair_loss} has no beta"


def _of_int8(run: Context) -> str | None:
    return "peft.quant_type=int8" if getattr(run.settings.peft, "quant_type", None) == "int8" else None


UNUSED = (
    Unused("format", _only_named, is_mistake=True),
    Unused("data_dir", _without_published_files, is_mistake=True),
    Unused("chat_template", _only_named),
    Unused("sft_turns", _sft_turns),
    Unused("test_fraction", _without_files),
    Unused("text_field", lambda run: _without_windows(run) or _without_files(run), is_mistake=True),
    Unused("document_mask", _without_windows, is_mistake=True),
    Unused("length_grouping", _of_windows),
    Unused("model.tokenizer_name_or_path", _with_trained_tokenizer, is_mistake=True),
    Unused("min_lr", lambda run: "lr_schedule=constant" if run.settings.lr_schedule == "constant" else None),
    Unused("reference", _without_reference),
    Unused("model.reference_dtype", _without_reference),
    Unused("reference_refresh.every", _without_reference, is_mistake=True),
    Unused(
        "reference_refresh.mix",
        lambda run: "reference_refresh.every is null" if run.settings.reference_refresh.every is None else None,
        is_mistake=True,
    ),
    Unused(
        "model.fsdp_policy_mp",
        lambda run: (
            None
            if run.settings.mixed_precision == run.settings.model.fsdp_policy_mp
            else f"mixed_precision={shown(run.settings.mixed_precision)} replaces it"
        ),
    ),
    *(
        Unused(f"rollout.{name}", _without_vllm if name == "vllm_memory" else _offline, is_mistake=True)
        for name in RolloutSettings.model_fields
        if name != "overlong_penalty"
    ),
    *(Unused(f"critic.{name}", _without_critic, is_mistake=True) for name in CriticSettings.model_fields),
    Unused("ptx.datasets", _offline, is_mistake=True),
    Unused("ptx.weight", lambda run: None if run.settings.ptx.datasets else "ptx.datasets is null", is_mistake=True),
    Unused("loss.kl_horizon", _without_target_kl),
    Unused("rollout.overlong_penalty", _without_overlong_buffer, is_mistake=True),
    Unused("reward_weights", _offline, is_mistake=True),
    Unused("reward_options", _offline, is_mistake=True),
    Unused("reward_clip", _offline, is_mistake=True),
    Unused("rewards", _offline, is_mistake=True),
    Unused("reward_timeout", _offline, is_mistake=True),
    Unused("on_bad_reward", _offline),
    Unused("eval_batch_size", _online_sizes),
    Unused("loss.alpha", _without_alpha),
    Unused("loss.beta", _without_beta),
    Unused("peft.double_quant", _of_int8),
    Unused("peft.storage_dtype", _of_int8),
    Unused("n_eval_model_samples", lambda run: None if run.settings.sample_during_eval else "sample_during_eval=false"),
    Unused("win_rate.judge", _without_samples, is_mistake=True),
    Unused("win_rate.prompts", _without_judge, is_mistake=True),
    Unused("weights", lambda run: "there is one data set" if len(run.settings.datasets) == 1 else None),
    Unused("max_nonfinite", lambda run: "on_nonfinite=abort" if run.settings.on_nonfinite == "abort" else None),
    Unused("collective_timeout", _in_one_process),
    Unused("resume_allow", lambda run: None if run.settings.resume else "resume is null"),
    Unused("plan_hardware", lambda run: None if run.settings.plan else "plan=false"),
    *(Unused(f"sweep.{name}", _without_sweep) for name in SweepSettings.model_fields),
    Unused("wandb.entity", _without_logger("wandb")),
    Unused("wandb.project", _without_logger("wandb")),
    Unused("mlflow.tracking_uri", _without_logger("mlflow")),
    Unused("mlflow.experiment", _without_logger("mlflow")),
    Unused("trackio.project", _without_logger("trackio")),
    Unused("save_every", _without_checkpoints),
    Unused("keep_checkpoints", _without_checkpoints),
    Unused("keep_best", _without_checkpoints),
)


def _value(settings: Settings, key: str) -> Any:
    """The value of a dotted key; None in a group without it."""
    group, _, keyword = key.rpartition(".")
    if group == "loss" and keyword in settings.loss.keywords:
        return settings.loss.keywords[keyword]
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def is_shipped(settings: Settings, key: str, value: Any, has_experiment: bool) -> bool:
    """Whether a YAML file of this program gives the key this value, and not the user."""
    if value is None:
        return True
    chosen = {"loss": settings.loss.name, "peft": settings.peft.name}

    def is_read(path: Path) -> bool:
        group = path.parent.name
        return path.stem == chosen.get(group, path.stem) and (has_experiment or group != "experiment")

    files = sorted(CONFIG_DIR.rglob("*.yaml"), key=lambda path: path.parent != CONFIG_DIR)  # defaults come first
    return any(value in _values_in(path, key) for path in filter(is_read, files))


def _values_in(path: Path, key: str) -> list[Any]:
    """The values of a dotted key in a YAML file: of a whole config, or of one group."""
    config = _load(path)
    names = {key, key.removeprefix(f"{path.parent.name}.")}
    return [value for name in names if (value := OmegaConf.select(config, name)) is not None]


@cache
def _load(path: Path) -> Any:
    return OmegaConf.load(path)


def check_unused(
    settings: Settings, dataset_names: Collection[str], has_experiment: bool = False, is_sweep: bool = False
) -> list[str]:
    """Warnings about settings that change nothing, each a line. Values of this program's YAML files need none.

    Args:
        dataset_names: the names `datasets` may have beside paths.
        has_experiment: some values may be of config/experiment.
        is_sweep: the run is a job of a sweep.

    Raises:
        UserError: CONFIG, for settings that are surely a mistake.
    """
    from losses import LOSSES  # imports torch, which takes seconds

    loss = LOSSES[settings.loss.name]
    run = Context(
        settings,
        named=[name for name in settings.datasets if name in dataset_names],
        files=[name for name in settings.datasets if name not in dataset_names],
        has_reference="reference" in settings.loss.needs,
        learns_dialogues=loss.batch == "sft",
        is_sweep=is_sweep,
    )
    mistakes, warnings = [], []
    for each in UNUSED:
        value, reason = _value(settings, each.key), each.reason(run)
        if reason is None or is_shipped(settings, each.key, value, has_experiment):
            continue
        if each.is_mistake:
            mistakes.append(f"{each.key}: {shown(value)} would change nothing: {reason}")
        else:
            effect = "changes the exported template alone" if each.key == "chat_template" else "changes nothing"
            warnings.append(f"warning: {each.key}={shown(value)} {effect}: {reason}")
    if mistakes:
        raise UserError("CONFIG", "; ".join(mistakes), "leave the keys named here out")
    return warnings
