"""Text data as windows of tokens: tokenize each data set once, into token stores of its splits."""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.encoding import encode_pieces, eos_token_id, with_ends
from engine.data.examples import Split
from engine.data.preferences import SplitName
from engine.data.rows import RowCounts
from engine.data.text_files import Document, ReadNamed, TextData
from engine.data.token_cache import num_ids, tokenizer_state
from engine.data.token_store import TokenStore, TokenStoreWriter, open_store
from engine.data.tokenizer_processes import Request
from engine.data.windows import TokenStream, Windows
from utils import Progress, UserError, content_hash, one_at_a_time

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.settings.schema import Settings

CORPUS_VERSION = 1  # raise it when documents are read or encoded differently
SPLITS: tuple[SplitName, ...] = ("train", "test")
PIECE_CHARACTERS = 2**18  # longer documents are encoded in pieces, cut at ends of lines
BATCH_CHARACTERS = 2**20  # encoded together
MIN_PROCESS_BATCHES = 4  # fewer are encoded before other processes have started


class TextWindows(Split):
    """A split of text data.

    Args:
        content: a hash of its tokens.
    """

    def __init__(self, windows: Windows, counts: dict[str, Any], content: str):
        super().__init__(windows, counts, windows.sizes)
        self.windows, self.content = windows, content


def load_windows(
    settings: "Settings", tokenizer: "PreTrainedTokenizerBase", read_named: ReadNamed
) -> list[TextWindows]:
    """The windows of the training and the test split, from all of settings.datasets in order.

    Args:
        read_named: see TextData.

    Raises:
        UserError: DATA for unreadable data, or a split without text; STORAGE if the tokens cannot be stored.
    """
    stores = [_stores_of(name, settings, tokenizer, read_named) for name in settings.datasets]
    names = stream_names(settings.datasets)
    splits = []
    for split in SPLITS:
        of_split = [each[split] for each in stores]
        for dataset, store in zip(settings.datasets, of_split, strict=True):
            if not len(store) and (split == "train" or settings.test_fraction > 0):
                fix = "add documents" + (", or set test_fraction=0 for no evaluation" if split == "test" else "")
                raise UserError("DATA", f"datasets: {dataset} has no {split} documents{_dropped(store)}", fix)
        streams = [TokenStream(*each) for each in zip(names, *_columns(of_split), strict=True)]
        windows = Windows(streams, settings.max_length, document_mask=settings.document_mask)
        content = content_hash([CORPUS_VERSION, *(store.meta["content"] for store in of_split)])
        splits.append(TextWindows(windows, _counts(windows, of_split), content))
    return splits


def stream_names(datasets: Sequence[str]) -> list[str]:
    """Short names of data sets, for metrics: the last part of a path, or the whole path where it is not unique."""
    last = [Path(name).name or name for name in datasets]
    return [short if last.count(short) == 1 else name for short, name in zip(last, datasets, strict=True)]


def format_text_counts(counts: Mapping[str, Any]) -> str:
    """Describe the counts of a split of text."""
    line = f"{counts['documents']:,} documents, {counts['bytes'] / 1e6:,.1f} MB, {counts['tokens']:,} tokens"
    line += f", {counts['windows']:,} windows"
    if counts["dropped"]:
        line += "\n  dropped: " + ", ".join(f"{number:,} {reason}" for reason, number in counts["dropped"].items())
    return line


def _columns(stores: Sequence[TokenStore]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [store.tokens for store in stores], [store.offsets for store in stores]


def _counts(windows: Windows, stores: Sequence[TokenStore]) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    for store in stores:
        dropped.update(store.meta["dropped"])
    return {
        "documents": sum(map(len, stores)),
        "bytes": sum(store.meta["bytes"] for store in stores),
        "tokens": sum(len(store.tokens) for store in stores),
        "windows": len(windows),
        "dropped": dict(dropped),
    }


def _dropped(store: TokenStore) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in store.meta["dropped"].items())
    return reasons and f" (dropped: {reasons})"


# ---- Token stores ----


def _stores_of(
    name: str, settings: "Settings", tokenizer: "PreTrainedTokenizerBase", read_named: ReadNamed
) -> dict[SplitName, TokenStore]:
    """The token stores of a data set by split, written if they are missing, stale or damaged."""
    assert settings.cache_dir is not None  # the run has named it
    data = TextData(name, read_named)
    encoded_by = [tokenizer_state(tokenizer), _first_token(tokenizer), eos_token_id(tokenizer)]
    how = [CORPUS_VERSION, content_hash(encoded_by), settings.text_field, settings.test_fraction, settings.on_bad_row]
    directory = Path(settings.cache_dir) / "streams" / content_hash([str(Path(name).resolve()), *how])
    inputs = [*how, data.state]
    if len(stores := _open(directory, inputs)) < len(SPLITS):
        with one_at_a_time(directory, f"waiting for another run, which fills {directory}"):
            if len(stores := _open(directory, inputs)) < len(SPLITS):
                _write(name, data, directory, inputs, settings, tokenizer)
                stores = _open(directory, inputs)
    if len(stores) < len(SPLITS):
        raise UserError("STORAGE", f"cache_dir: {directory} cannot be read back", "check the disk, or set another one")
    return stores


def _open(directory: Path, inputs: Any) -> dict[SplitName, TokenStore]:
    """The stores that are there, neither stale nor damaged."""
    found = {split: open_store(directory / split, inputs) for split in SPLITS}
    return {split: store for split, store in found.items() if store is not None}


def _first_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that begins a document: BOS, else the end of the document before."""
    return eos_token_id(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _write(
    name: str,
    data: TextData,
    directory: Path,
    inputs: Any,
    settings: "Settings",
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Tokenize a data set into its stores. Nothing of it is held in memory."""
    started = time.monotonic()
    counts = RowCounts(on_bad_row=settings.on_bad_row)
    num_bytes, hashes = Counter[SplitName](), {split: hashlib.blake2b(digest_size=16) for split in SPLITS}
    documents = data.documents(settings.text_field, settings.test_fraction, counts)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(f"tokenizing {Path(name).name}", unit="MB"))
        writers = {
            split: stack.enter_context(
                TokenStoreWriter(directory / split, num_ids(tokenizer), inputs, show_progress=False)
            )
            for split in SPLITS
        }
        for batch, tokens, lengths in _encode(documents, tokenizer):
            for split in SPLITS:
                in_split = np.array([document.split == split for document in batch])
                _add(writers[split], hashes[split], tokens[np.repeat(in_split, lengths)], lengths[in_split])
            for document in batch:
                num_bytes[document.split] += len(document.text.encode())
            progress.update(num_bytes.total() // 10**6 - progress.num_done)
        for split, writer in writers.items():
            dropped = dict(counts.dropped) if split == "train" else {}
            writer.meta |= {"bytes": num_bytes[split], "dropped": dropped, "content": hashes[split].hexdigest()}
    size, seconds = num_bytes.total() / 1e6, time.monotonic() - started
    print(f"tokenized {name}: {size:,.1f} MB in {seconds:,.1f} s, {size / seconds:,.1f} MB/s", flush=True)


def _add(writer: TokenStoreWriter, content: Any, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Add documents to a store, and to the hash of its content."""
    writer.add_stream(tokens, lengths)
    stored, start = tokens.astype(writer.dtype), 0
    for length in lengths.tolist():
        content.update(stored[start : start + length])
        content.update(length.to_bytes(8, "little"))
        start += length


def _encode(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[Document], np.ndarray, np.ndarray]]:
    """Documents in batches, with their tokens one after another and the number of tokens of each.

    Many are encoded in other processes, a few batches ahead.
    """
    batches = _batches(documents)
    first = list(islice(batches, MIN_PROCESS_BATCHES))
    asked = deque[tuple[list[Document], list[int]]]()

    def requests() -> Iterator[Request]:
        for batch in chain(first, batches):
            pieces = [_pieces(document.text) for document in batch]
            asked.append((batch, list(map(len, pieces))))
            yield [piece for of_one in pieces for piece in of_one], False

    start, end = [_first_token(tokenizer)], eos_token_id(tokenizer)
    for tokens, piece_lengths in encode_pieces(requests(), tokenizer, len(first) == MIN_PROCESS_BATCHES):
        batch, num_pieces = asked.popleft()
        ends = np.cumsum(piece_lengths, dtype=np.int64)
        lengths = np.diff(np.concatenate([[0], ends])[np.cumsum([0, *num_pieces])])
        yield batch, with_ends(tokens, lengths, start, end), lengths + len(start) + 1


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches of about BATCH_CHARACTERS."""
    batch, size = list[Document](), 0
    for document in found:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> list[str]:
    """A text in pieces of at most PIECE_CHARACTERS and the rest of a line."""
    pieces, start = [], 0
    while start < len(text):
        end = len(text)
        if end - start > PIECE_CHARACTERS:
            end = text.find("\n", start + PIECE_CHARACTERS) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces
