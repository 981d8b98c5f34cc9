"""The documents of text data: folders and files of plain text, JSON lines, Parquet and other rows."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.hub_datasets import download_folder
from engine.data.preferences import SplitName
from engine.data.row_files import SUFFIXES, read_rows
from engine.data.rows import RowCounts
from engine.data.special_tokens import MARK
from engine.data.split_files import find_split
from utils import UserError, content_hash

TEXT_SUFFIXES = (".txt", ".md", ".rst")
PART_BYTES = 16 * 2**20  # larger text files are several documents, so that memory does not grow
ABOUT_DATA = ("README.md", "dataset_infos.json", "dataset_info.json")  # in repositories of the hub
SPLIT_NAME = re.compile(r"(train|test|validation|eval)([.-].*)?")


ReadNamed = Callable[[str, SplitName], list[str] | None]


class Document(NamedTuple):
    """A document and its split."""

    text: str
    split: SplitName


class TextData:
    """The documents of a data set.

    Args:
        name: a path, a name, or a folder on the hub.
        read_named: a name and a split -> its texts; None for a path.

    Attributes:
        state: all that the documents follow from, as JSON: paths, sizes and times of files, or a hash of texts.
    """

    def __init__(self, name: str, read_named: ReadNamed):
        train, test = read_named(name, "train"), read_named(name, "test")
        self._texts: dict[SplitName, list[str]] = {"train": train or [], "test": test or []}
        self._files = find_files(name) if train is None else None
        self.state: Any = [content_hash(texts) for texts in self._texts.values()]
        if self._files is not None:
            self.state = file_states(self._files)

    def documents(self, text_field: str, test_fraction: float, counts: RowCounts) -> Iterator[Document]:
        """The documents in order. Empty ones are dropped, and counted.

        Raises:
            UserError: DATA for an unreadable file or row.
        """
        if self._files is not None:
            yield from documents(self._files, text_field, test_fraction, counts)
        for split, texts in self._texts.items():
            counts.rows += len(texts)
            yield from (Document(text, split) for text in texts)


def find_files(name: str) -> dict[SplitName, list[Path]]:
    """The files of a path, or of a folder on the hub, by split.

    Raises:
        UserError: DATA, if there are none.
    """
    if Path(name).exists():
        return text_files(Path(name))
    files = text_files(download_folder(name, (*TEXT_SUFFIXES, *SUFFIXES)))
    return {split: [file for file in of_split if file.name not in ABOUT_DATA] for split, of_split in files.items()}


def text_files(path: Path) -> dict[SplitName, list[Path]]:
    """The files of a data set by split, in order. Without a test split, all are in train.

    A folder of save_to_disk has the files of its splits. Another folder has all text and row files in it, at any depth.
    If some at its top or in `data` are named train.* or train-*, those are the training split, and test.*,
    validation.* or eval.* the test split.

    Raises:
        UserError: DATA for a folder without such files.
    """
    if not path.is_dir():
        return {"train": [path]}
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        train, (test, has_test) = find_split(path, "train")[0], find_split(path, "test")
        return {"train": train, "test": test} if has_test else {"train": train}
    files = [each for each in sorted(path.rglob("*")) if each.name.endswith((*TEXT_SUFFIXES, *SUFFIXES))]
    files = [each for each in files if each.is_file() and not _is_hidden(each.relative_to(path))]
    if not files:
        kinds = ", ".join((*TEXT_SUFFIXES, *SUFFIXES))
        raise UserError("DATA", f"datasets: {path} holds no file of text or rows", f"add files: {kinds}")
    named: dict[str, list[Path]] = {}
    for file in files:
        match = SPLIT_NAME.fullmatch(file.name)
        if match and file.parent in (path, path / "data"):
            named.setdefault(match[1], []).append(file)
    if "train" not in named:
        return {"train": files}
    test_name = next((name for name in ("test", "validation", "eval") if name in named), None)
    if test_name is None:
        return {"train": named["train"]}
    return {"train": named["train"], "test": named[test_name]}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_states(files: dict[SplitName, list[Path]]) -> dict[str, list[list[Any]]]:
    """What changes when a file does, as JSON: its path, size and time."""
    states: dict[str, list[list[Any]]] = {}
    for split, of_split in files.items():
        statuses = [(str(file.resolve()), file.stat()) for file in of_split]
        states[split] = [[path, status.st_size, status.st_mtime_ns] for path, status in statuses]
    return states


def documents(
    files: dict[SplitName, list[Path]], text_field: str, test_fraction: float, counts: RowCounts
) -> Iterator[Document]:
    """The documents of a data set. Empty ones are dropped, and counted.

    Without test files, test_fraction is held out: of rows, by a hash of the text; of text files, by a hash of their
    names. Of text files too few for that, the end of each is held out.

    Raises:
        UserError: DATA for an unreadable file or row.
    """
    fraction = 0.0 if "test" in files else test_fraction
    held_out_files, of_end = _held_out_files(files["train"], fraction)
    for split, of_split in files.items():
        for file in of_split:
            is_text = file.name.endswith(TEXT_SUFFIXES)
            of_file = 1.0 if file in held_out_files else of_end
            found = _of_text_file(file, of_file) if is_text else _of_rows(file, text_field, fraction, counts)
            for text, held_out in found:
                counts.rows += 1
                if text.strip():
                    yield Document(text, "test" if held_out else split)
                else:
                    counts.drop("empty text", str(file))


def _held_out_files(files: list[Path], fraction: float) -> tuple[set[Path], float]:
    """The text files to hold out, or else the fraction of the end of each."""
    texts = [file for file in files if file.name.endswith(TEXT_SUFFIXES)]
    num_held_out = int(len(texts) * fraction)
    by_hash = sorted(enumerate(texts), key=lambda item: content_hash([item[1].name, item[0]]))
    return {file for _, file in by_hash[:num_held_out]}, 0.0 if num_held_out else fraction


def _of_rows(path: Path, text_field: str, fraction: float, counts: RowCounts) -> Iterator[tuple[str, bool]]:
    for row in read_rows(path, counts.reject):
        with counts.catch_bad_row():
            text = row.text(text_field)
            yield text, fraction > 0 and int(content_hash([text])[:8], 16) < fraction * 2**32


def _of_text_file(path: Path, fraction: float) -> Iterator[tuple[str, bool]]:
    """The texts of a file, cut at ends of lines, and whether each is held out.

    Args:
        fraction: of the bytes, held out at the end.
    """
    try:
        size = path.stat().st_size
        first_test = size - int(size * fraction)  # a byte
        with open(path, "rb") as file:
            while part := file.read(PART_BYTES):
                part += file.readline()
                start = file.tell() - len(part)
                cut = first_test - start
                if 0 < cut < len(part):
                    cut = _end_of_line(part, cut)
                    first_test = start + cut
                cut = min(max(cut, 0), len(part))
                for piece, held_out in ((part[:cut], False), (part[cut:], True)):
                    if piece:
                        yield _decode(piece, path), held_out
    except OSError as error:
        raise UserError("DATA", f"datasets: {path} cannot be read ({error})", "correct the path") from error


def _end_of_line(part: bytes, place: int) -> int:
    """The end of a line before a place; of the line there, if it began so early that too much would be held out."""
    before = part.rfind(b"\n", 0, place) + 1
    if before and place - before <= len(part) - place:
        return before
    return part.find(b"\n", place) + 1 or len(part)  # a text of one line stays whole


def _decode(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            "DATA", f"datasets: {path} is not UTF-8 ({error.reason})", "convert it, or leave it out"
        ) from error
    if MARK in text:
        raise UserError("DATA", f"datasets: {path} contains a NUL byte", "give text, and leave other files out")
    return text
