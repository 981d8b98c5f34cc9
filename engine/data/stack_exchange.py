"""Stack Exchange questions: answers with their scores, HTML stripped."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engine.data.html import strip_many
from engine.data.rows import Row, RowCounts


class Question(NamedTuple):
    """A question with its answers and their scores, as plain text."""

    text: str
    answers: list[str]
    scores: list[float]


def read_questions(rows: Iterable[Row], counts: RowCounts) -> Iterator[Question]:
    """Read questions from rows of {"question": ..., "answers": [{"text": ..., "pm_score": ...}, ...]}.

    Bad rows end the run or are dropped, as counts says.
    """
    for (row, scores), texts in strip_many(_read_html(rows, counts)):
        question = None
        with counts.catch_bad_row():
            question = Question(*_check_texts(row, texts), scores)
        if question is not None:
            yield question


def _read_html(rows: Iterable[Row], counts: RowCounts) -> Iterator[tuple[tuple[Row, list[float]], list[str]]]:
    """Each row with its scores, and the HTML of the question and its answers."""
    for row in rows:
        found: tuple[list[float], list[str]] | None = None
        with counts.catch_bad_row():
            found = _fields(row)
        if found is not None:
            yield (row, found[0]), found[1]


def _fields(row: Row) -> tuple[list[float], list[str]]:
    html, scores = [row.text("question")], []
    for i, answer in enumerate(row.items("answers")):
        name = f"answers[{i}]"
        html.append(row.as_text(row.member(answer, "text", name), f"{name}.text"))
        scores.append(row.as_number(row.member(answer, "pm_score", name), f"{name}.pm_score"))
    return scores, html


def _check_texts(row: Row, texts: list[str | ValueError]) -> tuple[str, list[str]]:
    """The question and its answers; BadRow if some HTML was unreadable."""
    checked: list[str] = []
    for i, text in enumerate(texts):
        if isinstance(text, ValueError):
            raise row.error(f"answers[{i - 1}].text" if i else "question", str(text))
        checked.append(text)
    return checked[0], checked[1:]
