"""What Hydra is not let do with a command line: run code that it or a file names, or write down what may be secret."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import (
    create_automatic_config_search_path,
    detect_calling_file_or_module_from_task_function,
    get_args_parser,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.validation import CONFIG_DIR
from utils import UserError, clipped

OWN_TARGETS = {
    "hydra.launcher._target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra.sweeper._target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
}
SWEEP_DIR = "${sweep_dir:}"  # as config.yaml has it


def check_command_line(arguments: Sequence[str], command: Callable[..., Any]) -> None:
    """Raise a UserError for what Hydra must not act on. It runs what it finds as soon as it has composed a config, so
    all that it will compose is composed here first, which runs nothing.

    Args:
        command: the function that Hydra is to call; relative paths of configs are told from it.
    """
    for argument in arguments:
        if "_target_" in argument or argument.startswith("--e"):  # --experimental-rerun, which may be shortened
            raise _would_run(clipped(argument))
    parser = get_args_parser()
    parser.exit_on_error = parser.allow_abbrev = False
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError("CONFIG", str(error), "python train.py --help lists every option") from error
    if unknown:
        problem = f"{clipped(' '.join(unknown))}: no option, or a key behind an option"
        raise UserError("CONFIG", problem, "options come first, whole: python train.py -m lr=1e-6,1e-5")
    if options.shell_completion:
        return

    where = detect_calling_file_or_module_from_task_function(command)
    search_path = create_automatic_config_search_path(*where, options.config_path or str(CONFIG_DIR))
    if options.config_dir:
        directory = f"file://{os.path.abspath(options.config_dir)}"
        search_path.prepend("command-line", directory, SearchPathQuery(provider="schema"))
    composer = Hydra("train", ConfigLoaderImpl(search_path))

    def checked(overrides: Sequence[str]) -> DictConfig:
        name = options.config_name or "config"
        config = composer.compose_config(name, [*overrides], RunMode.MULTIRUN, validate_sweep_overrides=False)
        check_hydra(config)
        return config

    config = checked(options.overrides)
    if options.multirun or config.hydra.mode == RunMode.MULTIRUN:  # a job may choose files that others do not
        given: Any = OmegaConf.to_container(config.hydra.overrides)
        params = [f"{key}={value}" for key, value in (OmegaConf.select(config, "hydra.sweeper.params") or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*params, *given["task"]])
        for job in BasicSweeper.split_arguments(overrides, None)[0]:
            checked([*given["hydra"], *job])


def check_hydra(config: DictConfig) -> None:
    """Raise a UserError for what Hydra must not act on in a composed config, wherever it was set."""
    written = OmegaConf.to_container(config)
    assert isinstance(written, dict)
    targets = dict(_targets(written))
    for group in ("launcher", "sweeper"):
        if isinstance(config.hydra[group], DictConfig):  # an interpolation may make a target of texts that are none
            targets |= dict(_targets(OmegaConf.to_container(config.hydra[group], resolve=True), f"hydra.{group}."))
    for key, value in targets.items():
        if OWN_TARGETS.get(key) != value:
            raise _would_run(f"{key}: {value}")
    if OmegaConf.select(config, "hydra.callbacks"):
        raise _would_run("hydra.callbacks")
    settings = written["hydra"]
    for group in ("job_logging", "hydra_logging"):
        if settings[group] not in (OmegaConf.to_container(OmegaConf.load(path)) for path in _presets(group)):
            raise _would_run(f"hydra.{group}, which is none of Hydra's own,")
    if settings["sweep"]["dir"] != SWEEP_DIR or settings["output_subdir"] is not None:
        key = "hydra.sweep.dir" if settings["sweep"]["dir"] != SWEEP_DIR else "hydra.output_subdir"
        problem = f"{key}: Hydra would write the command there as it was given, with any secret in it"
        raise UserError("CONFIG", problem, "leave it as config/config.yaml has it; runs are kept in local_dirs")


def _targets(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is named to be made by Hydra: dotted keys that end in _target_, and their values."""
    for name, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name == "_target_":
            yield f"{prefix}{name}", item
        yield from _targets(item, f"{prefix}{name}.")


def _presets(group: str) -> Iterable[Path]:
    return (Path(hydra.__file__).parent / "conf" / "hydra" / group).glob("*.yaml")


def _would_run(what: str) -> UserError:
    problem = f"{what} would run code that it names"
    return UserError("CONFIG", problem, "leave it out; trainers, optimizers and losses are chosen by their names")
