"""Rewards for online training: functions of a prompt and a sampled response, and REWARDS, the table for `rewards`.

A reward is f(prompt, response, row) -> float. None leaves the response out of training, and of its group's baseline.
To add one: a function here, a line in REWARDS, and a test. Its keyword arguments are options: `reward_options` sets
them, as in reward_options.length.most=200.

Args of every function:
    prompt: the text before the response.
    response: the sampled text, without special tokens.
    row: the columns of the prompt's row, such as `answer`. Empty for named data sets.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Reward = Callable[..., float | None]

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def films(prompt: str, response: str, row: Row) -> float:
    """Praise in responses about the embedded films, from -1 to 1; -1 for another form than the data's."""
    from engine.data.films import film_reward  # the engine reads this file

    return film_reward(response)


def exact_match(prompt: str, response: str, row: Row) -> float:
    """1 if the response equals the column `answer`, white space around them aside; else 0."""
    return float(response.strip() == str(row["answer"]).strip())


def number_match(prompt: str, response: str, row: Row) -> float | None:
    """1 if the last number of the response equals the last of the column `answer`, else 0.

    "1,234.50" equals "1234.5". None for an answer without a number.
    """
    expected, found = last_number(str(row["answer"])), last_number(response)
    return None if expected is None else float(found == expected)


def last_number(text: str) -> float | None:
    """The last number in a text; None without one."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def regular_expression(prompt: str, response: str, row: Row, *, pattern: str | None = None) -> float:
    """1 if a pattern matches the whole response, else 0.

    Args:
        pattern: a regular expression; "." matches line ends too. None for the column `pattern`.
    """
    return float(re.fullmatch(row["pattern"] if pattern is None else pattern, response, re.DOTALL) is not None)


def length(prompt: str, response: str, row: Row, *, least: int = 1, most: int = 1000) -> float:
    """1 if the response has least to most characters, else 0."""
    return float(least <= len(response) <= most)


def valid_json(prompt: str, response: str, row: Row) -> float:
    """1 if the response is JSON, and fits the JSON schema of the column `schema` if there is one; else 0.

    A schema needs the package jsonschema.
    """
    try:
        value = json.loads(response)
    except (ValueError, RecursionError):
        return 0.0
    schema = row.get("schema")
    if schema is None:
        return 1.0
    import jsonschema  # an optional package

    schema = json.loads(schema) if isinstance(schema, str) else schema
    return float(jsonschema.validators.validator_for(schema)(schema).is_valid(value))


REWARDS: dict[str, Reward] = {
    "films": films,
    "exact_match": exact_match,
    "number_match": number_match,
    "regular_expression": regular_expression,
    "length": length,
    "valid_json": valid_json,
}

# Columns that a reward reads of every row. An option of the same name replaces one. Runs check them at the start.
COLUMNS: dict[str, tuple[str, ...]] = {
    "exact_match": ("answer",),
    "number_match": ("answer",),
    "regular_expression": ("pattern",),
}

# Packages that a reward needs for rows with a column.
PACKAGES: dict[str, dict[str, str]] = {"valid_json": {"schema": "jsonschema"}}
