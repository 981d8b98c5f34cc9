"""Rows of a file to score: parsed in order, dropped ones in their place."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from engine.data.chat import ASSISTANT_TURN, Chat, Message
from engine.data.forms import FORMS, MAX_RESPONSES, ParsedRow, detect_form
from engine.data.messages import read_tools
from engine.data.row_files import raise_error, read_rows
from engine.data.rows import MALFORMED, BadRow, Row
from engine.export.reward_bench import OTHER, heading_of
from utils import progress


class RowToScore(NamedTuple):
    """A row of a file.

    Args:
        number: of the row, from 0.
        parsed: its prompt and responses; for a dropped row the reason.
        num_chosen: for lists of chosen and rejected responses, the number of the former.
        facts: columns id and subset, if the row has them.
        is_malformed: whether it is dropped by on_bad_row.
    """

    number: int
    parsed: ParsedRow | str
    num_chosen: int | None = None
    facts: Mapping[str, Any] = MappingProxyType({})
    is_malformed: bool = False

    @property
    def is_of_benchmark(self) -> bool:
        """Whether it is a row of RewardBench."""
        return heading_of(self.facts.get("subset"), self.num_chosen is not None) != OTHER


@dataclass
class RowSurvey:
    """Numbers of the rows of a file.

    Args:
        num_rows: of all rows.
        dropped: number of dropped rows by reason.
        first_bad_row: the problem of the first malformed row.
        num_plain_text: rows scored as they are; not those in the format of HH where the model expects it.
        num_benchmark_plain: rows of RewardBench among them.
        num_benchmark_messages: rows of RewardBench that a chat template writes.
    """

    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_bad_row: str = ""
    num_plain_text: int = 0
    num_benchmark_plain: int = 0
    num_benchmark_messages: int = 0

    def add(self, row: RowToScore, expects_hh: bool) -> None:
        """Count a row.

        Args:
            expects_hh: whether the model was trained on text in the format of HH.
        """
        self.num_rows += 1
        if isinstance(row.parsed, str):
            self.dropped[MALFORMED if row.is_malformed else row.parsed] += 1
            if row.is_malformed:
                self.first_bad_row = self.first_bad_row or row.parsed
        elif row.parsed.is_plain_text:
            self.num_plain_text += not (expects_hh and ASSISTANT_TURN in row.parsed.prompt)
            self.num_benchmark_plain += row.is_of_benchmark
        else:
            self.num_benchmark_messages += row.is_of_benchmark


class RowReader:
    """The rows of a file, in order. It can be read several times.

    Args:
        form: a key of FORMS; None infers it from the first row. Then rows of RewardBench are messages where there is a
            chat template.
        on_bad_row: "error" raises for a malformed row; "drop" gives the reason in its place.
    """

    def __init__(self, path: Path, form: str | None, chat: Chat, on_bad_row: str = "error"):
        self._path, self._form, self._chat, self._on_bad_row = path, form, chat, on_bad_row
        self.has_template = not chat.is_template or bool(chat.jinja or chat.tokenizer.chat_template)

    def __iter__(self) -> Iterator[RowToScore]:
        """Parse the rows.

        Raises:
            UserError: for an unreadable row, or one of another form.
        """
        inferred: str | None = None
        for number, row in enumerate(self._rows()):
            if isinstance(row, BadRow):
                yield RowToScore(number, row.what, is_malformed=True)
                continue
            try:
                form = self._form or inferred or (None if has_lists(row) else detect_form(row))
                yield self._parse(row, number, form)
                inferred = form
            except BadRow as error:
                if self._on_bad_row == "error":
                    raise
                yield RowToScore(number, error.what, is_malformed=True)

    def survey(self) -> RowSurvey:
        """Parse all rows once, to find a malformed one before the first is scored."""
        # Exported models have the format of HH as a template.
        expects_hh = not self._chat.is_template or ASSISTANT_TURN.strip() in str(
            self._chat.jinja or self._chat.tokenizer.chat_template
        )
        survey = RowSurvey()
        for row in progress(self, description=f"reading {self._path.name}", unit="rows"):
            survey.add(row, expects_hh)
        return survey

    def _rows(self) -> Iterator[Row | BadRow]:
        """The rows, with the problem in place of an unreadable one."""
        rejected: list[BadRow] = []
        for row in read_rows(self._path, raise_error if self._on_bad_row == "error" else rejected.append):
            yield from rejected
            rejected.clear()
            yield row
        yield from rejected

    def _parse(self, row: Row, number: int, form: str | None) -> RowToScore:
        facts = {name: row.values[name] for name in ("id", "subset") if isinstance(row.values.get(name), str | int)}
        is_list = has_lists(row)
        is_of_benchmark = heading_of(facts.get("subset"), is_list) != OTHER
        is_benchmark_text = is_list or form == "strings"
        as_messages = form == "messages" or (
            self._form is None and is_of_benchmark and is_benchmark_text and self.has_template
        )
        if is_list:
            parsed = _lists(row, self._chat, as_messages)
            return RowToScore(number, parsed, len(row.items("chosen")), facts)
        assert form is not None
        try:
            each = FORMS["messages" if as_messages else form](row, self._chat)
        except BadRow as error:
            if self._form is not None:
                raise
            raise BadRow(
                f"{error.what} (the columns of the first row are those of format={form})", error.remedy
            ) from error
        if isinstance(each, ParsedRow) and each.is_plain_text and read_tools(row):
            raise row.error("tools", "is for messages, and the row is plain text")
        if isinstance(each, ParsedRow) and not each.prompt:
            raise row.error("prompt", "is empty")
        return RowToScore(number, each, None, facts)


def has_lists(row: Row) -> bool:
    """Whether chosen and rejected are lists of texts, as in RewardBench 2."""
    chosen, rejected = row.values.get("chosen"), row.values.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return False
    return isinstance(next(chain(chosen, rejected), None), str)


def _lists(row: Row, chat: Chat, as_messages: bool) -> ParsedRow:
    prompt = row.text("prompt")
    names = ("chosen", "rejected")
    for name in names:
        if not row.items(name):
            raise row.error(name, "is an empty list")
    texts = [row.as_text(text, f"{name}[{i}]") for name in names for i, text in enumerate(row.items(name))]
    if len(texts) > MAX_RESPONSES:
        raise row.error("chosen", f"and rejected have {len(texts):,} responses, more than {MAX_RESPONSES:,}")
    if not prompt:
        raise row.error("prompt", "is empty")
    if not as_messages:
        return ParsedRow(prompt, prompt, texts, [])
    question: Message = {"role": "user", "content": prompt}
    answers: list[Message] = [{"role": "assistant", "content": text} for text in texts]
    rendered, responses = chat.render(row, [question], answers)
    return ParsedRow([prompt], rendered, responses, [], from_template=chat.is_template)
