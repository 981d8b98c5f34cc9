"""Report of runs as a web page: python report.py RUN [RUN ...] (see docs/report.md)."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from engine.settings.options import Options, run_command
from engine.settings.value_types import PossiblePath
from utils import UserError


class ReportOptions(Options):
    to: PossiblePath | None = Field(None, description="the file; null: report.html in the run, or here for several")
    png: bool = Field(False, description="also write PNG and SVG of each chart, into a directory charts beside it")


KEYS = {*ReportOptions.model_fields}


def report(options: ReportOptions, runs: Sequence[str]) -> None:
    """Write the report of one run, or compare several."""
    from engine.report.writing import PAGE, write_report

    if not runs:
        raise UserError("CONFIG", "no run is named", "give the directories of runs: python report.py RUN [RUN ...]")
    directories = [Path(run).expanduser() for run in runs]
    page = Path(PAGE) if len(runs) > 1 else directories[0] / PAGE
    if options.to is not None:
        page = Path(options.to).expanduser()
    try:
        write_report(directories, page, with_pictures=options.png)
    except OSError as error:
        raise UserError("STORAGE", f"to: {page} cannot be written ({error.strerror})", "give another file") from error
    print(f"report: {page}")


def is_run(argument: str) -> bool:
    """Whether an argument is a run, not an option. Directories may have names such as lr=0.1."""
    key, is_option, _ = argument.removeprefix("--").partition("=")
    if key in KEYS and (is_option or argument.startswith("--")):
        return False
    return os.path.isdir(argument) or not (is_option or argument.startswith("-"))


def main() -> int:
    arguments = sys.argv[1:]
    # An option may be written --to FILE, as for the other commands.
    values = {place + 1 for place, argument in enumerate(arguments) if argument in {f"--{key}" for key in KEYS}}
    runs = [argument for place, argument in enumerate(arguments) if place not in values and is_run(argument)]
    options = [argument for place, argument in enumerate(arguments) if place in values or not is_run(argument)]
    usage = "python report.py RUN [RUN ...] [key=value ...]: a page about a run, or about several beside each other"
    return run_command(lambda parsed: report(parsed, runs), usage, ReportOptions, options)


if __name__ == "__main__":
    sys.exit(main())
