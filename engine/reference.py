"""Log-probs under the frozen reference model: from the model itself, or computed once and kept on disk."""

import hashlib
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from engine.batching import Microbatch
from engine.logprobs import response_logps
from engine.precision import model_in
from engine.sharding import Orders, full_tensor, rank_and_size
from utils import UserError, content_hash, to_device


class LiveReference:
    """Runs the frozen model over each microbatch."""

    def __init__(self, model: PreTrainedModel, mixed_precision: torch.dtype | None = None):
        self.model = model
        self.mixed_precision = mixed_precision

    @torch.no_grad()
    def logps(self, batch: Microbatch) -> Tensor:
        """Sums of log-probs of the responses of batch, [responses]."""
        with self.in_mixed_precision():
            return response_logps(self.model, batch)[1]

    def in_mixed_precision(self) -> AbstractContextManager[None]:
        """Around several calls of logps, this casts the weights once."""
        return model_in(self.model, self.mixed_precision)


class CachedReference:
    """Log-probs kept in an SQLite file, under the hash of the reference's weights, by the tokens of each response.

    The tokens stand for tokenizer, template and truncation, so the same cache serves any beta, loss, learning rate
    and batch. What was computed before a run was killed is kept; what a disk has changed is computed again.

    Args:
        path: of the file.
        of_ranks: returns the values that the processes of a run give, in their order. The first one has the file; all
            have what is in it.
    """

    def __init__(self, path: Path, of_ranks: Callable[[Any], list[Any]] = lambda value: [value]):
        self.path = path
        self._of_ranks = of_ranks
        self._connection: sqlite3.Connection | None = None
        if rank_and_size()[0] == 0:
            try:
                self._connection = self._open()
                self._logps = self._read(self._connection)
            except (OSError, sqlite3.Error) as error:
                raise self._unusable(error) from error
        else:
            self._logps = {}
        self._logps = of_ranks(self._logps)[0]

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS logps"
            " (response BLOB PRIMARY KEY, logp REAL NOT NULL, num_tokens INTEGER NOT NULL, checksum TEXT NOT NULL)"
            " WITHOUT ROWID"
        )
        return connection

    def _read(self, connection: sqlite3.Connection) -> dict[bytes, float]:
        """The log-probs that are as they were written; the others are removed. SQLite does not notice changed bytes."""
        logps, changed = {}, []
        for response, logp, checksum in connection.execute("SELECT response, logp, checksum FROM logps"):
            if checksum == _checksum(response, logp):
                logps[response] = logp
            else:
                changed.append((response,))
        if changed:
            print(f"reference: {len(changed):,} log-probs in {self.path} are damaged, and computed again")
            connection.executemany("DELETE FROM logps WHERE response = ?", changed)
            connection.commit()
        return logps

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            "STORAGE",
            f"the cache of reference log-probs at {self.path} cannot be used ({error})",
            "make room, remove that file, set cache_dir elsewhere, or use reference=live",
        )

    def __len__(self) -> int:
        return len(self._logps)

    def missing(self, responses: Iterable[tuple[np.ndarray, np.ndarray]]) -> set[bytes]:
        """Which of these (prompt, response) pairs of tokens are not in the cache yet, by digest."""
        return {_digest(prompt, response) for prompt, response in responses} - self._logps.keys()

    def add(self, batch: Microbatch, logps: Tensor) -> None:
        """Keep logps [responses] of the responses of batch, and what the other processes add; what is there stays."""
        own = [
            (digest := _digest(prompt, response), logp, len(response), _checksum(digest, logp))
            for (prompt, response), logp in zip(batch.responses, logps.tolist(), strict=True)
        ]
        rows = [row for rows_of_rank in self._of_ranks(own) for row in rows_of_rank]
        if self._connection is not None:
            try:
                self._connection.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?, ?, ?)", rows)
                self._connection.commit()
            except sqlite3.Error as error:
                raise self._unusable(error) from error
        for digest, logp, *_ in rows:
            self._logps.setdefault(digest, logp)

    def logps(self, batch: Microbatch) -> Tensor:
        """Sums of log-probs of the responses of batch, [responses]."""
        values = [self._logps[_digest(prompt, response)] for prompt, response in batch.responses]
        return to_device(torch.tensor(values, dtype=torch.float64), batch.input_ids.device)


Reference = LiveReference | CachedReference


def _digest(prompt: np.ndarray, response: np.ndarray) -> bytes:
    digest = hashlib.blake2b(len(prompt).to_bytes(4, "little"), digest_size=16)
    digest.update(prompt.astype(np.int32).tobytes())
    digest.update(response.astype(np.int32).tobytes())
    return digest.digest()


def _checksum(response: Any, logp: Any) -> str:
    return content_hash([repr((response, logp)).encode()])[:8]  # changed bytes may have made them anything


def weights_hash(
    model: PreTrainedModel,
    orders: Orders,
    name_of: Callable[[str], str | None] = lambda name: name,
    settings: Iterable[Any] = (),
) -> str:
    """A hash of the weights of a model, their dtypes and its config.

    Args:
        orders: of the parameters that are split in another order than their own.
        name_of: gives the name that a weight counts under, or None if it does not count.
        settings: what counts beside the weights.
    """
    digest = xxhash.xxh3_128()  # as fast as memory: billions of weights take seconds, so no digest need be remembered
    for own_name, tensor in model.state_dict().items():
        name = name_of(own_name)
        if name is None:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole = full_tensor(tensor.detach(), orders.get(own_name)).cpu().contiguous()
        digest.update(whole.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    described = model.config.to_diff_dict().items()
    config = {key: value for key, value in described if not key.startswith("_") and key != "transformers_version"}
    own_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))  # before it was sharded
    return content_hash([digest.digest(), own_class.__name__, str(config), *settings])


def reference_key(weights: str, settings: Iterable[Any], device: torch.device) -> str:
    """A hash of all that decides the log-probs of given tokens: the hash of the weights; settings of precision and
    layout, as JSON can write them; and what decides the last bits: device and version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return content_hash([weights, *settings, name, torch.__version__])
