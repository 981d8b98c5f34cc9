"""Evaluate models: score a file with a reward model, see docs/reward.md. Each mode has options of its own.

python evaluate.py model=RUN data=FILE to=SCORES.jsonl
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.export.score_command import ScoreOptions, score_file
from engine.settings.options import Options, help_text, run_command


@dataclass(frozen=True)
class Mode:
    """A use of this command.

    Args:
        key: chooses the mode: the first mode of MODES with its key on the command line.
        usage: first line of its help.
        options: of the mode.
        function: runs it.
    """

    key: str
    usage: str
    options: type[Options]
    function: Callable[[Any], None]


def score(options: ScoreOptions) -> None:
    from preference_datasets import chat_form  # takes seconds

    score_file(options, chat_form)


# The last one is that of a command line without any of the keys.
MODES = (
    Mode(
        "data",
        "python evaluate.py model=RUN data=FILE to=SCORES.jsonl [key=value ...]: score responses",
        ScoreOptions,
        score,
    ),
)


def choose_mode(arguments: Sequence[str]) -> Mode:
    """The mode of a command line."""
    keys = keys_in(arguments)
    return next((mode for mode in MODES if mode.key in keys), MODES[-1])


def keys_in(arguments: Sequence[str]) -> list[str]:
    return [argument.removeprefix("--").partition("=")[0] for argument in arguments]


def main() -> int:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print("\n\n".join(help_text(mode.usage, mode.options) for mode in MODES))
        return 0
    mode = choose_mode(arguments)
    return run_command(mode.function, mode.usage, mode.options, arguments)


if __name__ == "__main__":
    sys.exit(main())
