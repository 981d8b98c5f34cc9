"""Data sets of the Hugging Face hub, or of its local cache if the hub is unreachable."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.preferences import SplitName
from utils import UserError

if TYPE_CHECKING:
    import datasets

HUB_TIMEOUT = 10  # seconds


def load_from_hub(name: str, hub_id: str, split: SplitName, hub_dir: str | None = None) -> "datasets.Dataset":
    """Load a split of a data set.

    Args:
        name: name of the data set in DATASETS, for errors.
        hub_id: its name on the hub.
        split: the split to load.
        hub_dir: a folder of the hub's repository with this split alone.

    Raises:
        UserError: within seconds, if neither the hub nor its cache has the data.
    """
    import datasets
    from huggingface_hub import HfApi, snapshot_download

    fix = f"put its rows in DATA_DIR/{name}/train.jsonl and test.jsonl (or .jsonl.gz) and set data_dir=DATA_DIR"
    path = hub_id
    # Without a network load_dataset would retry for half a minute, so ask first. Any error may follow: no network,
    # HF_HUB_OFFLINE, 404.
    try:
        HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)
    except Exception as error:
        try:
            path = snapshot_download(hub_id, repo_type="dataset", local_files_only=True)
        except OSError:
            reason = str(error).split("\n")[0] or type(error).__name__
            problem = f"datasets: {name}: {hub_id} is not in the hub's local cache, and the hub fails: {reason}"
            raise UserError("DATA", problem, f"{fix}, or try again with a network") from error
    try:
        tables = datasets.load_dataset(path, data_dir=hub_dir)
        return tables[split if hub_dir is None else next(iter(tables))]  # a folder's only split may have any name
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError("DATA", f"datasets: {name}: {hub_id} {split} cannot be loaded: {reason}", fix) from error


def download_folder(name: str, suffixes: Sequence[str]) -> Path:
    """The folder of a data set's files, from the hub or its local cache.

    Args:
        name: OWNER/NAME, or OWNER/NAME/FOLDER for a part of the repository.
        suffixes: of the files to download.

    Raises:
        UserError: within seconds, if neither the hub nor its cache has it.
    """
    from huggingface_hub import HfApi, snapshot_download

    hub_id, folder = "/".join(name.split("/")[:2]), "".join(f"{part}/" for part in name.split("/")[2:])
    patterns = [f"{folder}*{suffix}" for suffix in suffixes]
    reason = ""
    try:
        HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)
    except Exception as error:  # no network, HF_HUB_OFFLINE, 404
        reason = str(error).split("\n")[0] or type(error).__name__
    is_cached = bool(reason)
    try:
        root = snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns, local_files_only=is_cached)
        found = Path(root, folder)
        if not found.is_dir():
            reason = reason or f"it has no folder {folder} with files {', '.join(suffixes)}"
            raise FileNotFoundError
    except Exception as error:
        reason = reason or str(error).split("\n")[0] or type(error).__name__
        problem = f"datasets: {name} is no path here and not in the hub's local cache, and the hub fails: {reason}"
        raise UserError("DATA", problem, "correct it, or try again with a network") from error
    if is_cached:
        print(
            f"warning: {name} is read from the hub's local cache, which may hold a part alone: the hub fails: {reason}"
        )
    return found
