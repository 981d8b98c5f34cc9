"""Evaluate models. Each mode has options of its own; see docs/evaluate.md.

python evaluate.py model=RUN against=OTHER judge=JUDGE
python evaluate.py model=RUN tasks=TASKS
python evaluate.py model=RUN data=FILE to=SCORES.jsonl
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from engine.export.benchmark_command import BenchmarkOptions, run_benchmarks
from engine.export.score_command import ScoreOptions, score_file
from engine.rewards.judge_command import JudgeOptions, Project, judge_models
from engine.settings.options import Options, asks_for_help, help_text, print_help, run_command
from utils import UserError

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerBase

    from engine.data.examples import Example
    from engine.settings.schema import Settings


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


def benchmark(options: BenchmarkOptions) -> None:
    from preference_datasets import chat_form

    run_benchmarks(options, chat_form)


def judge(options: JudgeOptions) -> None:
    from preference_datasets import DATASETS, chat_form, ground_truth_reward

    judge_models(options, Project(settings_of, load_prompts, ground_truth_reward, chat_form, [*DATASETS]))


def settings_of(keys: dict[str, Any]) -> "Settings":
    """The settings of train.py with other values of some keys, and derived names.

    Raises:
        UserError: CONFIG, with every problem.
    """
    from omegaconf import OmegaConf

    from engine.run.run_dir import derive_names
    from engine.settings.composing import compose_overrides
    from engine.settings.reading import read_settings
    from preference_datasets import DATASETS

    config = compose_overrides(["loss=grpo"])  # it reads prompts from every form of rows
    for key, value in keys.items():
        OmegaConf.update(config, key, value)
    try:
        settings = read_settings(config, DATASETS)
    except UserError as error:
        raise UserError(error.code, error.what, "correct it here, or in the config.yaml of the run") from error
    return settings.named(**derive_names(settings))


def load_prompts(
    settings: "Settings", tokenizer: "PreTrainedTokenizerBase", split: Literal["train", "test"]
) -> "Sequence[Example]":
    """The prompts of a split."""
    from preference_datasets import load_split

    return load_split(settings, tokenizer, split, "rollout").examples


# The last one is that of a command line without any of the keys.
MODES = (
    Mode(
        "against",
        "python evaluate.py model=RUN against=OTHER judge=JUDGE [key=value ...]: judge the responses of two models",
        JudgeOptions,
        judge,
    ),
    Mode(
        "tasks",
        "python evaluate.py model=RUN tasks=TASKS [key=value ...]: run benchmarks of lm-eval",
        BenchmarkOptions,
        benchmark,
    ),
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
    if asks_for_help(arguments):
        return print_help("\n\n".join(help_text(mode.usage, mode.options) for mode in MODES))
    mode = choose_mode(arguments)
    return run_command(mode.function, mode.usage, mode.options, arguments)


if __name__ == "__main__":
    sys.exit(main())
