"""The files of a split: one file, a folder of files, the layout of the hub, or a folder of save_to_disk."""

import re
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from engine.data.preferences import SplitName
from engine.data.row_files import SUFFIXES
from utils import UserError

# Names of files without suffix, or of folders; the first existing one counts.
SPLIT_FILES = {"train": ("train",), "test": ("test", "validation", "eval")}


def find_split(path: Path, split: SplitName) -> tuple[list[Path], bool]:
    """Find the files of a split.

    Returns:
        The files in order, and whether there is a test split. Without one, both splits are parts of the files returned.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError("DATA", f"datasets: there is no file {path}", "correct the path")
        return [path], False
    if (path / "state.json").exists():
        return _saved_files(path), False
    is_saved = (path / "dataset_dict.json").exists()  # a folder for each split
    files = _by_split(path, is_saved) or _by_split(path / "data", is_saved)
    if "train" not in files:
        fix = f"name it train + {', '.join(SUFFIXES)}, or give the path of a file"
        raise UserError("DATA", f"datasets: {path} holds no file train.*", fix)
    return (files[split], True) if "test" in files else (files["train"], False)


def _by_split(folder: Path, is_saved: bool) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    if not folder.is_dir():
        return files
    for name, stems in SPLIT_FILES.items():
        for stem in stems:
            if is_saved:
                found = _saved_files(folder / stem) if (folder / stem).is_dir() else []
            else:
                found = _files_named(folder, stem)
            if found:
                files.setdefault(name, found)
    return files


def _files_named(folder: Path, stem: str) -> list[Path]:
    """The file of this name, or its shards: train-00000-of-00002.parquet."""
    suffixes = "|".join(map(re.escape, SUFFIXES))
    pattern = re.compile(rf"{stem}(?:-\d+-of-(\d+))?({suffixes})")
    found = [(file, match) for file in sorted(folder.iterdir()) if (match := pattern.fullmatch(file.name))]
    files = [file for file, _ in found]
    if not found:
        return []
    kinds = {match.groups(): file.name for file, match in found}
    if len(kinds) > 1:
        raise UserError(
            "DATA", f"datasets: {folder} holds both {' and '.join(kinds.values())}", "leave one of them there"
        )
    num_shards = found[0][1][1]
    if num_shards and len(files) != int(num_shards):
        problem = f"datasets: {folder} holds {len(files)} of {int(num_shards)} files {stem}-*"
        raise UserError("DATA", problem, "add the others")
    return files


class _DataFile(BaseModel):
    filename: str


class _SavedState(BaseModel):
    """What is read of the state.json of a folder of save_to_disk."""

    data_files: list[_DataFile] = Field(alias="_data_files")


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set written by save_to_disk."""
    state = folder / "state.json"
    try:
        names = [file.filename for file in _SavedState.model_validate_json(state.read_bytes()).data_files]
    except (OSError, ValidationError) as error:
        raise UserError("DATA", f"datasets: {state} does not list the files of a data set", "save it again") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".arrow"):
            raise UserError("DATA", f"datasets: {state} names {name}, not an .arrow file beside it", "save it again")
        if not (folder / name).is_file():
            raise UserError("DATA", f"datasets: {folder} lacks its file {name}", "copy the folder again")
    return [folder / name for name in names]
