"""Go offline where the Hugging Face hub cannot be reached."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.request import getproxies

from engine.models.archives import with_base_models
from engine.settings.schema import Settings
from utils import is_reachable


def settle_network(names: Iterable[str | None]) -> None:
    """Go offline if models need the hub and it cannot be reached.

    Otherwise libraries would try for a minute. They read the setting when imported, so call this before.

    Args:
        names: of models; those of adapters stand for their base models too.
    """
    are_local = all(Path(name).expanduser().exists() for name in with_base_models(names))
    if not are_local and _is_unreachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("the Hugging Face hub cannot be reached: models come from its local cache", file=sys.stderr)


def prepare_hub(settings: Settings) -> None:
    """settle_network() for the tokenizer and the model of a run."""
    model = settings.model
    names = [model.tokenizer_name_or_path or model.name_or_path]
    if model.architecture is None:
        names.append(model.name_or_path)
    if model.archive is not None:
        names += [*with_base_models([model.archive])][1:]  # of adapters
    are_local = all(name == "films" or Path(name).exists() for name in names)
    if not are_local and _is_unreachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("the Hugging Face hub cannot be reached: models and data come from its local cache")


def _is_unreachable() -> bool:
    """Whether the hub takes no connection. False if the environment decides: offline mode, or a proxy."""
    if os.environ.get("HF_HUB_OFFLINE") or getproxies().get("https"):
        return False
    return not is_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
