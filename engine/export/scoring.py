"""Score the responses of rows with a reward model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.encoding import Text, encode
from engine.data.examples import Example, num_bos, truncate
from engine.data.forms import ParsedRow
from engine.data.special_tokens import without_eos
from engine.export.reward_bench import row_accuracy
from engine.export.rows_to_score import RowToScore
from engine.step.heads import run_head
from engine.step.layout import lay_out
from engine.step.splitting import split_batch

TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}  # of a forward pass, by device


class RowScores(NamedTuple):
    """The scores of a row.

    Args:
        scores: of each response.
        prompt_is_truncated: whether the prompt has lost tokens.
        truncated_responses: indices of the responses without their end.
    """

    scores: list[float]
    prompt_is_truncated: bool
    truncated_responses: list[int]


class Scorer:
    """Gives the scores of a reward model.

    Args:
        layout: "packed" or "padded".
        max_length, max_prompt_length: as in training.
        mean, deviation: of the rewards, for normalised scores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: str,
        max_length: int,
        max_prompt_length: int,
        mean: float = 0.0,
        deviation: float = 1.0,
    ):
        self._model, self._tokenizer, self._layout = model, tokenizer, layout
        self.max_length, self._max_prompt_length = max_length, max_prompt_length
        self._mean, self._deviation = mean, deviation

    def scores(self, rows: Sequence[ParsedRow]) -> list[list[float]]:
        """The score of each response of each row."""
        return [row.scores for row in self.score_rows(rows)]

    @torch.no_grad()
    def score_rows(self, rows: Sequence[ParsedRow]) -> list[RowScores]:
        """The scores of each row, and what it has lost to truncation."""
        encoded = self.examples(rows)
        examples = [example for example, _, _ in encoded]
        device = self._model.device
        found: dict[tuple[bytes, bytes], float] = {}
        for part in split_batch(examples, 1, TOKEN_BUDGET[device.type], self._layout, feeds_last_token=True):
            batch = lay_out(part, self._layout, self._tokenizer.pad_token_id or 0, feeds_last_token=True)
            scores = run_head(self._model, batch.to(device))[1].tolist()
            found |= {(p.tobytes(), r.tobytes()): s for (p, r), s in zip(batch.responses, scores, strict=True)}
        results = []
        for example, prompt_is_truncated, truncated_responses in encoded:
            raw = [found[example.prompt.tobytes(), response.tobytes()] for response in example.responses]
            scores = [(score - self._mean) / self._deviation for score in raw]
            results.append(RowScores(scores, prompt_is_truncated, truncated_responses))
        return results

    def examples(self, rows: Sequence[ParsedRow]) -> list[tuple[Example, bool, list[int]]]:
        """The tokens of each row, as in training; whether its prompt, and which of its responses, are truncated."""
        texts: dict[Text, int] = {}
        for row in rows:
            for text in _texts(row, self._tokenizer):
                texts.setdefault(text, len(texts))
        encoded = encode(list(texts), self._tokenizer, show_progress=False)
        results = []
        for index, row in enumerate(rows):
            prompt_text, *response_texts = (texts[text] for text in _texts(row, self._tokenizer))
            prompt, responses = encoded.prompt(prompt_text), tuple(map(encoded.response, response_texts))
            num_front = num_bos(prompt, encoded, self._tokenizer)
            kept_prompt, kept = truncate(
                prompt, responses, self.max_length, self._max_prompt_length, num_front=num_front
            )
            shorter = [len(new) < len(old) for new, old in zip(kept, responses, strict=True)]
            truncated = [number for number, is_shorter in enumerate(shorter) if is_shorter]
            results.append((Example(kept_prompt, kept, index), len(kept_prompt) < len(prompt), truncated))
        return results


def _texts(row: ParsedRow, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The texts of the prompt and of each response."""
    texts = [row.prompt, *(without_eos(text, tokenizer) for text in row.responses)]
    return [Text(row.from_template, text) for text in texts]


def scored_row(row: RowToScore, scores: RowScores | None) -> dict[str, Any]:
    """A line of the output; scores is None for a row without responses."""
    line: dict[str, Any] = {"row": row.number, **row.facts}
    if scores is None:
        return line | {"dropped": row.parsed}
    assert isinstance(row.parsed, ParsedRow)
    line["scores"] = scores.scores
    if row.num_chosen is not None:
        line["num_chosen"] = row.num_chosen
    accuracy = row_accuracy(scores.scores, row.parsed.pairs, row.num_chosen)
    if accuracy is not None:
        line["accuracy"] = accuracy
    if scores.prompt_is_truncated:
        line["prompt_is_truncated"] = True
    if scores.truncated_responses:
        line["truncated_responses"] = scores.truncated_responses
    return line
