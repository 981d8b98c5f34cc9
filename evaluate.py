"""Score a file with a reward model: python evaluate.py model=RUN data=FILE to=SCORES.jsonl; see docs/reward.md."""

import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from engine.models.hub import settle_network
from engine.settings.choices import RowForm
from engine.settings.options import Options, run_command
from engine.settings.value_types import ChatTemplate, Count, PossiblePath
from utils import UserError, content_hash, progress

if TYPE_CHECKING:  # it takes seconds to import
    from engine.data.chat import Chat
    from engine.export.scoring import Scorer

ROWS_AT_ONCE = 64
DEFAULT_LENGTH = 4096  # in tokens, of models without a run


class EvaluateOptions(Options):
    model: PossiblePath = Field(description="a run, checkpoint, adapter, exported directory, or a name on the hub")
    data: PossiblePath = Field(description="rows of any form: .json, .jsonl or .csv, also .gz, .parquet or .arrow")
    to: PossiblePath = Field(description="the JSON lines to write, one a row; a stopped command continues")
    format: RowForm | None = Field(
        None, description="the form of the rows; messages writes plain text by the chat template; null: inferred"
    )
    chat_template: ChatTemplate | None = Field(
        None, description="hh, llama2, chatml or a Jinja file; null: the run's, else the tokenizer's own"
    )
    normalize: bool = Field(False, description="subtract reward_mean of config.json, and divide by reward_std")
    max_length: Count | None = Field(None, description="tokens of prompt and response; null: the run's")
    max_prompt_length: Count | None = Field(
        None, description="tokens kept of a prompt that is too long; null: the run's"
    )
    batching: Literal["packed", "padded"] = Field("packed", description="padded is for models that packed refuses")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="of the weights; null: as stored")
    base: PossiblePath | None = Field(None, description="a base model, in place of the one in the adapter's config")


def evaluate(options: EvaluateOptions) -> None:
    """Score all rows, and print the results."""
    from engine.export.reward_bench import results_of

    target, data = Path(options.to).expanduser(), Path(options.data).expanduser()
    if target.exists():
        raise UserError("CONFIG", f"to: {target} exists", "give another file, or remove it")
    if not data.is_file():
        raise UserError("DATA", f"data: {data} is not a file", "give a file of rows")
    settle_network([options.model, options.base])
    scorer, chat, identity = load(options)
    rows = write_scores(options, scorer, chat, content_hash([identity, *file_facts(data), options.model_dump_json()]))
    dropped = [row for row in rows if "dropped" in row]
    print(f"{len(rows) - len(dropped):,} rows scored, {len(dropped):,} dropped: {target}")
    for name, value in results_of(rows).items():
        print(f"{name:<24} {value:.4f}")


def load(options: EvaluateOptions) -> "tuple[Scorer, Chat, str]":
    """Load the model.

    Returns:
        a scorer, the writer of messages, and a hash of the model's files.
    """
    import torch
    import transformers

    from engine.data.chat import Chat
    from engine.export.run_record import RunRecord, read_run
    from engine.export.saved_models import check_finite, find_saved, load_saved
    from engine.export.scoring import Scorer
    from engine.models.score_head import has_score_head
    from engine.step.packing_check import use_packed_attention
    from preference_datasets import chat_form

    transformers.logging.set_verbosity_error()
    directory = find_saved(options.model)
    record = RunRecord() if directory is None else read_run(directory, chat_form)
    saved = load_saved(options.model, dtype=options.dtype and getattr(torch, options.dtype), base=options.base)
    if not has_score_head(saved.model):
        problem = f"model: {options.model} is a model of text, not a reward model"
        raise UserError("CONFIG", problem, "train one with loss=reward")
    check_finite(saved.model, "evaluate another checkpoint")
    model = saved.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if options.batching == "packed":
        use_packed_attention(model)
    mean, deviation = read_normalization(options, model.config, record)
    context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    max_length = options.max_length or record.config.get("max_length") or min(context, DEFAULT_LENGTH)
    max_prompt_length = options.max_prompt_length or record.config.get("max_prompt_length") or max_length // 2
    if max_prompt_length >= max_length:
        problem = f"max_prompt_length: {max_prompt_length} is not below max_length ({max_length})"
        raise UserError("CONFIG", problem, "lower it, to leave room for a response")
    scorer = Scorer(
        model,
        saved.tokenizer,
        layout=options.batching,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        mean=mean,
        deviation=deviation,
    )
    template = options.chat_template or record.chat_template
    chat = Chat(saved.tokenizer, template if template in (None, "hh") or options.chat_template else None, "last")
    if options.chat_template is None and template not in (None, "hh"):
        chat.jinja = record.template_text()
    files = sorted(directory.iterdir()) if directory is not None else []
    return scorer, chat, content_hash([options.model, *(fact for file in files for fact in file_facts(file))])


def read_normalization(options: EvaluateOptions, config: Any, record: Any) -> tuple[float, float]:
    """Mean and standard deviation of the rewards, as asked; 0 and 1 without normalize."""
    if not options.normalize:
        return 0.0, 1.0
    mean = record.reward_mean if record.reward_mean is not None else getattr(config, "reward_mean", None)
    deviation = record.reward_std if record.reward_std is not None else getattr(config, "reward_std", None)
    if mean is None or not deviation:
        problem = "normalize: config.json has no reward_mean and reward_std"
        raise UserError("CONFIG", problem, "evaluate a checkpoint saved after an evaluation, such as the last one")
    return mean, deviation


def file_facts(path: Path) -> tuple[str, int, int]:
    """What tells that a file has changed."""
    facts = path.stat()
    return str(path.resolve()), facts.st_size, facts.st_mtime_ns


def write_scores(options: EvaluateOptions, scorer: "Scorer", chat: "Chat", identity: str) -> list[dict[str, Any]]:
    """Write the scores of all rows, a line each; returns the lines.

    Lines go to a file beside the target. A stopped command continues after its last complete line.

    Args:
        identity: a hash of model, data and options.
    """
    from engine.export.scoring import rows_to_score, scored_row

    target = Path(options.to).expanduser()
    partial = target.with_name(f".{target.name}.partial")
    done = read_partial(partial, identity)
    rows = rows_to_score(Path(options.data).expanduser(), options.format, chat)
    shown = progress(rows, description="scoring", unit="rows")
    skipped = list(islice(shown, len(done)))
    assert len(skipped) == len(done)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as file:
        while batch := list(islice(shown, ROWS_AT_ONCE)):
            scores: Iterator[list[float]] = iter(
                scorer.scores([row.parsed for row in batch if not isinstance(row.parsed, str)])
            )
            lines = [scored_row(row, None if isinstance(row.parsed, str) else next(scores)) for row in batch]
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            done += lines
    complete = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    complete.write_text("".join(json.dumps(line) + "\n" for line in done), encoding="utf-8")
    os.replace(complete, target)
    partial.unlink()
    return done


def read_partial(partial: Path, identity: str) -> list[dict[str, Any]]:
    """The lines of a stopped command, without a cut one; a new file if there is none.

    Raises:
        UserError: CONFIG, if another model, data or options made them.
    """
    if not partial.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"of": identity}) + "\n", encoding="utf-8")
        return []
    text = partial.read_bytes()
    text = text[: text.rfind(b"\n") + 1]
    header, *lines = map(json.loads, text.splitlines()) if text else ({},)
    if header.get("of") != identity:
        problem = f"to: {partial} is of another model, other data or other options"
        raise UserError("CONFIG", problem, "remove it, or give another file")
    with open(partial, "r+b") as file:
        file.truncate(len(text))
    if lines:
        print(f"continuing after {len(lines):,} rows of {partial}")
    return lines


def main() -> int:
    usage = "python evaluate.py model=RUN data=FILE to=SCORES.jsonl [key=value ...]: score responses"
    return run_command(evaluate, usage, EvaluateOptions, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
