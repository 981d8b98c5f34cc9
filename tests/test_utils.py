"""Helpers: prefetching, and reachable addresses."""

import threading
from collections.abc import Iterator

import pytest

from utils import is_reachable, prefetch


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
