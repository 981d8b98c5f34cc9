"""Reward functions, and their weighted sum."""

import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest

import rewards
from engine.data.examples import PromptRow
from engine.rewards.samples import samples_of
from engine.run.reward_functions import RewardFunctions, Score, build_scoring
from rewards import (
    REWARDS,
    BatchReward,
    EngineReward,
    Sample,
    exact_match,
    last_number,
    length,
    number_match,
    regular_expression,
    valid_json,
)
from tests.configs import make_settings
from utils import UserError

ROW = PromptRow("Human: How long is it?", {"answer": "2 hours"})


def no_engine(chosen: EngineReward) -> Any:
    raise AssertionError(chosen)


def scorer(
    *names: str, options: Any = None, timeout: float | None = None, on_bad_reward: Any = "raise", **settings: Any
) -> RewardFunctions:
    scorings = {name: build_scoring(name, (options or {}).get(name, {}), timeout, no_engine) for name in names}
    return RewardFunctions(scorings, on_bad_reward=on_bad_reward, **settings)


def score(functions: RewardFunctions, response: str, row: PromptRow = ROW) -> Score:
    (found,) = functions(samples_of(row, [(response, False)]))
    return found


@pytest.mark.parametrize(("response", "reward"), [(" 2 hours\n", 1), ("2 hour", 0), ("", 0)])
def test_exact_match(response, reward):
    assert exact_match("", response, ROW.columns) == reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("1 or 2", 2), ("#### 1,234.50", 1234.5), ("-3", -3), ("it is .5.", 0.5), ("none", None), ("3.", 3)],
        *[("(2,3)", 3), ("10-12", 12), ("1e3", 1000), ("1,234,567", 1234567), ("1,23", 23), ("\N{MINUS SIGN}2", -2)],
        *[("-1.5e-3", -0.0015), ("1e999", None), ("GPT-4", 4), ("1.2.3", 3)],
    ],
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


@pytest.mark.parametrize(
    ("response", "reward"),
    [('{"a": 1}', 1), ("[1, 2]", 1), ("{a: 1}", 0), ("[" * 10**5, 0), ("NaN", 0), ("[-Infinity]", 0)],
)
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
        score(scorer("valid_json"), "{}", PromptRow("", {"schema": "{}"}))


@pytest.mark.parametrize("name", [name for name in rewards.COLUMNS if not isinstance(REWARDS[name], type)])
def test_a_reward_reads_its_columns(name):
    function: Any = REWARDS[name]
    for column in rewards.COLUMNS[name]:
        with pytest.raises(KeyError, match=column):
            function("", "text", {other: "1" for other in rewards.COLUMNS[name] if other != column})


def test_packages_are_of_known_rewards():
    assert rewards.PACKAGES.keys() <= REWARDS.keys()


def test_weights_clip_and_options():
    weighted = scorer("length", "exact_match", weights=[2, -0.5], options={"length": {"most": 10}})
    assert score(weighted, "2 hours") == Score(1.5, {"length": 1, "exact_match": 1})
    assert score(weighted, "2 hours and more").total == 0
    assert score(scorer("length", "exact_match", weights=[2, -0.5], clip=1.2), "2 hours").total == 1.2
    assert score(scorer("length", weights=[-3], clip=1), "2 hours").total == -1


def test_none_leaves_a_response_out(monkeypatch):
    monkeypatch.setitem(REWARDS, "none", lambda prompt, response, row: None)
    assert score(scorer("none", "length"), "a") == Score(None, {"none": None, "length": 1})


def broken(prompt: str, response: str, row: rewards.Row) -> float:
    raise OSError("the judge is away")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (broken, r"OSError \(the judge is away\)"),
        (lambda prompt, response, row: float("nan"), r"ValueError \(it returned nan\)"),
        (lambda prompt, response, row: "high", r"ValueError \(could not convert string to float: 'high'\)"),
        (lambda prompt, response, row: row["gold"], r"MissingColumn \(the row has no column 'gold'\)"),
        (lambda prompt, response, row: dict[str, float]()["gold"], r"KeyError \('gold'\)"),  # the function's own
    ],
)
def test_a_bad_reward(monkeypatch, function, reason):
    monkeypatch.setitem(REWARDS, "bad", function)
    with pytest.raises(UserError, match=rf"error\[DATA\] rewards: bad failed with {reason}.*How long is it\?"):
        score(scorer("bad"), "a")
    dropping = scorer("bad", on_bad_reward="drop")
    assert score(dropping, "a").total is None
    assert dropping.num_dropped == 1


def never(prompt: str, response: str, row: rewards.Row) -> float:
    while True:
        with suppress(Exception):  # a function that catches all it can
            time.sleep(0.01)


def slow_expression(prompt: str, response: str, row: rewards.Row) -> float:
    return float(re.fullmatch("(a*)*b", "a" * 40) is not None)  # takes hours


@pytest.mark.parametrize("function", [never, slow_expression])
def test_a_reward_that_takes_too_long(monkeypatch, function):
    monkeypatch.setitem(REWARDS, "slow", function)
    problem = r"rewards: slow failed with TimeoutError \(it took more than 0.5 s\) for the prompt.*How long is it\?"
    with pytest.raises(UserError, match=problem):
        score(scorer("slow", timeout=0.5), "a")
    dropping = scorer("slow", "length", timeout=0.5, on_bad_reward="drop")
    assert score(dropping, "a") == Score(None, {"slow": None, "length": 1})
    assert dropping.num_dropped == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


class Share(BatchReward):
    """The share of a response in the characters of all of them."""

    def __init__(self, *, scale: float = 1.0):
        self._scale, self.sizes = scale, list[int]()

    def __call__(self, samples: Sequence[Sample]) -> list[float | Exception | None]:
        self.sizes.append(len(samples))
        assert all(sample.prompt == ROW.text and sample.row == ROW.columns for sample in samples)
        total = sum(len(sample.response) for sample in samples)
        return [
            None
            if sample.is_truncated
            else OSError("away")
            if not sample.response
            else self._scale * len(sample.response) / total
            for sample in samples
        ]


def test_a_batched_reward_gets_all_responses_in_one_call(monkeypatch):
    monkeypatch.setitem(REWARDS, "share", Share)
    samples = samples_of(ROW, [("a", False), ("bbb", False), ("", False), ("cccc", True)])
    dropping = scorer("share", "length", options={"share": {"scale": 8}}, on_bad_reward="drop", weights=[1, 10])
    assert [each.total for each in dropping(samples)] == [11, 13, None, None]
    assert dropping.num_dropped == 1  # the failure, not the None
    with pytest.raises(UserError, match=r"share failed with OSError \(away\)"):
        scorer("share")(samples)
    assert scorer("share")([]) == []


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_batched_reward_that_fails_as_a_whole(monkeypatch, is_slow):
    class Broken(Share):
        def __call__(self, samples: Sequence[Sample]) -> list[float | Exception | None]:
            return [never("", "", {})] if is_slow else [1.0]  # one for three

    monkeypatch.setitem(REWARDS, "broken", Broken)
    samples = samples_of(ROW, [("a", False)] * 3)
    problem = r"TimeoutError \(it took more than 0.6 s" if is_slow else r"ValueError \(zip"
    with pytest.raises(UserError, match=rf"broken failed with {problem}.*How long is it.*and [12] other responses"):
        scorer("broken", timeout=0.2)(samples)
    dropping = scorer("broken", timeout=0.2, on_bad_reward="drop")
    assert [each.total for each in dropping(samples)] == [None if is_slow else 1, None, None]
    assert dropping.num_dropped == 2 + is_slow


def test_a_batched_reward_of_too_many_values(monkeypatch):
    class Long(Share):
        def __call__(self, samples: Sequence[Sample]) -> list[float | Exception | None]:
            return [1.0] * (len(samples) + 2)

    monkeypatch.setitem(REWARDS, "long", Long)
    samples = samples_of(ROW, [("a", False)] * 3)
    with pytest.raises(UserError, match=r"long failed with ValueError \(it returned 5 rewards for 3 responses\)"):
        scorer("long")(samples)
    dropping = scorer("long", on_bad_reward="drop")
    assert [each.total for each in dropping(samples)] == [None] * 3
    assert dropping.num_dropped == 3


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("judge", "{model:m}", "reward_options: lack judge.url"),
        ("judge", "{model:m,url:'http://x',retries:-1}", "reward_options: judge.retries must be"),
        ("judge", "{model:m,url:'http://x',extra:[1]}", "reward_options: judge.extra must be"),
        ("reward_model", "{}", "reward_options: lack reward_model.path"),
        ("reward_model", "{path:x,normalize:so}", "reward_options: reward_model.normalize must be"),
        ("python_tests", "{memory_mb:1}", "reward_options: python_tests.memory_mb must be"),
        ("python_tests", "{colour:1}", "reward_options: give python_tests colour, and it takes seconds, memory_mb"),
        ("ground_truth", "{a:1}", "reward_options: give ground_truth a, and it takes none"),
        ("share", "{scale:so}", "reward_options: share.scale must be"),
    ],
)
def test_options_of_classes_are_checked(monkeypatch, name, options, problem):
    monkeypatch.setitem(REWARDS, "share", Share)
    with pytest.raises(UserError, match=re.escape(problem)):
        make_settings("loss=grpo", f"rewards=[{name}]", f"reward_options={{{name}:{options}}}")
