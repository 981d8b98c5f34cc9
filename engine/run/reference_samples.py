"""The reference's sampled responses, kept on disk beside its log-probs."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engine.placement.placement import Placement
from utils import content_hash, write_atomically

Samples = list[np.ndarray]


def read_or_draw(path: Path, placement: Placement, draw: Callable[[], Samples]) -> Samples:
    """The samples of a file; without an intact one, drawn and written. All ranks call this together.

    Args:
        path: named by everything that affects the samples.
        draw: samples responses, int32 [response tokens] each.
    """
    found = placement.gather_from_data_ranks(_read(path) if placement.rank == 0 else None)[0]
    if found is not None:
        return found
    samples = draw()
    if placement.rank == 0:
        tokens = [sample.tolist() for sample in samples]
        with suppress(OSError):  # a full disk: the next start draws them again
            write_atomically(path, json.dumps({"samples": tokens, "checksum": _checksum(tokens)}).encode())
    return samples


def samples_path(log_probs: Path, placement: Placement, prompts: Sequence[np.ndarray]) -> Path:
    """The file of the samples of a reference, beside that of its log-probs."""
    settings = placement.settings
    sampling = [settings.seed, settings.eval_batch_size, settings.max_length, settings.max_prompt_length]
    ranks = [settings.trainer, settings.tensor_parallel.backend, placement.num_ranks, placement.num_data_ranks]
    hashed = content_hash([sampling, ranks, placement.tokenizer.eos_token_id, [prompt.tolist() for prompt in prompts]])
    return log_probs.with_name(f"{log_probs.stem}-{hashed}.samples.json")


def _read(path: Path) -> Samples | None:
    try:
        stored: Any = json.loads(path.read_text())
        if stored["checksum"] == _checksum(stored["samples"]):
            return [np.array(tokens, dtype=np.int32) for tokens in stored["samples"]]
        print(f"reference: {path} is damaged; its samples are drawn again")
    except (OSError, ValueError, KeyError, TypeError):  # absent, or cut short
        pass
    return None


def _checksum(tokens: Any) -> str:
    return content_hash([tokens])
