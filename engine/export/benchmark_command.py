"""Run benchmarks of lm-eval on a saved model: a mode of evaluate.py."""

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from engine.models.hub import settle_network
from engine.settings.messages import bracketed, did_you_mean, nearest
from engine.settings.options import Options
from engine.settings.value_types import ChatTemplate, Count, CountOrZero, Datasets, PossiblePath
from utils import UserError, is_out_of_memory, one_at_a_time, write_atomically

if TYPE_CHECKING:  # they take seconds to import
    from lm_eval.tasks import TaskManager

    from engine.export.run_record import RunRecord
    from engine.export.saved_models import SavedModel

PACKAGE = "lm-eval[hf]==0.4.13"  # not in requirements.txt; tested with this
RESULTS_FILE = "benchmarks.json"  # in a run directory
NUM_UNKNOWN_SHOWN = 3

ChatForm = Callable[[Sequence[str]], str | None]


class BenchmarkOptions(Options):
    """Options of benchmarks."""

    model: PossiblePath = Field(description="a run, checkpoint, adapter, exported directory, or a name on the hub")
    tasks: Datasets = Field(description="tasks of lm-eval and YAML files of tasks: arc_easy, or [arc_easy,mine.yaml]")
    to: PossiblePath | None = Field(
        None, description=f"also add the results to this JSON file; null: to {RESULTS_FILE} in the run"
    )
    num_fewshot: CountOrZero | None = Field(None, description="examples in front of a question; null: by task")
    limit: Count | None = Field(None, description="only the first questions of each task, to try; null: all")
    chat: bool = Field(False, description="write questions as dialogues, by the chat template")
    chat_template: ChatTemplate | None = Field(
        None, description="hh, llama2, chatml or a Jinja file; null: the run's, else the tokenizer's own"
    )
    batch_size: Count = Field(8, description="texts at a time")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="of the weights; null: as stored")
    base: PossiblePath | None = Field(None, description="a base model, in place of the one in the adapter's config")


def run_benchmarks(options: BenchmarkOptions, chat_form: ChatForm) -> None:
    """Run all tasks, print a table, and keep the results.

    Args:
        chat_form: names of data sets -> their common chat template.

    Raises:
        UserError: CONFIG for an unknown task or a missing package, DATA if lm-eval fails.
    """
    if find_spec("lm_eval") is None:
        raise UserError("CONFIG", "tasks: benchmarks need the package lm-eval", f"pip install '{PACKAGE}'")
    files = [name for name in options.tasks if is_file(name)]
    settle_network([options.model, options.base, *(name for name in options.tasks if name not in files)])

    from engine.export.run_record import RunRecord, read_run
    from engine.export.saved_models import find_saved

    directory = find_saved(options.model)
    record = RunRecord() if directory is None else read_run(directory, chat_form)
    target = results_file(options, directory)
    read_results(target)  # a wrong file fails before minutes of questions
    manager = open_tasks(options.tasks, files)
    saved = load(options, record)
    results = evaluate(options, saved, manager)
    rows = rows_of(results)
    print("\n".join(table(rows)))
    if target is not None:
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": options.model if directory is None else str(directory),
            "examples": record.num_examples,
            "options": options.model_dump(mode="json", exclude={"model", "to"}),
            "results": rows,
            "task_versions": results["versions"],
            "num_fewshot": results["n-shot"],
            "lm_eval": version("lm-eval"),
        }
        with one_at_a_time(target, f"results: waiting for another command, which writes {target}"):
            text = json.dumps([*read_results(target), entry], ensure_ascii=False, indent=1, allow_nan=False)
            write_atomically(target, text.encode() + b"\n")
        print(f"results: {target}")


# ---- Tasks ----


def is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def open_tasks(names: Sequence[str], files: Sequence[str]) -> "TaskManager":
    """The tasks of lm-eval, if one is named.

    Raises:
        UserError: CONFIG, with every unknown name.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    unknown = [name for name in files if not Path(name).is_file()]
    if unknown:
        raise UserError("CONFIG", f"tasks: {', '.join(unknown)} does not exist", "correct the path")
    manager = TaskManager(include_defaults=len(files) < len(names))  # it reads thousands of files
    unknown = [name for name in names if name not in files and name not in manager.task_index]
    if unknown:
        guess = bracketed(did_you_mean(nearest(unknown[0], manager.all_tasks)))
        shown = ", ".join(unknown[:NUM_UNKNOWN_SHOWN])
        fix = "give names of `lm-eval ls tasks`, or YAML files"
        raise UserError("CONFIG", f"tasks: lm-eval has no {shown}{guess}", fix)
    return manager


def evaluate(options: BenchmarkOptions, saved: "SavedModel", manager: "TaskManager") -> dict[str, Any]:
    """The results of lm-eval."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        results = simple_evaluate(
            model=HFLM(pretrained=saved.model, tokenizer=saved.tokenizer, batch_size=options.batch_size),
            tasks=list(options.tasks),
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
            log_samples=False,
        )
    except Exception as error:  # of the tasks and of the libraries that load their data
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "correct the task; its data must be on this machine, or the hub in reach"
        raise UserError("DATA", f"tasks: lm-eval failed ({reason})", fix) from error
    assert results is not None  # in one process
    return dict(results)


# ---- The model ----


def load(options: BenchmarkOptions, record: "RunRecord") -> "SavedModel":
    """Load the model, on a GPU if there is one, with the chat template of an export."""
    import torch
    import transformers

    from engine.export.dialogues import template_to_export
    from engine.export.saved_models import load_saved
    from engine.models.score_head import has_score_head

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    saved = load_saved(options.model, dtype=options.dtype and getattr(torch, options.dtype), base=options.base)
    if has_score_head(saved.model):
        fix = "python evaluate.py model=RUN data=FILE to=SCORES.jsonl scores a file"
        raise UserError("CONFIG", f"model: {options.model} is a reward model, and benchmarks need one of text", fix)
    if options.chat:
        saved.tokenizer.chat_template = template_to_export(options.chat_template, saved.tokenizer, record)
        if not saved.tokenizer.chat_template:
            raise UserError("CONFIG", "chat: the model has no chat template", "give chat_template, or leave chat out")
    saved.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return saved


# ---- Results ----


def results_file(options: BenchmarkOptions, directory: Path | None) -> Path | None:
    """The file of the results; None for a model outside of a run."""
    if options.to is not None:
        return Path(options.to).expanduser()
    if directory is None or not (directory.parent / "metrics.jsonl").is_file():
        return None
    return directory.parent / RESULTS_FILE


def read_results(path: Path | None) -> list[Any]:
    """Earlier results in a file, kept when others are added."""
    if path is None or not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("CONFIG", f"to: {path} is not JSON ({error})", "give another file") from error
    if not isinstance(found, list):
        raise UserError("CONFIG", f"to: {path} holds no list of results", "give another file")
    return found


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric of each task or group: task, metric, value, standard_error, questions."""
    rows = []
    for task, values in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            name, is_metric, filtered = key.partition(",")
            if not is_metric or name.endswith("_stderr"):
                continue
            rows.append(
                {
                    "task": task,
                    "metric": name if filtered == "none" else f"{name} ({filtered})",
                    "value": finite(value),
                    "standard_error": finite(values.get(f"{name}_stderr,{filtered}")),
                    "questions": count,
                }
            )
    return rows


def finite(value: Any) -> float | None:
    """A number, or None: lm-eval writes N/A for an unknown error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table."""
    lines = [("task", "metric", "value", "error", "questions")]
    for row in rows:
        numbers = ("-" if row[key] is None else f"{row[key]:.4f}" for key in ("value", "standard_error"))
        count = "-" if row["questions"] is None else f"{row['questions']:,}"
        lines.append((row["task"], row["metric"], *numbers, count))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
