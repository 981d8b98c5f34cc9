"""Descriptions of annotations, and checks of values."""

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt

from engine.settings.annotations import Hint, Words, WrongValue, accepts, checked, describe


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (int, "an integer"),
        (float, "a number"),
        (str, "text"),
        (Any, "anything"),
        (Annotated[int, Ge(1)], "an integer of at least 1"),
        (Annotated[float, Gt(0), Le(1)], "a number above 0 and at most 1"),
        (Annotated[float, Ge(0), Lt(0.5)] | None, "null or a number of at least 0 and below 0.5"),
        (Literal["a"], "a"),
        (Literal["a", "b", "c"], "a, b or c"),
        (Literal["a"] | Literal["b"] | None, "null or a or b"),
        (Literal["auto"] | Annotated[int, Ge(0)], "auto or an integer of at least 0"),
        (list[float], "a list, each a number"),
        (dict[str, int], "a mapping"),
        (Annotated[str, Words("a path")] | None, "null or a path"),
    ],
)
def test_describe(annotation, words):
    assert describe(annotation) == words


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (bool, 1),
        (int, True),
        (int, 1.0),
        (int, "1"),
        (float, True),
        (float, "1"),
        (float, float("nan")),
        (float, float("inf")),
        (str, 1),
        (Literal["1"], 1),
        (list[str], ("a",)),
        (list[str], ["a", None]),
    ],
)
def test_values_are_not_converted(annotation, value):
    assert not accepts(annotation, value)


def test_an_integer_is_a_number():
    assert checked(float, 1) == 1


def test_the_message_has_the_words_the_value_and_a_hint():
    with pytest.raises(WrongValue, match=r'must be null or adam or sgd, not "sdg" \(did you mean sgd\?\)'):
        checked(Literal["adam", "sgd"] | None, "sdg")
    with pytest.raises(WrongValue, match=r"must be an integer, not null \(a hint\)"):
        checked(Annotated[int, Hint(lambda value: "a hint")], None)
