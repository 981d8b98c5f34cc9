"""Reward functions, and their weighted sum."""

import sys
from typing import Any

import pytest

import rewards
from engine.data.examples import PromptRow
from engine.run.reward_functions import RewardFunctions
from rewards import REWARDS, exact_match, last_number, length, number_match, regular_expression, valid_json
from utils import UserError

ROW = PromptRow("Human: How long is it?", {"answer": "2 hours"})


def scorer(*names: str, **settings: Any) -> RewardFunctions:
    return RewardFunctions(names, **{"options": {}, "on_bad_reward": "raise", **settings})


def test_the_embedded_ground_truth():
    assert REWARDS["films"]("", "nonsense", {}) == -1


@pytest.mark.parametrize(("response", "reward"), [(" 2 hours\n", 1), ("2 hour", 0), ("", 0)])
def test_exact_match(response, reward):
    assert exact_match("", response, ROW.columns) == reward


@pytest.mark.parametrize(
    ("text", "number"),
    [("1 or 2", 2), ("#### 1,234.50", 1234.5), ("-3", -3), ("it is .5.", 0.5), ("none", None), ("3.", 3)],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(("response", "reward"), [("1 + 1 = 2", 1), ("2 or 3", 0), ("two", 0)])
def test_number_match(response, reward):
    assert number_match("", response, ROW.columns) == reward
    assert number_match("", response, {"answer": "two"}) is None


def test_regular_expression():
    assert regular_expression("", "<think>\n</think>7", {}, pattern=r"<think>.*</think>\d") == 1
    assert regular_expression("", "7 apples", {}, pattern=r"\d") == 0  # the whole response
    assert regular_expression("", "7", {"pattern": r"\d"}) == 1


@pytest.mark.parametrize(("response", "reward"), [("", 0), ("a", 1), ("aaa", 1), ("aaaa", 0)])
def test_length(response, reward):
    assert length("", response, {}, least=1, most=3) == reward


@pytest.mark.parametrize(("response", "reward"), [('{"a": 1}', 1), ("[1, 2]", 1), ("{a: 1}", 0), ("[" * 10**5, 0)])
def test_json(response, reward):
    assert valid_json("", response, {}) == reward


def test_a_json_schema_needs_a_package(monkeypatch):
    class Validator:
        def __init__(self, schema: dict[str, Any]):
            self.schema = schema

        def is_valid(self, value: Any) -> bool:
            return self.schema == {"type": "object"} and isinstance(value, dict)

    class Package:
        class validators:
            validator_for = staticmethod(lambda schema: Validator)

    monkeypatch.setitem(sys.modules, "jsonschema", Package)
    for schema in ({"type": "object"}, '{"type": "object"}'):
        assert [valid_json("", text, {"schema": schema}) for text in ("{}", "[]")] == [1, 0]
    monkeypatch.setitem(sys.modules, "jsonschema", None)  # not installed
    with pytest.raises(UserError, match="valid_json failed with ModuleNotFoundError"):
        scorer("valid_json")(PromptRow("", {"schema": "{}"}), "{}")


@pytest.mark.parametrize("name", rewards.COLUMNS)
def test_a_reward_reads_its_columns(name):
    for column in rewards.COLUMNS[name]:
        with pytest.raises(KeyError, match=column):
            REWARDS[name]("", "text", {other: "1" for other in rewards.COLUMNS[name] if other != column})


def test_packages_are_of_known_rewards():
    assert rewards.PACKAGES.keys() <= REWARDS.keys()


def test_weights_clip_and_options():
    score = scorer("length", "exact_match", weights=[2, -0.5], options={"length": {"most": 10}})(ROW, "2 hours")
    assert score.total == 1.5
    assert score.parts == {"length": 1, "exact_match": 1}
    assert scorer("length", "exact_match", weights=[2, -0.5], clip=1.2)(ROW, "2 hours").total == 1.2
    assert scorer("length", weights=[-3], clip=1)(ROW, "2 hours").total == -1


def test_none_leaves_a_response_out(monkeypatch):
    monkeypatch.setitem(REWARDS, "none", lambda prompt, response, row: None)
    score = scorer("none", "length")(ROW, "a")
    assert score.total is None
    assert score.parts == {"none": None, "length": 1}


def broken(prompt: str, response: str, row: rewards.Row) -> float:
    raise OSError("the judge is away")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (broken, r"OSError \(the judge is away\)"),
        (lambda prompt, response, row: float("nan"), r"ValueError \(it returned nan\)"),
        (lambda prompt, response, row: "high", r"ValueError \(could not convert string to float: 'high'\)"),
        (lambda prompt, response, row: row["gold"], r"KeyError \(the row has no column 'gold'\)"),
    ],
)
def test_a_bad_reward(monkeypatch, function, reason):
    monkeypatch.setitem(REWARDS, "bad", function)
    with pytest.raises(UserError, match=rf"error\[DATA\] rewards: bad failed with {reason}.*How long is it\?"):
        scorer("bad")(ROW, "a")
    dropping = scorer("bad", on_bad_reward="drop")
    assert dropping(ROW, "a").total is None
    assert dropping.num_dropped == 1
