"""Reference log-probs on disk, found by content."""

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.models.shards import rank_and_size
from engine.step.layout import Microbatch
from engine.step.logprobs import sum_by_response
from utils import UserError, content_hash, to_device

Row = tuple[bytes, float | bytes, int, str]  # digest, log-prob or those of tokens, number of tokens, checksum


class CachedReference:
    """Log-probs in an SQLite file: tokens of a prompt and response -> log-prob.

    - Keys are tokens, so they cover tokenizer, template and truncation. One cache serves any beta, loss or batch.
    - Rows written before a run was killed stay valid.
    - Rows damaged on disk are detected and computed again.
    - Sums over tokens serve most losses. With by_token, a second table has the log-prob of each token.

    Args:
        path: of the file, named by the hash of the reference's weights.
        by_token: hold the log-probs of tokens, not their sums.
        gather_from_ranks: takes a value of this rank, returns those of all ranks in order. Rank 0 has the file, all
            ranks have its contents.
    """

    def __init__(
        self,
        path: Path,
        gather_from_ranks: Callable[[Any], list[Any]] = lambda value: [value],
        *,
        by_token: bool = False,
    ):
        self.path, self.by_token = path, by_token
        self._gather_from_ranks = gather_from_ranks
        self._unwritten: list[Row] = []
        self._is_in_memory = False
        self._commit_interval, self._committed_at = 0.0, 0.0  # seconds
        self._connection: sqlite3.Connection | None = None
        if rank_and_size()[0] == 0:
            try:
                try:
                    self._connection, self._logps = self._open_and_read()
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    print(f"reference: {self.path} is damaged ({error}); its log-probs are computed again")
                    self._remove()
                    self._connection, self._logps = self._open_and_read()
            except (OSError, sqlite3.Error) as error:
                raise self._unusable(error) from error
        else:
            self._logps = {}
        self._logps = gather_from_ranks(self._logps)[0]

    def _open_and_read(self) -> tuple[sqlite3.Connection, dict[bytes, float | bytes]]:
        connection = self._open()
        try:
            return connection, self._read(connection)
        except sqlite3.Error:
            connection.close()
            raise

    def _remove(self) -> None:
        """Remove the file with its journals; another run's open connection keeps the old one."""
        for suffix in ("-journal", "-wal", "-shm", ""):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        for table, kind in (("logps", "REAL"), ("token_logps", "BLOB")):
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table}"
                f" (response BLOB PRIMARY KEY, logp {kind} NOT NULL, num_tokens INTEGER NOT NULL,"
                " checksum TEXT NOT NULL) WITHOUT ROWID"
            )
        return connection

    def _read(self, connection: sqlite3.Connection) -> dict[bytes, float | bytes]:
        """Read intact log-probs, and delete damaged ones.

        SQLite itself does not notice changed bytes.
        """
        logps, damaged = {}, []
        table = "token_logps" if self.by_token else "logps"
        for response, logp, checksum in connection.execute(f"SELECT response, logp, checksum FROM {table}"):
            if checksum == _checksum(response, logp):
                logps[response] = logp
            else:
                damaged.append((response,))
        if damaged:
            print(f"reference: {len(damaged):,} log-probs in {self.path} are damaged; they are computed again")
            connection.executemany(f"DELETE FROM {table} WHERE response = ?", damaged)
            connection.commit()
        return logps

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            "STORAGE",
            f"the cache of reference log-probs at {self.path} cannot be used ({error})",
            "free disk space, remove that file, set another cache_dir, or use reference=live",
        )

    def __len__(self) -> int:
        return len(self._logps)

    def missing(self, responses: Iterable[tuple[np.ndarray, np.ndarray]]) -> set[bytes]:
        """Digests of the (prompt, response) token pairs without a log-prob in the cache."""
        return {_digest(prompt, response) for prompt, response in responses} - self._logps.keys()

    def add(self, batch: Microbatch, logps: Tensor, token_logps: Tensor | None = None) -> None:
        """Store the log-probs of this and the other ranks' batches.

        Existing rows stay. On disk they are at once, or as committing_every() says.

        Args:
            logps: [responses].
            token_logps: [targets], with by_token.
        """
        values: list[float | bytes] = [*logps.tolist()]
        if self.by_token:  # the sums are written too: they cost nothing here
            assert token_logps is not None
            lengths = [len(response) for _, response in batch.responses]
            values += [part.numpy().tobytes() for part in token_logps.cpu().split(lengths)]
        digests = [(_digest(prompt, response), len(response)) for prompt, response in batch.responses]
        rank_rows = [
            (digest, value, length, _checksum(digest, value))
            for (digest, length), value in zip(digests * (1 + self.by_token), values, strict=True)
        ]
        rows = [row for rows_of_rank in self._gather_from_ranks(rank_rows) for row in rows_of_rank]
        for digest, value, *_ in rows:
            if isinstance(value, bytes) == self.by_token:
                self._logps.setdefault(digest, value)
        if self._is_in_memory:
            return
        self._unwritten += rows
        if time.monotonic() >= self._committed_at + self._commit_interval:
            self._commit()

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Keep added log-probs out of the file in a with block."""
        self._is_in_memory = True
        try:
            yield
        finally:
            self._is_in_memory = False

    @contextmanager
    def committing_every(self, seconds: float) -> Iterator[None]:
        """Write added log-probs every so many seconds in a with block, and at its end, after an error too."""
        self._commit_interval, self._committed_at = seconds, time.monotonic()
        try:
            yield
        finally:
            self._commit_interval = 0.0
            self._commit()

    def _commit(self) -> None:
        """Write rows in one short transaction, as other runs may write to the file too."""
        rows, self._unwritten, self._committed_at = self._unwritten, [], time.monotonic()
        if self._connection is not None and rows:
            try:
                for table, kind in (("logps", float), ("token_logps", bytes)):
                    of_kind = [row for row in rows if isinstance(row[1], kind)]
                    self._connection.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?, ?)", of_kind)
                self._connection.commit()
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def logps(self, batch: Microbatch) -> Tensor:
        """Log-probs of the responses of batch, summed over their tokens, [responses]."""
        if self.by_token:
            return sum_by_response(self.token_logps(batch), batch.response_lengths)
        values = [self._logps[_digest(prompt, response)] for prompt, response in batch.responses]
        return to_device(torch.tensor(values, dtype=torch.float64), batch.input_ids.device)

    def token_logps(self, batch: Microbatch) -> Tensor:
        """Log-probs of the targets of batch, with by_token, [targets], in the dtype they were added in."""
        arrays = []
        for prompt, response in batch.responses:
            value = self._logps[_digest(prompt, response)]
            assert isinstance(value, bytes)
            arrays.append(np.frombuffer(value, dtype=f"f{len(value) // len(response)}"))
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.float32)
        return to_device(torch.from_numpy(values), batch.input_ids.device)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is damaged: cut short, overwritten, or with other columns."""
    is_changed = isinstance(error, sqlite3.OperationalError) and "no such column" in str(error)
    return is_changed or error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _digest(prompt: np.ndarray, response: np.ndarray) -> bytes:
    digest = hashlib.blake2b(len(prompt).to_bytes(4, "little"), digest_size=16)
    digest.update(prompt.astype(np.int32).tobytes())
    digest.update(response.astype(np.int32).tobytes())
    return digest.digest()


def _checksum(response: Any, logp: Any) -> str:
    return content_hash([repr((response, logp)).encode()])[:8]  # damaged values may have any type
