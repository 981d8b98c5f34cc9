"""What the rows of a split were read from, so that a later run knows whether to read them again.

A source is a list of texts:

- "file" and its path.
- "split", the path of a file or folder, and the split: which files it has.
- "hub", and the arguments of load_from_hub.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.hub_datasets import load_from_hub
from engine.data.preferences import SplitName
from engine.data.rows import RowCounts
from engine.data.split_files import find_split
from utils import UserError

if TYPE_CHECKING:
    import datasets

MISSING = "missing"
UNKNOWN = "unknown"  # a source, of rows that were read without noting it


def note_source(counts: RowCounts, *source: str | None, found: str | None = None) -> None:
    """Note a source before it is read: a change while it is read makes what was stored stale.

    Args:
        found: its hash, if it is known.
    """
    counts.sources[json.dumps(source)] = found or hash_source(*source)


def are_unchanged(sources: Mapping[str, str]) -> bool:
    """Whether noted sources hold what they held."""
    return all(hash_source(*json.loads(source)) == found for source, found in sources.items())


def hash_source(kind: str | None, *names: str | None) -> str:
    """A hash of what a source holds now."""
    split: SplitName = "test" if "test" in names[1:3] else "train"
    if kind == "hub":
        name, hub_id, _, hub_dir = names
        return hub_hash(load_from_hub(str(name), str(hub_id), split, hub_dir))
    path = Path(names[0] or "")
    try:
        if kind == "split":
            files, has_test_file = find_split(path, split)
            return json.dumps([[*map(str, files)], has_test_file])
        status = path.stat()
        return _hash_file(path, status.st_size, status.st_mtime_ns, status.st_ino) if path.is_file() else MISSING
    except (OSError, UserError):  # reading it says what is wrong
        return MISSING


def hub_hash(table: "datasets.Dataset") -> str:
    """The fingerprint of a data set of the hub: of its files and what was done to them."""
    return str(table._fingerprint)


@lru_cache(256)
def _hash_file(path: Path, *status: int) -> str:
    """A hash of a file's content. Both splits of a run often have the same file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
