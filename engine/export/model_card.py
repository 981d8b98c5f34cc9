"""Write the model card of an export."""

import copy
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from engine.export.run_record import RunRecord
from engine.export.saved_models import SavedModel
from engine.models.score_head import has_score_head, stored_rewards

# Keys about the machine of a run. They do not affect training.
LOCAL_KEYS = (
    *("local_dirs", "local_run_dir", "cache_dir", "data_dir", "resume", "debug"),
    *("wandb", "mlflow", "trackio", "tensorboard"),
)


def model_card(name: str, saved: SavedModel, record: RunRecord) -> str:
    """The card as Markdown, with the hub's front matter; local paths are shortened to their last part."""
    base = saved.base or (record.config.get("model") or {}).get("name_or_path") or ""
    is_on_hub = _is_on_hub(base)
    base = base and _shorten_path(base)
    config = _public_config(record.config)
    loss = config.get("loss") or {}
    gives_scores = has_score_head(saved.model)
    task = "text-classification" if gives_scores else "text-generation"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    if is_on_hub:
        front["base_model"] = base
    front["tags"] = [tag for tag in ("dpo" if loss.get("name") in ("dpo", "cdpo") else loss.get("name"),) if tag]
    front["tags"] += ["reward-model"] if gives_scores else []
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    count = saved.model.num_parameters()
    lines.append(
        f"{type(saved.model).__name__}, {count:,} parameters, {str(saved.model.dtype).removeprefix('torch.')}."
    )
    if saved.base:
        lines.append(f"Adapters were merged into {base}.")
    if gives_scores:
        lines += ["", *_describe_scores(saved)]
    if not config:
        return "\n".join([*lines, ""])
    archive = (config.get("model") or {}).get("archive")
    settings = ", ".join(f"{key}={value}" for key, value in loss.items() if key != "name")
    lines += ["", "## Training", ""]
    lines.append(f"- Model: {base}{f' with the weights of {archive}' if archive else ''}")
    lines.append(f"- Loss: {loss.get('name')}{f' ({settings})' if settings else ''}")
    lines.append(f"- Data: {', '.join(config.get('datasets') or [])}")
    if record.num_examples is not None:
        lines.append(f"- Examples trained on: {record.num_examples:,}")
    step = ("optimizer", "lr", "batch_size", "max_length", "seed")
    lines.append("- Step: " + ", ".join(f"{key}={config[key]}" for key in step if key in config))
    if record.metrics:
        lines += ["", "## Evaluation", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {key} | {value:.6g} |" for key, value in sorted(record.metrics.items()) if "counters" not in key]
    lines += ["", "## Config", "", "```yaml", yaml.safe_dump(config, sort_keys=False).rstrip(), "```", ""]
    return "\n".join(lines)


def _describe_scores(saved: SavedModel) -> list[str]:
    """How to read the scores of a reward model."""
    lines = ["A reward model: `AutoModelForSequenceClassification` gives one score to a prompt with a response."]
    lines.append("Each text ends with the end-of-text token. Higher is better.")
    if saved.tokenizer.chat_template:
        lines.append("Of messages, `tokenizer.apply_chat_template(messages, tokenize=False)` writes the text with that")
        lines.append("token. Encode it with `add_special_tokens=False`.")
    mean, deviation = stored_rewards(saved.model)
    if mean is not None and deviation is not None:
        lines.append(f"On held-out responses the scores have the mean {mean:.6g} and the standard deviation")
        lines.append(f"{deviation:.6g} (`reward_mean` and `reward_std` in config.json). The model gives raw scores:")
        lines.append("`(score - reward_mean) / reward_std` is normalised.")
    return lines


def _public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a run's config, without the machine's keys and with shortened paths."""
    config = {key: value for key, value in copy.deepcopy(config).items() if key not in LOCAL_KEYS}
    if config.get("datasets"):
        config["datasets"] = [Path(dataset).name for dataset in config["datasets"]]
    if config.get("chat_template"):
        config["chat_template"] = Path(config["chat_template"]).name
    model = config.get("model") or {}
    for key in ("name_or_path", "tokenizer_name_or_path"):
        if model.get(key):
            model[key] = _shorten_path(model[key])
    if model.get("archive"):
        model["archive"] = _last_parts(model["archive"])
    return config


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()


def _is_on_hub(name: str) -> bool:
    """Whether the hub's local cache has this model; without that proof, the name may be a path of another machine."""
    try:
        return "/" in name and not _is_local(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # impossible on the hub
        return False


def _shorten_path(name: str) -> str:
    """A name on the hub unchanged; a path's last part."""
    return _last_parts(name) if _is_local(name) else name


def _last_parts(path: str) -> str:
    """The last part of a path; of a checkpoint's path the last two."""
    parts = Path(path).parts
    is_checkpoint = parts[-1] in ("LATEST", "policy.pt") or parts[-1].startswith("step-")
    return "/".join(parts[-2:] if is_checkpoint else parts[-1:])
