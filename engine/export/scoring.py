"""Score the responses of rows with a reward model."""

import math
import sys
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
from engine.export.run_record import RunRecord
from engine.export.saved_models import check_finite, load_saved
from engine.models.score_head import has_score_head, stored_rewards
from engine.step.heads import run_head
from engine.step.layout import lay_out
from engine.step.packing_check import use_packed_attention
from engine.step.splitting import split_batch
from utils import UserError

DEFAULT_MAX_LENGTH = 4096  # in tokens, of models without a run
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
        statistics: mean and standard deviation of the rewards; None if unknown.

    Attributes:
        mean, deviation: of normalised scores; 0 and 1 for raw ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: str,
        max_length: int,
        max_prompt_length: int,
        statistics: tuple[float, float] | None = None,
    ):
        self._model, self.tokenizer, self._layout = model, tokenizer, layout
        self.max_length, self._max_prompt_length = max_length, max_prompt_length
        self.statistics = statistics
        self.mean, self.deviation = 0.0, 1.0

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def scores(self, rows: Sequence[ParsedRow]) -> list[list[float]]:
        """The score of each response of each row."""
        return [row.scores for row in self.score_rows(rows)]

    def normalize(self, key: str, name: str, fix: str) -> None:
        """Give normalised scores from now on.

        Args:
            key, name, fix: the option, the model and the remedy in errors.

        Raises:
            UserError: CONFIG without usable mean and standard deviation.
        """
        if self.statistics is None:
            raise UserError("CONFIG", f"{key}: config.json of {name} has no reward_mean and reward_std", fix)
        mean, deviation = self.statistics
        if deviation <= 0:
            problem = f"{key}: reward_std of {name} is {deviation}, so scores cannot be divided by it"
            raise UserError("CONFIG", problem, "leave it out")
        self.mean, self.deviation = mean, deviation

    def score_rows(self, rows: Sequence[ParsedRow]) -> list[RowScores]:
        """The scores of each row, and what it has lost to truncation."""
        encoded = self.examples(rows)
        scores = self.score_examples([example for example, _, _ in encoded])
        return [
            RowScores(of_row, prompt_is_truncated, truncated_responses)
            for of_row, (_, prompt_is_truncated, truncated_responses) in zip(scores, encoded, strict=True)
        ]

    @torch.no_grad()
    def score_examples(self, examples: Sequence[Example]) -> list[list[float]]:
        """The score of each response of each example."""
        device = self._model.device
        found: dict[tuple[bytes, bytes], float] = {}
        for part in split_batch(examples, 1, TOKEN_BUDGET[device.type], self._layout, feeds_last_token=True):
            batch = lay_out(part, self._layout, self.tokenizer.pad_token_id or 0, feeds_last_token=True)
            scores = run_head(self._model, batch.to(device))[1].tolist()
            found |= {(p.tobytes(), r.tobytes()): s for (p, r), s in zip(batch.responses, scores, strict=True)}
        raw = [[found[each.prompt.tobytes(), response.tobytes()] for response in each.responses] for each in examples]
        return [[(score - self.mean) / self.deviation for score in scores] for scores in raw]

    def examples(self, rows: Sequence[ParsedRow]) -> list[tuple[Example, bool, list[int]]]:
        """The tokens of each row, as in training; whether its prompt, and which of its responses, are truncated."""
        texts: dict[Text, int] = {}
        for row in rows:
            for text in _texts(row, self.tokenizer):
                texts.setdefault(text, len(texts))
        encoded = encode(list(texts), self.tokenizer, show_progress=False)
        results = []
        for index, row in enumerate(rows):
            prompt_text, *response_texts = (texts[text] for text in _texts(row, self.tokenizer))
            prompt, responses = encoded.prompt(prompt_text), tuple(map(encoded.response, response_texts))
            num_front = num_bos(prompt, encoded, self.tokenizer)
            kept_prompt, kept = truncate(
                prompt, responses, self.max_length, self._max_prompt_length, num_front=num_front
            )
            shorter = [len(new) < len(old) for new, old in zip(kept, responses, strict=True)]
            truncated = [number for number, is_shorter in enumerate(shorter) if is_shorter]
            results.append((Example(kept_prompt, kept, index), len(kept_prompt) < len(prompt), truncated))
        return results


def open_reward_model(
    name: str,
    record: RunRecord,
    *,
    key: str = "model",
    layout: str = "packed",
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    show_progress: bool = True,
    device: torch.device | None = None,
    shortens: bool = False,
) -> Scorer:
    """Load a reward model, to give raw scores.

    Args:
        name: a run, checkpoint, adapter or model directory, or a name on the hub.
        record: its training.
        key: the option with the name, for errors.
        max_length, max_prompt_length: None for the run's, else by the model.
        dtype, base, show_progress: as of load_saved().
        device: None for a GPU, else the CPU.
        shortens: lengths above the positions of the model are lowered, not refused.
    """
    saved = load_saved(name, dtype=dtype, base=base, show_progress=show_progress)
    if not has_score_head(saved.model):
        problem = f"{key}: {name} is a model of text, not a reward model"
        raise UserError("CONFIG", problem, "train one with loss=reward")
    check_finite(saved.model, "give another checkpoint", show_progress=show_progress)
    model: Any = saved.model
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if shortens and max_length and max_prompt_length:
        max_length = min(max_length, _positions(model.config))
        max_prompt_length = max_prompt_length if max_prompt_length < max_length else max_length // 2
    max_length, max_prompt_length = _lengths(model.config, record, max_length, max_prompt_length)
    if layout == "packed":
        use_packed_attention(model)
    sizes = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    return Scorer(model, saved.tokenizer, layout=layout, statistics=_statistics(model, record), **sizes)


def _lengths(config: Any, record: RunRecord, max_length: int | None, max_prompt_length: int | None) -> tuple[int, int]:
    """max_length and max_prompt_length, as asked, else of the run, else by the model."""
    context = _positions(config)
    of_run = {name: record.config.get(name) for name in ("max_length", "max_prompt_length")}
    for name, value in of_run.items():
        if value is not None and not isinstance(value, int):
            problem = f"{name}: the config.yaml of the run has {value!r}, not a number"
            raise UserError("CHECKPOINT", problem, "correct it there")
    max_length = max_length or of_run["max_length"] or min(context, DEFAULT_MAX_LENGTH)
    max_prompt_length = max_prompt_length or of_run["max_prompt_length"] or max_length // 2
    if max_length > context:
        problem = f"max_length: {max_length} is more than the {context} positions of the model"
        raise UserError("CONFIG", problem, "lower it")
    if max_prompt_length >= max_length:
        problem = f"max_prompt_length: {max_prompt_length} is not below max_length ({max_length})"
        raise UserError("CONFIG", problem, "lower it, to leave room for a response")
    return max_length, max_prompt_length


def _positions(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _statistics(model: PreTrainedModel, record: RunRecord) -> tuple[float, float] | None:
    """Mean and standard deviation of the rewards; None if either is unknown or not finite."""
    of_run = record.reward_mean, record.reward_std  # an adapter has no config of a model
    values = [own if own is not None else kept for own, kept in zip(of_run, stored_rewards(model), strict=True)]
    numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


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
