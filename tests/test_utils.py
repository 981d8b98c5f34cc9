"""Helpers: what is made ahead of its use."""

import threading
from collections.abc import Iterator

import pytest

from utils import ahead, is_reachable


def test_items_ahead_are_the_items_in_order() -> None:
    assert list(ahead(range(5))) == [0, 1, 2, 3, 4]
    assert list(ahead([None, None])) == [None, None]
    assert list(ahead([])) == []


def test_one_item_is_made_while_the_one_before_is_used_and_no_more() -> None:
    made = [threading.Event() for _ in range(4)]

    def source() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    items = ahead(source())
    assert not made[0].is_set()  # nothing before it is asked for
    for number in range(3):
        assert next(items) == number
        assert made[number + 1].wait(timeout=60)
        assert not any(event.is_set() for event in made[number + 2 :])


def test_what_the_source_raises_comes_after_the_items_before() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken"):
        next(items)


def test_no_thread_is_left_when_the_rest_is_not_wanted() -> None:
    before = threading.active_count()
    items = iter(ahead(range(5)))
    next(items)
    assert threading.active_count() == before + 1
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("url", ["http://x:abc", "http://[::1", "http://127.0.0.1:99999", "http://127.0.0.1:9"])
def test_what_is_no_address_is_not_reachable(url: str) -> None:
    assert not is_reachable(url)
