"""Progress without a terminal, by a fake clock: a line every 30 seconds, none for short phases."""

import sys
from collections.abc import Iterator

import pytest

from utils import Progress, progress


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    return FakeClock()


def test_a_line_every_30_seconds(clock, capsys):
    items = []
    for item in progress(range(200), description="tokenizing", unit="texts", clock=clock):
        items.append(item)
        clock.seconds += 0.5
    assert items == list(range(200))
    assert capsys.readouterr().out.splitlines() == [
        "tokenizing: 60 of 200 texts, 1 min 10 s left",
        "tokenizing: 120 of 200 texts, 40 s left",
        "tokenizing: 180 of 200 texts, 10 s left",
    ]


def test_a_short_phase_prints_nothing(clock, capsys):
    for _ in progress(range(10), description="tokenizing", clock=clock):
        clock.seconds += 2.9
    assert capsys.readouterr().out == ""


def test_without_a_total_the_time_left_is_unknown(clock, capsys):
    def rows() -> Iterator[int]:
        yield from range(3)

    for _ in progress(rows(), description="reading hh train", unit="rows", clock=clock):
        clock.seconds += 20
    assert capsys.readouterr().out == "reading hh train: 2 rows\n"


def test_many_items_at_once(clock, capsys):
    with Progress("tokenizing", total=400_000, unit="texts", clock=clock) as shown:
        clock.seconds = 30
        shown.update(120_000)
        clock.seconds = 30 + 7200
        shown.update(1)
    assert capsys.readouterr().out.splitlines() == [
        "tokenizing: 120,000 of 400,000 texts, 1 min 10 s left",
        "tokenizing: 120,001 of 400,000 texts, 4 h 41 min left",
    ]


def test_other_ranks_print_nothing(clock, capsys):
    for _ in progress(range(3), description="sampling", is_shown=False, clock=clock):
        clock.seconds += 60
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clock = FakeClock()
    for _ in progress(range(3), description="sampling", unit="prompts", clock=clock):
        clock.seconds += 60
    output = capsys.readouterr()
    assert output.out == "" and "sampling: 100%" in output.err and "3/3" in output.err
