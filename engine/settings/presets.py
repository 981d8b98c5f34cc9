"""The YAML files under config/."""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"


def presets_with(group: str, key: str) -> list[str]:
    """Presets of a group with this key in their own file, as `loss=dpo`."""
    paths = sorted((CONFIG_DIR / group).glob("*.yaml"))
    return [f"{group}={path.stem}" for path in paths if key in list(_keys_of_group(path, group))]


def _keys_of_group(path: Path, group: str) -> Any:
    """The keys of a preset. A preset of `# @package _global_` has them under its group."""
    preset: Any = OmegaConf.load(path)
    return preset.get(group, preset)


@cache
def tiny_architecture() -> Any:
    """model.architecture of model=tiny."""
    return OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "model" / "tiny.yaml").architecture)
