"""Look at data before training: python inspect_data.py datasets=mine.jsonl loss=dpo (see docs/inspect.md)."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pydantic import Field

from engine.models.hub import prepare_hub
from engine.run.run_dir import derive_names
from engine.settings.composing import compose_overrides
from engine.settings.hydra_errors import explain_hydra_error
from engine.settings.options import Options, keys_of, run_command
from engine.settings.reading import read_settings
from engine.settings.schema import Settings
from engine.settings.secrets import redact
from engine.settings.unused import check_unused
from engine.settings.value_types import CountOrZero, ExistingFile, PossiblePath
from utils import UserError

if TYPE_CHECKING:  # it takes seconds to import
    from engine.inspect.inspection import Inspection
    from engine.inspect.terminal import Terminal


class InspectOptions(Options):
    page: PossiblePath | None = Field(None, description="also write the report as a web page, to this file")
    examples: CountOrZero = Field(3, description="training examples to show token by token")
    contamination: ExistingFile | None = Field(
        None, description="a benchmark to look for in the data: a file of rows, or a text file"
    )
    near_duplicates: bool | None = Field(None, description="look for near-duplicate prompts; null: up to 50,000 rows")


def inspect_data(options: InspectOptions, overrides: Sequence[str]) -> None:
    """Load the data as train.py does, print the report, and write the page."""
    from engine.inspect.page import check_page, write_page
    from engine.inspect.terminal import format_inspection

    page = None if options.page is None else Path(options.page)
    if page is not None:
        check_page(page)
    settings = read_overrides(overrides)
    prepare_hub(settings)
    inspection = run_inspection(settings, options)
    print(format_inspection(inspection, terminal_of(sys.stdout)))
    if page is not None:
        write_page(inspection, page)
        print(f"\npage: {page}")


def read_overrides(overrides: Sequence[str]) -> Settings:
    """The settings of train.py with these overrides, and names of directories.

    Raises:
        UserError: CONFIG, with every problem.
    """
    from preference_datasets import DATASETS

    try:
        config = compose_overrides(overrides)
        settings = read_settings(config, DATASETS)
        has_experiment = any(override.lstrip("+").startswith("experiment=") for override in overrides)
        for warning in check_unused(settings, DATASETS, has_experiment):
            print(redact(warning, config), flush=True)
    except Exception as error:
        problem = explain_hydra_error(error)
        raise UserError(problem.code, redact(problem.what), redact(problem.fix)) from error
    return settings.named(**derive_names(settings))


def run_inspection(settings: Settings, options: InspectOptions) -> "Inspection":
    """Load the tokenizer and the data, and run every check."""
    import transformers

    from engine.data.examples import Observe
    from engine.data.preferences import SplitName
    from engine.data.rows import RowCounts
    from engine.inspect.collecting import collect, short_names
    from engine.inspect.inspection import inspect
    from engine.models.tokenizers import load_tokenizer
    from losses import LOSSES
    from preference_datasets import DATASETS, load_split

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    batch = LOSSES[settings.loss.name].batch
    if batch == "tokens":
        problem = f"loss: {settings.loss.name} learns text, and this command inspects prompts and responses"
        raise UserError("CONFIG", problem, "choose the loss of a later stage; train.py prints the counts of text")
    tokenizer = load_tokenizer(settings.model)

    def load(one: Settings, split: SplitName, counts: RowCounts, observe: Observe) -> object:
        return load_split(one, tokenizer, split, batch, counts=counts, observe=observe)

    data = collect(settings, tokenizer, batch, load)
    names = zip(settings.datasets, short_names(settings.datasets), strict=True)
    hh = {short for name, short in names if name in DATASETS and DATASETS[name].chat_template == "hh"}
    return inspect(
        data,
        num_examples=options.examples,
        benchmark=None if options.contamination is None else Path(options.contamination),
        checks_near_duplicates=options.near_duplicates,
        hh_datasets=frozenset(hh),
    )


def terminal_of(stream: TextIO) -> "Terminal":
    """How to write to a stream: colour and the full width for a terminal, else 80 plain columns."""
    from engine.inspect.terminal import Terminal

    is_terminal = stream.isatty()
    has_colour = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    width = min(max(shutil.get_terminal_size().columns, 60), 120) if is_terminal else 80
    return Terminal(width, has_colour, has_unicode=(stream.encoding or "").lower().replace("-", "") == "utf8")


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of this command, and overrides of train.py."""
    own = {*keys_of(InspectOptions)}
    is_own = [argument.removeprefix("--").partition("=")[0] in own | {"help", "-h"} for argument in arguments]
    mine = [argument for argument, here in zip(arguments, is_own, strict=True) if here]
    return mine, [argument for argument, here in zip(arguments, is_own, strict=True) if not here]


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    own, overrides = split_options(sys.argv[1:])
    usage = (
        "python inspect_data.py [key=value ...]: look at data before training. It takes every key of train.py, such as"
        " datasets=mine.jsonl loss=dpo (python train.py --help lists them), and these:"
    )
    return run_command(lambda options: inspect_data(options, overrides), usage, InspectOptions, own)


if __name__ == "__main__":
    sys.exit(main())
