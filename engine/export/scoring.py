"""Score the responses of rows with a reward model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.chat import Chat, Message
from engine.data.encoding import encode_texts, eos_token_id, token_prefix
from engine.data.examples import Example, truncate
from engine.data.forms import FORMS, ParsedRow, detect_form
from engine.data.row_files import read_rows
from engine.data.rows import Row
from engine.data.special_tokens import without_eos
from engine.export.reward_bench import row_accuracy
from engine.step.heads import run_head
from engine.step.layout import lay_out
from engine.step.splitting import split_batch

TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}  # of a forward pass


class RowToScore(NamedTuple):
    """A row of a file.

    Args:
        number: of the row, from 0.
        parsed: its prompt and responses; the reason it has none.
        num_chosen: for lists of chosen and rejected responses, the number of the former.
        facts: columns id and subset, if the row has them.
    """

    number: int
    parsed: ParsedRow | str
    num_chosen: int | None
    facts: dict[str, Any]


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
        self._max_length, self._max_prompt_length = max_length, max_prompt_length
        self._mean, self._deviation = mean, deviation
        self._prefix, self._eos = token_prefix(tokenizer), eos_token_id(tokenizer)

    @torch.no_grad()
    def scores(self, rows: Sequence[ParsedRow]) -> list[list[float]]:
        """The score of each response of each row."""
        examples = [self._example(row, index) for index, row in enumerate(rows)]
        device = self._model.device
        found: dict[tuple[bytes, bytes], float] = {}
        for part in split_batch(examples, 1, TOKEN_BUDGET[device.type], self._layout, feeds_last_token=True):
            batch = lay_out(part, self._layout, self._tokenizer.pad_token_id or 0, feeds_last_token=True)
            scores = run_head(self._model, batch.to(device))[1].tolist()
            found |= {(p.tobytes(), r.tobytes()): s for (p, r), s in zip(batch.responses, scores, strict=True)}
        return [
            [
                (found[example.prompt.tobytes(), response.tobytes()] - self._mean) / self._deviation
                for response in example.responses
            ]
            for example in examples
        ]

    def _example(self, row: ParsedRow, index: int) -> Example:
        texts = [row.prompt, *(without_eos(text, self._tokenizer) for text in row.responses)]
        ids = encode_texts(texts, self._tokenizer, parse_special_tokens=row.from_template)
        prompt, *responses = (np.array(each, dtype=np.int32) for each in ids)
        if prompt[: len(self._prefix)].tolist() != self._prefix:
            prompt = np.concatenate([np.array(self._prefix, dtype=np.int32), prompt])
        ended = tuple(np.append(response, np.int32(self._eos)) for response in responses)
        num_front = len(self._prefix) or int(prompt[:1].tolist() == [self._tokenizer.bos_token_id])
        prompt, ended = truncate(prompt, ended, self._max_length, self._max_prompt_length, num_front=num_front)
        return Example(prompt, ended, index)


def rows_to_score(path: Path, form: str | None, chat: Chat) -> Iterator[RowToScore]:
    """The rows of a file, in order.

    Args:
        form: a key of FORMS; None infers it from the first row.

    Raises:
        UserError: for an unreadable row, or one of another form.
    """
    for number, row in enumerate(read_rows(path)):
        facts = {name: row.values[name] for name in ("id", "subset") if isinstance(row.values.get(name), str | int)}
        if _has_lists(row):
            parsed = _lists(row, chat, as_messages=form == "messages")
            yield RowToScore(number, parsed, len(row.items("chosen")), facts)
            continue
        form = form or detect_form(row)
        each = FORMS[form](row, chat)
        if isinstance(each, ParsedRow) and not each.prompt:
            raise row.error("prompt", "is empty")
        yield RowToScore(number, each, None, facts)


def _has_lists(row: Row) -> bool:
    """Whether chosen and rejected are lists of texts, as in RewardBench 2."""
    values = [row.values.get(name) for name in ("chosen", "rejected")]
    return all(isinstance(value, list) and value and isinstance(value[0], str) for value in values)


def _lists(row: Row, chat: Chat, as_messages: bool) -> ParsedRow:
    prompt = row.text("prompt")
    names = ("chosen", "rejected")
    texts = [row.as_text(text, f"{name}[{i}]") for name in names for i, text in enumerate(row.items(name))]
    if not as_messages:
        return ParsedRow(prompt, prompt, texts, [])
    question: Message = {"role": "user", "content": prompt}
    answers: list[Message] = [{"role": "assistant", "content": text} for text in texts]
    rendered, responses = chat.render(row, [question], answers)
    return ParsedRow([prompt], rendered, responses, [], from_template=chat.is_template)


def scored_row(row: RowToScore, scores: list[float] | None) -> dict[str, Any]:
    """A line of the output; scores is None for a row without responses."""
    line: dict[str, Any] = {"row": row.number, **row.facts}
    if scores is None:
        return line | {"dropped": row.parsed}
    assert isinstance(row.parsed, ParsedRow)
    line["scores"] = scores
    if row.num_chosen is not None:
        line["num_chosen"] = row.num_chosen
    accuracy = row_accuracy(scores, row.parsed.pairs, row.num_chosen)
    return line if accuracy is None else line | {"accuracy": accuracy}
