"""Helpers: prefetching, reachable addresses, and standard streams."""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.settings.options import Options, run_command
from utils import BestEffortStream, Progress, UserError, is_reachable, prefetch


def test_user_errors_pass_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UserError("DATA", "a row", "mend it")))
    assert (error.code, error.what, error.fix, error.exit_status) == ("DATA", "a row", "mend it", 3)
    assert str(error) == "error[DATA] a row; fix: mend it"


def test_prefetch_keeps_items_and_order() -> None:
    assert list(prefetch(range(5))) == [0, 1, 2, 3, 4]
    assert list(prefetch([None, None])) == [None, None]
    assert list(prefetch([])) == []


def test_prefetch_makes_one_item_in_advance() -> None:
    made = [threading.Event() for _ in range(4)]

    def source() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    items = prefetch(source())
    assert not made[0].is_set()  # nothing before the first request
    for number in range(3):
        assert next(items) == number
        assert made[number + 1].wait(timeout=60)
        assert not any(event.is_set() for event in made[number + 2 :])


def test_errors_of_the_source_come_after_its_items() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken"):
        next(items)


def test_closing_prefetch_ends_its_thread() -> None:
    before = threading.active_count()
    items = iter(prefetch(range(5)))
    next(items)
    assert threading.active_count() == before + 1
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("url", ["http://x:abc", "http://[::1", "http://127.0.0.1:99999", "http://127.0.0.1:9"])
def test_invalid_addresses_are_not_reachable(url: str) -> None:
    assert not is_reachable(url)


STREAMS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
import process_start
process_start.open_missing_streams()
file = open(sys.argv[1], "w")
assert file.fileno() > 2, file.fileno()
import subprocess
for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
    print("text", file=stream, flush=True)
assert sys.stdin.read() == ""
subprocess.run(["sh", "-c", "echo a && echo b >&2 && cat"], check=True)  # children inherit them
"""


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-", "<&- >&- 2>&-", ">&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    script = f'"$@" {closed}'
    command = ["sh", "-c", script, "sh", sys.executable, "-c", STREAMS, str(file)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    assert result.returncode == 0 and file.read_bytes() == b"", result
    assert b"text" in result.stdout if closed == "2>&-" else result.stdout == b""


def test_a_command_without_streams_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sets closed streams to None."""
    for name in ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"):
        monkeypatch.setattr(sys, name, None)
    num_done = []

    def work(options: Options) -> None:
        with Progress("working", total=1) as progress:
            progress.update()
        num_done.append(progress.num_done)

    assert run_command(work, "usage", Options, []) == 0 and num_done == [1]


def test_best_effort_streams_survive_their_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    raw = os.fdopen(writer, "w")
    stream = BestEffortStream(raw)
    assert stream.write("x" * 100_000) == 100_000
    stream.flush()
    raw.detach()  # its buffer cannot be flushed
    assert stream.write("y") == 1
    stream.flush()
