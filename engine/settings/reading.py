"""Read a composed config into Settings, or report all its problems at once."""

import copy
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.settings.annotations import WrongValue, accepts, checked
from engine.settings.keys import key_types, unknown_key
from engine.settings.messages import bracketed, did_you_mean, nearest
from engine.settings.rules import broken_rules, learns_windows
from engine.settings.schema import LossSettings, Names, Settings
from engine.settings.secrets import keys_with_secrets
from utils import UserError, clipped

EXAMPLES = {"loss.beta": "0.1", "model.name_or_path": "EleutherAI/pythia-70m"}
HUB_FOLDER = re.compile(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)*")
SECRET = "holds a secret, and a run writes its config: leave it to the environment (HF_TOKEN, WANDB_API_KEY)"


def read_settings(config: DictConfig, dataset_names: Collection[str]) -> Settings:
    """The settings of a composed config. The config itself is not changed.

    Args:
        dataset_names: the names `datasets` may have beside paths.

    Raises:
        UserError: CONFIG, with every problem.
    """
    written, problems = written_values(config)
    types = chosen_types(written, problems)
    problems |= unknown_keys(written, types)
    valid = valid_values(config, written, types, problems)
    may_be_on_hub = "loss.name" in valid and learns_windows(valid["loss.name"])
    if "datasets" in valid and (problem := unknown_datasets(valid["datasets"], dataset_names, may_be_on_hub)):
        problems["datasets"] = problem
    for key in keys_with_secrets(config):
        problems.setdefault(key, SECRET)
    problems |= broken_rules({key: value for key, value in valid.items() if key not in problems})
    if problems:
        listed = "; ".join(f"{key}: {problem}" for key, problem in problems.items())
        what = f"{len(problems)} problems: {listed}" if len(problems) > 1 else listed
        raise UserError("CONFIG", what, "correct the keys named here; config/ explains every key")
    return Settings.model_validate(nested(valid)).with_source(source_of(config, written))


def settings_to_text(settings: Settings, names: Names) -> str:
    """Settings and derived names as text for another process. Secrets of the environment stay names."""
    config = OmegaConf.to_yaml(settings.source)
    return json.dumps({"config": config, "names": names, "command": settings.command})


def settings_from_text(text: str, dataset_names: Collection[str]) -> Settings:
    """The settings of settings_to_text(), with the names. Rules for names of users do not apply to derived ones."""
    sent = json.loads(text)
    config = OmegaConf.create(sent["config"])
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)  # as Hydra does: reading a missing key is an error
    return read_settings(config, dataset_names).named(**sent["names"]).with_command(sent["command"])


def written_values(config: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The value of every dotted key, interpolations resolved, and the problems of keys without a value."""
    loss = OmegaConf.select(config, "loss.name", throw_on_resolution_failure=False, throw_on_missing=False)
    types = key_types(loss if isinstance(loss, str) else None)
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}

    def read(node: DictConfig, prefix: str) -> None:
        for name in node:
            key = prefix + str(name)
            if key == "hydra":
                continue
            if OmegaConf.is_missing(node, name):
                problems[key] = f"is required: add {key}={EXAMPLES.get(key, 'VALUE')}"
                continue
            try:
                value = node[name]
                if isinstance(value, DictConfig) and key not in types:
                    read(value, f"{key}.")
                elif isinstance(value, DictConfig | ListConfig):
                    values[key] = OmegaConf.to_container(value, resolve=True)
                else:
                    values[key] = value
            except OmegaConfBaseException as error:
                problems[key] = str(error).partition("\n")[0]

    read(config, "")
    return values, problems


def chosen_types(written: Mapping[str, Any], problems: dict[str, str]) -> dict[str, Any]:
    """The types of all keys, with those of the chosen loss and peft; adds a problem if only peft.name was given."""
    loss, peft = (name if isinstance(name, str) else None for name in map(written.get, ("loss.name", "peft.name")))
    types, without_peft = key_types(loss, peft), key_types(loss)
    peft_keys = types.keys() - without_peft.keys()
    if peft_keys and not peft_keys & written.keys():
        problems["peft.name"] = f"must come with the other keys of its group: peft={peft}"
        return without_peft
    return types


def unknown_keys(written: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, str]:
    """The problems of keys without a type."""
    named = {group for group in ("loss", "peft") if accepts(types[f"{group}.name"], written.get(f"{group}.name"))}
    problems: dict[str, str] = {}
    for key in written:
        group, dot, _ = key.partition(".")
        if key in types or (dot and group in {"loss", "peft"} - named):  # without its name, a group has no known keys
            continue
        inner = [known for known in types if known.startswith(f"{key}.")]
        problems[key] = f"must hold {', '.join(inner)}" if inner else unknown_key(key, types)
    return problems


def valid_values(
    config: DictConfig, written: Mapping[str, Any], types: Mapping[str, Any], problems: dict[str, str]
) -> dict[str, Any]:
    """The values in their types; adds the problems of the others, and of missing keys, in the order of types."""
    valid: dict[str, Any] = {}
    found: dict[str, str] = {}
    for key in sorted(types, key=lambda key: is_interpolation(config, key)):  # the keys they point to come first
        if key in written and key not in problems:
            try:
                valid[key] = checked(types[key], written[key])
            except WrongValue as error:
                # One wrong value is one problem, also if another key takes its default from it.
                if not (str(error) in found.values() and is_interpolation(config, key)):
                    found[key] = str(error)
        elif key not in problems and key.partition(".")[0] not in written:
            found[key] = "is not set, and every key must be"
    problems |= {key: found[key] for key in types if key in found}
    return valid


def unknown_datasets(datasets: Collection[str], names: Collection[str], may_be_on_hub: bool) -> str | None:
    """The problem of data sets with neither a path nor a name.

    Args:
        may_be_on_hub: OWNER/NAME is a name too.
    """
    problems = []
    for name in datasets:
        if may_be_on_hub and HUB_FOLDER.fullmatch(name):
            continue
        if name not in names and not os.path.exists(name):
            guess = bracketed(did_you_mean(nearest(name, names)))
            problems.append(f"{clipped(name, 300)} does not exist and is not one of {', '.join(names)}{guess}")
    return ", ".join(problems) or None


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as groups, with the loss as LossSettings."""
    groups: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (groups.setdefault(group, {}) if group else groups)[name] = value
    loss = groups["loss"]
    common = {key: loss.pop(key) for key in LossSettings.model_fields if key in loss}
    groups["loss"] = LossSettings(**{**common, "keywords": loss})
    return groups


def source_of(config: DictConfig, written: Mapping[str, Any]) -> DictConfig:
    """A copy of the config, with a single data set as a list."""
    source = copy.deepcopy(config)
    if isinstance(written["datasets"], str):
        plain: Any = OmegaConf.to_container(config)
        source.datasets = [plain["datasets"]]
    return source


def is_interpolation(config: DictConfig, key: str) -> bool:
    group, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(config, group) if group else config
        return isinstance(node, DictConfig) and OmegaConf.is_interpolation(node, name)
    except OmegaConfBaseException:
        return False
