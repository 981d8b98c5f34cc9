"""The README.md of an exported model: what it is, and the config, data and metrics of the run that trained it."""

import copy
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from engine.saved_models import RunRecord, SavedModel

# Keys that say where a run was, not how the model was trained.
LOCAL_KEYS = ("local_dirs", "local_run_dir", "cache_dir", "data_dir", "resume", "wandb", "tensorboard", "debug")


def model_card(name: str, saved: SavedModel, record: RunRecord) -> str:
    """Markdown with the front matter that the hub reads. Paths on this machine are cut to their last part."""
    config = copy.deepcopy(record.config)
    for key in LOCAL_KEYS:
        config.pop(key, None)
    datasets = [Path(dataset).name for dataset in config.get("datasets") or []]
    if datasets:
        config["datasets"] = datasets
    if config.get("chat_template"):
        config["chat_template"] = Path(config["chat_template"]).name
    model = config.get("model") or {}
    base = saved.base or model.get("name_or_path") or ""
    is_on_hub = _is_on_hub(base)
    base = base and _public(base)
    for key in ("name_or_path", "tokenizer_name_or_path"):
        if model.get(key):
            model[key] = _public(model[key])
    if model.get("archive"):
        model["archive"] = _last_parts(model["archive"])
    loss = config.get("loss") or {}

    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if is_on_hub:
        front["base_model"] = base
    front["tags"] = [tag for tag in ("dpo" if loss.get("name") in ("dpo", "cdpo") else loss.get("name"),) if tag]
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    count = saved.model.num_parameters()
    lines.append(
        f"{type(saved.model).__name__}, {count:,} parameters, {str(saved.model.dtype).removeprefix('torch.')}."
    )
    if saved.base:
        lines.append(f"Adapters were merged into {base}.")
    if not config:
        return "\n".join([*lines, ""])
    settings = ", ".join(f"{key}={value}" for key, value in loss.items() if key != "name")
    lines += ["", "## Training", ""]
    lines.append(f"- Model: {base}{' with the weights of ' + model['archive'] if model.get('archive') else ''}")
    lines.append(f"- Loss: {loss.get('name')}{f' ({settings})' if settings else ''}")
    lines.append(f"- Data: {', '.join(datasets)}")
    if record.examples is not None:
        lines.append(f"- Examples trained on: {record.examples:,}")
    step = ("optimizer", "lr", "batch_size", "max_length", "seed")
    lines.append("- Step: " + ", ".join(f"{key}={config[key]}" for key in step if key in config))
    if record.metrics:
        lines += ["", "## Evaluation", "", "| metric | |", "| --- | --- |"]
        lines += [f"| {key} | {value:.6g} |" for key, value in sorted(record.metrics.items()) if "counters" not in key]
    lines += ["", "## Config", "", "```yaml", yaml.safe_dump(config, sort_keys=False).rstrip(), "```", ""]
    return "\n".join(lines)


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()


def _is_on_hub(name: str) -> bool:
    """Whether the hub's local cache has a model of this name, which might else be a path from where the run was."""
    try:
        return "/" in name and not _is_local(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name that the hub could have
        return False


def _public(name: str) -> str:
    """A name on the hub as it is; of a path the last parts."""
    return _last_parts(name) if _is_local(name) else name


def _last_parts(path: str) -> str:
    """The last part of a path, or the last two of a checkpoint's."""
    parts = Path(path).parts
    is_checkpoint = parts[-1] in ("LATEST", "policy.pt") or parts[-1].startswith("step-")
    return "/".join(parts[-2:] if is_checkpoint else parts[-1:])
