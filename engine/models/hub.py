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
    if os.environ.get("HF_HUB_OFFLINE") or getproxies().get("https"):
        return
    if all(Path(name).expanduser().exists() for name in with_base_models(names)):
        return
    if not is_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("the Hugging Face hub cannot be reached: models come from its local cache", file=sys.stderr)


def prepare_hub(settings: Settings) -> None:
    """Go offline if a run needs the hub and it cannot be reached.

    Call this before libraries are imported.
    """
    if not reaches_hub(settings):
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("the Hugging Face hub cannot be reached: models and data come from its local cache")


def reaches_hub(settings: Settings) -> bool:
    """Whether the hub can be reached.

    True as well if the run does not need it, or the environment sets its use.
    """
    model = settings.model
    names = [model.tokenizer_name_or_path or model.name_or_path]
    if model.architecture is None:
        names.append(model.name_or_path)
    if model.archive is not None:
        names += [*with_base_models([model.archive])][1:]  # of adapters
    is_local = all(name == "films" or Path(name).exists() for name in names)
    if is_local or os.environ.get("HF_HUB_OFFLINE") or getproxies().get("https"):
        return True
    return is_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
