"""Compose the config of a command line outside Hydra's own main, for commands beside train.py."""

from collections.abc import Sequence

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.settings.hydra_guard import GuardedLoader, check_hydra, split_arguments
from engine.settings.presets import CONFIG_DIR
from utils import UserError, clipped, local_dir


def compose_overrides(arguments: Sequence[str]) -> DictConfig:
    """The config of train.py with these overrides; nothing that it names is run.

    Raises:
        UserError: CONFIG, for options of Hydra and for code to run.
        Exception: of Hydra; engine.settings.hydra_errors explains it.
    """
    options, overrides = split_arguments(arguments)
    if options:
        fix = "give overrides alone, such as loss=dpo; sweeps and options of Hydra are for train.py"
        raise UserError("CONFIG", f"{clipped(' '.join(options))}: no such option here", fix)
    # Paths of runs use these names.
    OmegaConf.register_new_resolver("local_dir", lambda dirs: str(local_dir(dirs)), replace=True)
    search_path = create_automatic_config_search_path(None, None, str(CONFIG_DIR))
    config = Hydra("inspect_data", GuardedLoader(search_path)).compose_config(
        "config", overrides, RunMode.RUN, validate_sweep_overrides=True
    )
    check_hydra(config)
    return config
