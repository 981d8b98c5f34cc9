"""Score the rows of a file with a reward model: a mode of evaluate.py."""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import Field

from engine.models.hub import settle_network
from engine.settings.choices import RowForm
from engine.settings.options import Options
from engine.settings.value_types import ChatTemplate, Count, PossiblePath
from utils import Progress, StopRequest, UserError, content_hash

if TYPE_CHECKING:  # it takes seconds to import
    from engine.data.chat import Chat
    from engine.export.rows_to_score import RowReader, RowSurvey
    from engine.export.run_record import RunRecord
    from engine.export.score_file import ScoreFile
    from engine.export.scoring import Scorer

ROWS_PER_BATCH = 64

ChatForm = Callable[[Sequence[str]], str | None]


class ScoreOptions(Options):
    """Options of scoring a file with a reward model."""

    model: PossiblePath = Field(description="a run, checkpoint, adapter, exported directory, or a name on the hub")
    data: PossiblePath = Field(description="rows of any form: .json, .jsonl or .csv, also .gz, .parquet or .arrow")
    to: PossiblePath = Field(description="the JSON lines to write, one a row; a stopped command continues")
    format: RowForm | None = Field(
        None,
        description="the form of the rows; messages writes plain text by the chat template, strings leaves it as it "
        "is; null: inferred, and messages for RewardBench",
    )
    chat_template: ChatTemplate | None = Field(
        None, description="hh, llama2, chatml or a Jinja file; null: the run's, else the tokenizer's own"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="a malformed row ends the command before scoring (error), or is dropped and counted (drop)"
    )
    normalize: bool = Field(False, description="subtract reward_mean of config.json, and divide by reward_std")
    max_length: Count | None = Field(None, description="tokens of prompt and response; null: the run's")
    max_prompt_length: Count | None = Field(
        None, description="tokens kept of a prompt that is too long; null: the run's"
    )
    batching: Literal["packed", "padded"] = Field("packed", description="padded is for models that packed refuses")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="of the weights; null: as stored")
    base: PossiblePath | None = Field(None, description="a base model, in place of the one in the adapter's config")


def score_file(options: ScoreOptions, chat_form: ChatForm) -> None:
    """Score all rows, and print the results.

    Args:
        chat_form: names of data sets -> their common chat template.
    """
    target, data = Path(options.to).expanduser(), Path(options.data).expanduser()
    if target.exists():
        raise UserError("CONFIG", f"to: {target} exists", "give another file, or remove it")
    if not data.is_file():
        raise UserError("DATA", f"data: {data} is not a file", "give a file of rows")
    settle_network([options.model, options.base])

    from engine.export.rows_to_score import RowReader
    from engine.export.run_record import RunRecord, read_run
    from engine.export.saved_models import find_saved
    from engine.export.score_file import ScoreFile

    directory = find_saved(options.model)
    record = RunRecord() if directory is None else read_run(directory, chat_form)
    identity = identity_of(options, data, directory, record)
    with StopRequest(first=stop), ScoreFile(target, identity, ROWS_PER_BATCH) as file:
        scorer, chat = load(options, record)
        reader = RowReader(data, options.format, chat, options.on_bad_row)
        survey = reader.survey()
        check_rows(survey, data)
        print_notes(survey, reader, data)
        score_rows(reader, survey, scorer, file)
        file.finish()
    print_results(file.lines, survey, scorer.max_length, target)


def stop(number: int) -> NoReturn:
    """End the command by a signal. Scored batches are in the partial file."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    raise SystemExit(128 + number)


def identity_of(options: ScoreOptions, data: Path, directory: Path | None, record: "RunRecord") -> str:
    """A hash of what decides the scores: data, options, chat template, and files of the model and of its base."""
    from engine.data.chat_templates import template_to_record
    from engine.models.archives import ADAPTER_CONFIG, find_base_model
    from engine.models.records import AdapterConfig, read_record

    folders = [] if directory is None else [directory]
    if directory is not None and (directory / ADAPTER_CONFIG).is_file():
        config = read_record(AdapterConfig, directory / ADAPTER_CONFIG, "adapter", "give another adapter")
        name = options.base or config.get("base_model_name_or_path")
        base = find_base_model(directory, name) if name else None  # load_saved() explains a missing name
        folders += [] if base is None else [base]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    options_text = options.model_dump_json() + (template_to_record(options.chat_template) or "")
    return content_hash([options_text, repr(record), *map(file_facts, [data, *files])])


def file_facts(path: Path) -> tuple[str, int, int]:
    """Path, size and time of a file, to notice a change."""
    facts = path.stat()
    return str(path.resolve()), facts.st_size, facts.st_mtime_ns


def load(options: ScoreOptions, record: "RunRecord") -> "tuple[Scorer, Chat]":
    """Load the model; returns a scorer, and the writer of messages."""
    import torch
    import transformers

    from engine.export.dialogues import chat_of
    from engine.export.scoring import open_reward_model

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    scorer = open_reward_model(
        options.model,
        record,
        layout=options.batching,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        dtype=options.dtype and getattr(torch, options.dtype),
        base=options.base,
    )
    if options.normalize:
        fix = "give a checkpoint saved after an evaluation, such as the last of a run, or leave normalize out"
        scorer.normalize("normalize", options.model, fix)
    return scorer, chat_of(scorer.tokenizer, record, options.chat_template, sft_turns="last")


def check_rows(survey: "RowSurvey", data: Path) -> None:
    """Refuse a file without a row to score."""
    if not survey.num_rows:
        raise UserError("DATA", f"data: {data} has no rows", "give a file of rows")
    if survey.dropped.total() == survey.num_rows:
        problem = f"data: no row of {data} can be scored ({describe_dropped(survey)})"
        raise UserError("DATA", problem, "correct the rows")


def score_rows(reader: "RowReader", survey: "RowSurvey", scorer: "Scorer", file: "ScoreFile") -> None:
    """Score the rows that the file lacks, a batch at a time.

    Raises:
        UserError: NONFINITE for a score that is NaN or Inf.
    """
    from engine.export.scoring import scored_row

    rows = iter(reader)
    with Progress("scoring", total=survey.num_rows, unit="rows") as progress:
        progress.update(sum(1 for _ in islice(rows, len(file.lines))))
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            scores = iter(scorer.score_rows([row.parsed for row in batch if not isinstance(row.parsed, str)]))
            lines = [scored_row(row, None if isinstance(row.parsed, str) else next(scores)) for row in batch]
            for line in lines:
                if not all(map(math.isfinite, line.get("scores", []))):
                    problem = f"model: a score of row {line['row']} is NaN or Inf"
                    raise UserError("NONFINITE", problem, "dtype=float32 has a wider range; else give another model")
            file.add(lines)
            progress.update(len(batch))


# ---- Printing ----


def print_notes(survey: "RowSurvey", reader: "RowReader", data: Path) -> None:
    """Tell which rows the chat template writes, where users may expect otherwise."""
    if survey.num_benchmark_messages:
        rows = f"rows of RewardBench ({survey.num_benchmark_messages:,}) are"
        print(f"note: {rows} written by the chat template (format=strings scores their text as it is)", flush=True)
    if reader.has_template and survey.num_plain_text:
        rows = f"{survey.num_plain_text:,} of {survey.num_rows:,} rows of {data} are plain text"
        advice = "(format=messages applies it to prompt with chosen and rejected, or completion)"
        print(f"note: {rows}, scored as they are, without the chat template {advice}", flush=True)
    elif survey.num_benchmark_plain:
        rows = f"rows of RewardBench ({survey.num_benchmark_plain:,}) are"
        problem = "scored as plain text, as the tokenizer has no chat template"
        print(f"note: {rows} {problem} (chat_template=chatml, llama2, hh or a Jinja file writes them)", flush=True)


def describe_dropped(survey: "RowSurvey") -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in survey.dropped.items())
    first = survey.first_bad_row and f"; the first malformed row: {survey.first_bad_row}"
    return f"dropped: {reasons}{first}"


def print_results(lines: list[dict[str, Any]], survey: "RowSurvey", max_length: int, target: Path) -> None:
    """Print numbers of rows, then results by subset, section and benchmark."""
    from engine.export.reward_bench import results_of

    num_dropped = survey.dropped.total()
    print(f"{survey.num_rows - num_dropped:,} rows scored, {num_dropped:,} dropped: {target}")
    if num_dropped:
        print(f"  {describe_dropped(survey)}")
    num_prompts = sum("prompt_is_truncated" in line for line in lines)
    num_responses = sum(len(line.get("truncated_responses", [])) for line in lines)
    if num_prompts or num_responses:
        print(f"  truncated to max_length={max_length}: {num_prompts:,} prompts, {num_responses:,} responses")
    if num_responses:
        print("  a truncated response is scored before its end")
    scores = [score for line in lines for score in line.get("scores", [])]
    print(f"  scores of {len(scores):,} responses: mean {fmean(scores):.4f}, standard deviation {pstdev(scores):.4f}")
    results = results_of(lines)
    if not results:
        print("  no row has a preference, so there is no accuracy")
    for line in result_lines(results):
        print(line)


def result_lines(results: dict[str, list[Any]]) -> Iterator[str]:
    """A table of results."""
    for heading, of_heading in results.items():
        yield f"{heading:<36}  {'rows':>7}  accuracy"
        yield from (f"  {name:<34}  {num_rows:>7,}  {score:.4f}" for name, score, num_rows in of_heading)
