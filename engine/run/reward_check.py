"""Check the rewards of a run before its models are loaded."""

import importlib.util
from collections.abc import Iterable

from engine.data.examples import Example
from engine.settings.schema import Settings
from rewards import COLUMNS, PACKAGES, REWARDS
from utils import UserError, clipped, printable


def check_rewards(settings: Settings, examples: Iterable[Example], has_ground_truth: bool) -> None:
    """Check that the rewards of a run with sampled responses can be computed.

    Args:
        examples: of both splits.
        has_ground_truth: of the data set.

    Raises:
        UserError: CONFIG without rewards or a package; DATA for a row without a column.
    """
    if not settings.loss.is_online:
        return
    if not has_ground_truth and (settings.rewards is None or "ground_truth" in settings.rewards):
        value, datasets = "null" if settings.rewards is None else "ground_truth", ",".join(settings.datasets)
        problem = f"rewards: {value} is the ground truth of the data set, and {datasets} has none"
        raise UserError("CONFIG", problem, f"name some of {', '.join(REWARDS)}, or add your own to rewards.py")
    rows = [example.row for example in examples if example.row is not None]
    for name in settings.rewards or []:
        options = (settings.reward_options or {}).get(name, {})
        for column in COLUMNS.get(name, ()):
            lacking = [row for row in rows if row.columns.get(column) in (None, "", [])]
            is_dropped = settings.on_bad_reward == "drop" and len(lacking) < len(rows)
            if lacking and options.get(column) is None and not is_dropped:
                prompt = clipped(printable(lacking[0].text)[-160:], 160)
                problem = (
                    f"rewards: {name} needs the column {column}, and {len(lacking):,} of {len(rows):,} rows lack it"
                )
                raise UserError("DATA", f"{problem}; the first has the prompt ...{prompt!r}", "add it to these rows")
        for column, package in PACKAGES.get(name, {}).items():
            is_needed = any(row.columns.get(column) is not None for row in rows)
            if is_needed and importlib.util.find_spec(package) is None:
                problem = f"rewards: {name} needs the package {package} for rows with the column {column}"
                raise UserError("CONFIG", problem, f"pip install {package}")
