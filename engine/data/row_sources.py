"""Where the rows of a named data set come from: data_dir, the hub, or the hub's local cache."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data.hub_datasets import load_from_hub
from engine.data.preferences import SplitName
from engine.data.read_sources import hub_hash, note_source
from engine.data.row_files import read_rows
from engine.data.rows import BadRow, Row, RowCounts
from utils import UserError, progress


@dataclass
class RowSource:
    """The rows of a named data set.

    Args:
        name: name of the data set, and of its folder in data_dir.
        data_dir: folder with files <name>/train.jsonl and <name>/test.jsonl, or .jsonl.gz; None for the hub.
        counts: rows read and dropped.
    """

    name: str
    data_dir: str | None = None
    counts: RowCounts = field(default_factory=RowCounts)

    def rows(
        self, hub_id: str, split: SplitName, *, hub_dir: str | None = None, test_fraction: float | None = None
    ) -> Iterator[Row]:
        """Read and count the rows of a split.

        Args:
            hub_id: name of the data set on the hub.
            split: the split to read.
            hub_dir: folder of the hub's repository with this split alone.
            test_fraction: for a data set without a test split: the fraction of its rows held out. These are the first
                rows of a shuffle with seed 42. A test file in data_dir is used instead.
        """
        is_held_out = test_fraction is not None and (self.data_dir is None or self._find_file("test") is None)
        stored: SplitName = "train" if is_held_out else split
        if self.data_dir is None:
            rows, num_rows = self._hub_rows(hub_id, stored, hub_dir)
        else:
            rows, num_rows = self._file_rows(stored, is_counted=is_held_out)
        if is_held_out and test_fraction is not None and num_rows is not None:
            in_split = _test_mask(num_rows, test_fraction) == (split == "test")
            rows = (row for row, is_kept in zip(rows, in_split, strict=True) if is_kept)
            num_rows = int(in_split.sum())
        for row in progress(rows, description=f"reading {self.name} {split}", total=num_rows, unit="rows"):
            self.counts.rows += 1
            yield row

    def drop(self, reason: str, place: str = "") -> None:
        """Count a useless row."""
        self.counts.drop(reason, place)

    def catch_bad_row(self) -> AbstractContextManager[None]:
        """A block for one row: a bad row ends the run, or is dropped."""
        return self.counts.catch_bad_row()

    def _hub_rows(self, hub_id: str, split: SplitName, hub_dir: str | None) -> tuple[Iterator[Row], int | None]:
        table = load_from_hub(self.name, hub_id, split, hub_dir)
        note_source(self.counts, "hub", self.name, hub_id, split, hub_dir, found=hub_hash(table))
        return (Row(values, f"{hub_id} {split} row {number}") for number, values in enumerate(table)), len(table)

    def _file_rows(self, split: SplitName, *, is_counted: bool) -> tuple[Iterator[Row], int | None]:
        path = self._find_file(split)
        if path is None:
            problem = f"data_dir: {self.data_dir}/{self.name} holds neither {split}.jsonl nor {split}.jsonl.gz"
            raise UserError("DATA", problem, "put the file there, or set data_dir=null to load from the hub")
        num_rows = None
        if is_counted:
            all_rows = read_rows(path, RowCounts(on_bad_row=self.counts.on_bad_row).reject)
            num_rows = sum(1 for _ in progress(all_rows, description=f"counting {self.name}", unit="rows"))
        return read_rows(path, self._reject), num_rows

    def _reject(self, error: BadRow) -> None:
        self.counts.reject(error)
        self.counts.rows += 1

    def _find_file(self, split: SplitName) -> Path | None:
        folder = Path(self.data_dir or "") / self.name
        paths = [folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"]
        found = next((path for path in paths if path.exists()), None)
        for path in paths if found is None else paths[: paths.index(found) + 1]:
            note_source(self.counts, "file", str(path))
        return found


def _test_mask(num_rows: int, test_fraction: float) -> np.ndarray:
    """bool [rows]: whether a row is in the test split."""
    is_test = np.zeros(num_rows, dtype=bool)
    is_test[np.random.default_rng(42).permutation(num_rows)[: int(num_rows * test_fraction)]] = True
    return is_test
