"""Evaluate a model of text: loss, perplexity and bits per byte on fixed windows, and samples."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.data.special_tokens import special_token_ids
from engine.data.token_cache import num_ids
from engine.data.windows import Windows, num_targets, with_token_weights
from engine.run.evaluation import Evaluator
from engine.step.window_source import permuted

PROMPT_TOKENS = 16  # of a sample's prompt


def choose_eval_windows(windows: Windows, count: int, seed: int) -> list[Example]:
    """Windows of the test split to evaluate on, the same in every evaluation. Their mean is one over tokens."""
    chosen = sorted(permuted(place, len(windows), f"{seed}/eval") for place in range(min(count, len(windows))))
    return with_token_weights([windows[index] for index in chosen])


class WindowEvaluator(Evaluator):
    """Evaluates on windows of text. The arguments are those of Evaluator."""

    def __init__(self, settings: Any, tokenizer: PreTrainedTokenizerBase, *arguments: Any):
        super().__init__(settings, tokenizer, *arguments)
        num_bytes = token_bytes(tokenizer)
        self._num_targets = sum(map(num_targets, self.examples))
        self._num_bytes = sum(int(num_bytes[targets(example)].sum()) for example in self.examples)

    def prompts(self) -> list[np.ndarray]:
        """The first tokens of documents of the windows; of the window, if it shows no beginning of one."""
        prompts: dict[bytes, np.ndarray] = {}
        for example in self.examples:
            tokens = np.concatenate([example.prompt, *example.responses])
            assert example.documents is not None
            start = int(example.documents[0]) if len(example.documents) else 0
            prompt = tokens[start : start + min(PROMPT_TOKENS, self._settings.max_prompt_length)]
            prompts.setdefault(prompt.tobytes(), prompt)
        return list(prompts.values())

    def measure(self, token_budget: int, sync_stop_request: Callable[[], bool]) -> dict[str, float] | None:
        metrics = super().measure(token_budget, sync_stop_request)
        if metrics is None:
            return None
        loss = metrics["loss/eval"]
        metrics["perplexity/eval"] = math.exp(min(loss, 700.0))
        if self._num_bytes:
            metrics["bits_per_byte/eval"] = loss * self._num_targets / (math.log(2) * self._num_bytes)
        return metrics


def targets(window: Example) -> np.ndarray:
    """The predicted tokens of a window, int32 [targets]."""
    assert window.documents is not None
    tokens = np.concatenate([window.prompt, *window.responses])
    bounds = [0, *window.documents.tolist(), len(tokens)]
    return np.concatenate([tokens[start + 1 : end] for start, end in pairwise(bounds)])


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The number of bytes of text of each token, int64 [vocabulary]. Special tokens have none."""
    special = special_token_ids(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
    sizes = np.zeros(num_ids(tokenizer), np.int64)
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            sizes[index] = _num_bytes(token, is_byte_level)
    return sizes


def _num_bytes(token: str, is_byte_level: bool) -> int:
    """Bytes of a token: one a character in a byte-level vocabulary. Others write a byte as <0x0A> and spaces as ▁."""
    if is_byte_level:
        return len(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())
