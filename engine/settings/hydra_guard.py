"""Check the command line before Hydra runs it."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import (
    create_automatic_config_search_path,
    detect_calling_file_or_module_from_task_function,
    get_args_parser,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.settings.hydra_launchers import (
    BASIC,
    PLUGINS,
    TARGET,
    check_launcher,
    check_secrets,
    launcher_overrides,
    plugin_of,
)
from engine.settings.presets import CONFIG_DIR
from engine.settings.secrets import redact
from engine.settings.sweeps import check_run_dirs
from utils import UserError, clipped

HYDRA_TARGETS = {
    TARGET: {BASIC, *PLUGINS},
    "hydra.sweeper._target_": {"hydra._internal.core_plugins.basic_sweeper.BasicSweeper"},
}
OPEN = ("reward_options.", "win_rate.endpoint.")
SWEEP_DIR = "${sweep_dir:}"  # as in config.yaml


class GuardedLoader(ConfigLoaderImpl):
    """A loader of configs from files alone. Hydra would import the package of a search path pkg://NAME."""

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: list[Override], repo: CachingConfigRepository
    ) -> None:
        loaded = repo.load_config(config_name) if config_name else None
        paths = [OmegaConf.select(loaded.config, "hydra.searchpath") if loaded else None]
        paths += [each.value() for each in parsed_overrides if each.get_key_element() == "hydra.searchpath"]
        for path in (str(path) for each in paths if isinstance(each, Sequence) for path in each):
            check_search_path(path)
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


def check_search_path(path: str) -> None:
    """Refuse a package as a place of configs.

    Raises:
        UserError: CONFIG.
    """
    if path.strip().startswith("pkg:"):
        raise _would_run(f"hydra.searchpath: {clipped(path)}")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options with their values, and the overrides. Hydra reads them in this order only.

    Overrides of OPEN keys get the prefix ++, as the config does not list what may be set below them.
    """
    known = {text: action for action in get_args_parser()._actions for text in action.option_strings}
    options: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        prefix = "++" if argument.startswith(OPEN) else ""
        (options if argument.startswith("-") else overrides).append(prefix + argument)
        action = known.get(argument)
        is_optional = action is not None and action.nargs == "?"
        if (
            action is not None
            and rest
            and (action.nargs is None or (is_optional and rest[0] in (action.choices or ())))
        ):
            options.append(rest.pop(0))
    return options, overrides


@dataclass(frozen=True)
class Sweep:
    """What the command line of a sweep asks for.

    Args:
        varied: keys that differ between its jobs.
        jobs: the overrides of each.
        configs: composed, of each.
        plugin: launches the jobs; None for Hydra's basic launcher.
    """

    varied: list[str]
    jobs: list[list[str]]
    configs: list[DictConfig]
    plugin: str | None


def check_command_line(arguments: Sequence[str], command: Callable[..., Any]) -> Sweep | None:
    """Refuse a command line with code for Hydra to run, or a sweep with one directory for two jobs.

    Hydra instantiates classes named in a config right after composing it. Composing alone runs nothing. So every config
    of the command is composed and checked here first.

    Args:
        command: the function for Hydra to call. Relative config paths start from its file.

    Returns:
        the sweep; None for a single run.

    Raises:
        UserError: CONFIG.
    """
    options = parsed_options(arguments)
    if options.shell_completion:
        return None
    for path in (options.config_path, options.config_dir):
        check_search_path(path or "")

    where = detect_calling_file_or_module_from_task_function(command)
    defaults = Hydra("train", GuardedLoader(create_automatic_config_search_path(*where, str(CONFIG_DIR))))
    search_path = create_automatic_config_search_path(*where, options.config_path or str(CONFIG_DIR))
    if options.config_dir:
        directory = f"file://{os.path.abspath(options.config_dir)}"
        search_path.prepend("command-line", directory, SearchPathQuery(provider="schema"))
    composer = Hydra("train", GuardedLoader(search_path))

    def compose(overrides: Sequence[str]) -> DictConfig:
        name = options.config_name or "config"
        config = composer.compose_config(name, [*overrides], RunMode.MULTIRUN, validate_sweep_overrides=False)
        check_hydra(config)
        if plugin := plugin_of(config):
            typed = launcher_overrides(OverridesParser.create().parse_overrides(options.overrides))
            typed_alone = [f"hydra/launcher={plugin}", *typed]
            check_launcher(config, defaults.compose_config("config", typed_alone, RunMode.MULTIRUN))
            check_secrets(config)
        return config

    config = compose(options.overrides)
    if not options.multirun and config.hydra.mode != RunMode.MULTIRUN:
        return None
    written: Any = OmegaConf.to_container(config.hydra.overrides)
    params = [f"{key}={value}" for key, value in (OmegaConf.select(config, "hydra.sweeper.params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *written["task"]])
    jobs = BasicSweeper.split_arguments(overrides, None)[0]
    configs = [compose([*written["hydra"], *job]) for job in jobs]  # each job may choose other files
    check_run_dirs(configs)
    varied = [override.key_or_group for override in overrides if override.is_sweep_override()]
    if shared := next((key for key in varied if key.split(".")[0] == "sweep"), None):
        raise UserError("CONFIG", f"{shared}: is the same for all jobs of a sweep", "give one value")
    return Sweep(varied, jobs, configs, plugin_of(config))


def parsed_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's options of a command line.

    Raises:
        UserError: CONFIG.
    """
    for argument in arguments:
        if "_target_" in argument or argument.startswith("--e"):  # --experimental-rerun, or a short form of it
            raise _would_run(clipped(argument))
    parser = get_args_parser()
    parser.exit_on_error = parser.allow_abbrev = False
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError("CONFIG", str(error), "python train.py --help lists every option") from error
    if unknown:
        fix = "write options unabbreviated: python train.py -m lr=1e-6,1e-5; --help lists them"
        raise UserError("CONFIG", f"{clipped(' '.join(unknown))}: no such option", fix)
    return options


def check_hydra(config: DictConfig) -> None:
    """Refuse a composed config with code for Hydra to run.

    Raises:
        UserError: CONFIG.
    """
    written = OmegaConf.to_container(config)
    assert isinstance(written, dict)
    targets = dict(_targets(written))
    for group in ("launcher", "sweeper"):
        if isinstance(config.hydra[group], DictConfig):  # interpolations may add targets
            targets |= dict(_targets(OmegaConf.to_container(config.hydra[group], resolve=True), f"hydra.{group}."))
    for key, value in targets.items():
        if not isinstance(value, str) or value not in HYDRA_TARGETS.get(key, ()):
            raise _would_run(f"{key}: {redact(str(value), config)}")
    if OmegaConf.select(config, "hydra.callbacks"):
        raise _would_run("hydra.callbacks")
    if OmegaConf.select(config, "hydra.job.env_set"):
        problem = "hydra.job.env_set would change the environment, and with it the code that a run starts"
        raise UserError("CONFIG", problem, "leave it out; set variables before the command: NAME=value python train.py")
    settings = written["hydra"]
    for group in ("job_logging", "hydra_logging"):
        if settings[group] not in (OmegaConf.to_container(OmegaConf.load(path)) for path in _presets(group)):
            raise _would_run(f"hydra.{group}: a setting outside Hydra's presets")
    if settings["sweep"]["dir"] != SWEEP_DIR or settings["output_subdir"] is not None:
        key = "hydra.sweep.dir" if settings["sweep"]["dir"] != SWEEP_DIR else "hydra.output_subdir"
        problem = f"{key}: Hydra would write the command there as typed, with any secrets in it"
        raise UserError("CONFIG", problem, "keep the value of config/config.yaml; runs are kept in local_dirs")


def _targets(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The classes for Hydra to instantiate: dotted keys ending in _target_, and their values."""
    for name, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name == "_target_":
            yield f"{prefix}{name}", item
        yield from _targets(item, f"{prefix}{name}.")


def _presets(group: str) -> Iterable[Path]:
    return (Path(hydra.__file__).parent / "conf" / "hydra" / group).glob("*.yaml")


def _would_run(setting: str) -> UserError:
    problem = f"{setting} would run code that it names"
    return UserError("CONFIG", problem, "leave it out; trainers, optimizers and losses are chosen by their names")
