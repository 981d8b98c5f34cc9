"""Settings for tests, composed from config/ as the command line does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from engine.settings.reading import read_settings
from engine.settings.schema import Settings
from preference_datasets import DATASETS

CONFIG_DIR = Path(__file__).resolve().parent.parent / "config"


def composed(*overrides: str) -> DictConfig:
    """The config of `python train.py *overrides`."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose("config", overrides=list(overrides))


def make_settings(*overrides: str) -> Settings:
    """The settings of `python train.py *overrides`."""
    return read_settings(composed(*overrides), DATASETS)


def with_model(settings: Settings, **values: Any) -> Settings:
    """Settings with other values of model.*, unchecked."""
    return settings.model_copy(update={"model": settings.model.model_copy(update=values)})


def write_configs(texts: Mapping[str, str], directory: Path) -> Path:
    """Write configs of a user, by path; MADE in them is a path that must not appear. Returns their directory."""
    for name, text in texts.items():
        path = directory / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("MADE", str(directory / "made")))
    return directory / "configs"
