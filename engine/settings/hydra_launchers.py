"""The launchers of Hydra that may run a sweep elsewhere, and the settings that each may have."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from engine.settings.secrets import keys_with_secrets, redact
from utils import UserError, clipped

TARGET = "hydra.launcher._target_"
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
PLUGINS = {
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher": "joblib",
    f"{SUBMITIT}.LocalLauncher": "submitit_local",
    f"{SUBMITIT}.SlurmLauncher": "submitit_slurm",
}
PACKAGES = {"joblib": "hydra-joblib-launcher", "submitit_local": "hydra-submitit-launcher"}
PACKAGES["submitit_slurm"] = PACKAGES["submitit_local"]
# They are commands, or name files to write.
RUN_CODE = {"setup", "additional_parameters", "pre_dispatch", "temp_folder"}
PLAIN = re.compile(r"[\w.,:@%+=*-]*")
FOLDER = "${hydra.sweep.dir}/.submitit/%j"


def plugin_of(config: DictConfig) -> str | None:
    """The plugin that launches the jobs of a composed config; None for Hydra's basic launcher."""
    return PLUGINS.get(OmegaConf.select(config, TARGET))


def check_launcher(config: DictConfig, typed: DictConfig) -> None:
    """Check the settings of a plugin.

    Settings that can run code come from the command line alone. A config file may hold numbers and plain words.

    Args:
        typed: composed of the defaults and the launcher's overrides on the command line, without other configs.

    Raises:
        UserError: CONFIG.
    """
    written: Any = OmegaConf.to_container(config.hydra.launcher)
    if written.pop("submitit_folder", FOLDER) != FOLDER:
        problem = "hydra.launcher.submitit_folder: it holds the command and the settings, and must be private"
        raise UserError("CONFIG", problem, "leave it out: it is inside sweep.dir, for you alone")
    for name in written:
        value, is_typed = _resolved(config, name), name in typed.hydra.launcher
        if is_typed and value == _resolved(typed, name):
            continue
        is_plain = value is None or isinstance(value, bool | int | float)
        is_plain |= isinstance(value, str) and PLAIN.fullmatch(value) is not None
        if not is_typed or name in RUN_CODE or not is_plain:
            problem = f"hydra.launcher.{name}: {clipped(redact(str(value), config))} of a config file could run code"
            raise UserError("CONFIG", problem, f"give it on the command line: hydra.launcher.{name}=...")


def _resolved(config: DictConfig, name: str) -> Any:
    value = config.hydra.launcher[name]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_secrets(config: DictConfig) -> None:
    """Refuse a command with secrets: these launchers write it down for their jobs.

    Raises:
        UserError: CONFIG.
    """
    written: Any = OmegaConf.to_container(config.hydra.overrides)
    overrides = [override for group in written.values() for override in group]
    keys = [override.partition("=")[0] for override in overrides if redact(override, config) != override]
    keys += sorted(keys_with_secrets(config), key=lambda key: key.startswith("hydra."))  # the copies come last
    if keys:
        problem = f"{clipped(keys[0])}: holds a secret, and hydra/launcher={plugin_of(config)} writes the command down"
        raise UserError("CONFIG", problem, "leave it to the environment (HF_TOKEN, WANDB_API_KEY)")


def launcher_overrides(overrides: Sequence[Override]) -> list[str]:
    """The overrides of settings of the launcher."""
    return [each.input_line for each in overrides if each.input_line and each.key_or_group.startswith("hydra.launcher")]
