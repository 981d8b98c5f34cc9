"""Token stores: the token ids of many texts in a directory of memory-mapped Arrow files.

    with TokenStoreWriter(path, vocabulary_size, inputs) as writer:
        for batch in batches:
            writer.add(batch)  # the ids of each text: lists or arrays
        writer.columns["weight"] = weights  # optional, one value a text
    store = open_store(path, inputs)  # None if missing, stale or damaged: write it again

- `inputs` is any JSON value: all that the tokens follow from. A store with other inputs is stale.
- `store.tokens` is the stream of all tokens, uint16 or uint32. Pretraining cuts it into windows.
- `store.offsets` are the places of the texts in the stream, int64 [texts + 1]. `store[3]` is the fourth text.
- `store.columns` are arrays with one value a text, `store.meta` holds what the writer put into `writer.meta`.

All arrays are views of the files. The operating system loads the parts in use, and processes share them.

On disk: `texts.arrow`, one record batch with the column `tokens` (large lists) and the others, and `meta.json` with the
version, the inputs, the numbers of texts and tokens, the checksum of each file, and its own.
"""

import json
import mmap
import secrets
import shutil
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import Progress, UserError, install_directory

if TYPE_CHECKING:
    import pyarrow

STORE_VERSION = 2  # raise it when the files change their form
NUM_UINT16 = 1 << 16  # tokens that uint16 can tell apart
TEXTS, META = "texts.arrow", "meta.json"
STALE_SECONDS = 86_400  # age of what an ended writer left
CHUNK_BYTES = 1 << 22
Column = np.ndarray | Sequence[str]


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The texts of a store, and tables beside them.

    Args:
        path: of its directory.
        tokens: uint16 or uint32 [all tokens], read-only.
        offsets: int64 [texts + 1], of each text in tokens, and the end.
        columns: values of the texts, by name.
        meta: what the writer noted.
    """

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    columns: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """The token ids of a text, a view."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))


class TokenStoreWriter:
    """Writes a store: complete at the end of the with block, or not at all.

    Args:
        path: of the directory; an older store there is replaced.
        vocabulary_size: one more than the largest token id.
        inputs: all that the tokens follow from, as JSON.
        description, total: for the progress shown; None for no total.
        show_progress: false shows none.

    Attributes:
        columns: values of the texts by name, numpy arrays or lists of texts.
        meta: anything else to note, as JSON.

    Raises:
        UserError: if the store cannot be written.
    """

    def __init__(
        self,
        path: Path,
        vocabulary_size: int,
        inputs: Any,
        *,
        description: str = "tokenizing",
        total: int | None = None,
        show_progress: bool = True,
    ):
        self.path, self.inputs, self._vocabulary_size = path, inputs, vocabulary_size
        self.dtype = np.dtype(np.uint16 if vocabulary_size <= NUM_UINT16 else np.uint32)
        self.columns: dict[str, Column] = {}
        self.meta: dict[str, Any] = {}
        self._ends = array("q", [0])
        self._progress = Progress(description, total=total, unit="texts", is_shown=None if show_progress else False)

    def __enter__(self) -> "TokenStoreWriter":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            self._temporary = self.path.with_name(f".{self.path.name}.{secrets.randbelow(10**15)}.tmp")
            self._temporary.mkdir()
            self._stream = open(self._temporary / "stream", "wb")
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self

    def add(self, texts: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Append the token ids of texts."""
        parts = [np.asarray(text, np.int64) for text in texts]
        self.add_stream(np.concatenate([np.empty(0, np.int64), *parts]), np.array(list(map(len, texts)), np.int64))

    def add_stream(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append texts that lie one after another.

        Args:
            tokens: [all tokens of the texts].
            lengths: int64 [texts].
        """
        assert lengths.sum() == len(tokens)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocabulary_size:
            raise ValueError(f"a token id is not below {self._vocabulary_size:,}, the size of the vocabulary")
        try:
            self._stream.write(np.ascontiguousarray(tokens, self.dtype).data)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._ends.frombytes((np.cumsum(lengths, dtype=np.int64) + self._ends[-1]).tobytes())
        self._progress.update(len(lengths))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._progress.__exit__()
        try:
            self._stream.close()
            if kind is None:
                self._finish()
        except OSError as failure:
            raise unwritable(self.path, failure) from failure
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _finish(self) -> None:
        import pyarrow

        stream = self._temporary / "stream"
        tokens = _map_bytes(stream, self.dtype)
        lists = pyarrow.LargeListArray.from_arrays(to_arrow(np.frombuffer(self._ends, np.int64)), to_arrow(tokens))
        write_arrow(self._temporary / TEXTS, {"tokens": lists, **self.columns})
        del lists, tokens
        stream.unlink()
        counts = {"texts": len(self._ends) - 1, "tokens": self._ends[-1]}
        write_meta(self._temporary, {"inputs": self.inputs, "counts": counts, "meta": self.meta})
        install_store(self._temporary, self.path, self.inputs)


def open_store(path: Path, inputs: Any) -> TokenStore | None:
    """The store of a directory; None if it is missing, stale or damaged.

    Every byte is checked, without holding the files in memory.
    """
    found = read_arrow(path, inputs, TEXTS)
    if found is None:
        return None
    meta, table = found
    lists = table.pop("tokens")
    tokens, offsets = to_numpy(lists.values), to_numpy(lists.offsets)
    columns = {name: to_numpy(values) for name, values in table.items()}
    return TokenStore(path, tokens, offsets, columns, meta["meta"])


# ---- Directories of Arrow files ----


def write_arrow(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length as one record batch.

    Args:
        columns: numpy or Arrow arrays, or lists, by name.
    """
    import pyarrow
    import pyarrow.ipc

    arrays = {name: each if isinstance(each, pyarrow.Array) else to_arrow(each) for name, each in columns.items()}
    batch = pyarrow.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_arrow(directory: Path, inputs: Any, name: str) -> tuple[dict[str, Any], dict[str, "pyarrow.Array"]] | None:
    """What meta.json says, and the columns of a file beside it; None if they are missing, stale or damaged.

    Another process may replace the directory at any time, so both are of one directory only if meta.json has stayed.
    """
    try:
        meta = read_meta(directory, inputs)
        columns = {} if meta is None else map_arrow(directory / name)
        return (meta, columns) if meta is not None and _load_meta(directory) == meta else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def map_arrow(path: Path) -> dict[str, "pyarrow.Array"]:
    """The columns of a file of write_arrow, memory-mapped."""
    import pyarrow
    import pyarrow.ipc

    batch = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).get_batch(0)
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def to_arrow(values: Column) -> "pyarrow.Array":
    """A column of numbers or texts as an Arrow array. Numbers are a view."""
    import pyarrow

    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":  # pyarrow.array() would import pandas
        buffers = [None, pyarrow.py_buffer(np.ascontiguousarray(values))]
        return pyarrow.Array.from_buffers(pyarrow.from_numpy_dtype(values.dtype), len(values), buffers)
    return pyarrow.array(values)


def to_numpy(values: "pyarrow.Array") -> np.ndarray:
    """A column as a numpy array: numbers are a view, other values copies."""
    import pyarrow

    is_number = pyarrow.types.is_integer(values.type) or pyarrow.types.is_floating(values.type)
    if is_number:
        return np.from_dlpack(values)  # values.to_numpy() would import pandas
    return values.to_numpy(zero_copy_only=False)


def write_meta(directory: Path, meta: Mapping[str, Any]) -> None:
    """Write meta.json: what is given, the version, and a checksum of each file beside it."""
    checksums = {path.name: checksum(path) for path in sorted(directory.iterdir())}
    values = json.loads(json.dumps({"version": STORE_VERSION, "checksums": checksums, **meta}))
    (directory / META).write_text(json.dumps({**values, "checksum": _checksum_of(values)}, indent=1), "utf-8")


def read_meta(directory: Path, inputs: Any) -> dict[str, Any] | None:
    """What meta.json says; None unless the inputs and all checksums are as it says."""
    try:
        meta = _load_meta(directory)
        if (meta["version"], meta["inputs"]) != (STORE_VERSION, json.loads(json.dumps(inputs))):
            return None
        if not all(checksum(directory / name) == expected for name, expected in meta["checksums"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta


def _load_meta(directory: Path) -> dict[str, Any]:
    """meta.json without its own checksum.

    Raises:
        OSError, ValueError, KeyError, AttributeError: if it is missing or damaged.
    """
    meta: dict[str, Any] = json.loads((directory / META).read_text("utf-8"))
    if meta.pop("checksum") != _checksum_of(meta):
        raise ValueError("meta.json is damaged")
    return meta


def _checksum_of(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values).encode()):08x}"


def install_store(temporary: Path, path: Path, inputs: Any, *, may_stay: bool = True) -> None:
    """Put a written directory in its place.

    Args:
        may_stay: one with the same inputs, from another process, is as good.
    """
    replaced = temporary.with_name(temporary.name.replace(".tmp", ".old.tmp"))
    if path.exists() and not (may_stay and read_meta(path, inputs)):
        with suppress(FileNotFoundError):  # another process is doing the same
            path.rename(replaced)
    try:
        install_directory(temporary, path)
    except OSError:
        if not (path / META).exists():
            raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def checksum(path: Path) -> str:
    """The CRC-32 of a file, read in pieces: it finds damage, at the speed of a disk."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _map_bytes(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as an array, memory-mapped; it may be empty."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def remove_leftovers(path: Path) -> None:
    """Remove what writers of this store left when they were killed."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            last_write = max(each.stat().st_mtime for each in (leftover, *leftover.iterdir()))
            if time.time() - last_write > STALE_SECONDS:
                shutil.rmtree(leftover)


def unwritable(path: Path, error: OSError) -> UserError:
    problem = f"cache_dir: {path} cannot be written ({error})"
    return UserError("STORAGE", problem, "make room or set cache_dir elsewhere")
