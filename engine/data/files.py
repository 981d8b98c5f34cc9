"""The user's own files: parse the rows of a split, hold out test prompts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.chat import Chat
from engine.data.forms import FORM_COLUMNS, FORMS, ParsedRow, detect_form
from engine.data.messages import read_tools
from engine.data.preferences import Preferences, SplitName, add_preference
from engine.data.read_sources import note_source
from engine.data.row_files import read_rows
from engine.data.rows import BadRow, Row, RowCounts
from engine.data.split_files import find_split
from utils import UserError, content_hash, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from losses import BatchKind  # imports torch, and data need none

ZERO_WEIGHT = "weight of 0"  # reason for dropping a row


def load_file(
    path: Path,
    split: SplitName,
    counts: RowCounts,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    form: str | None = None,
    chat_template: str | None = None,
    sft_turns: str = "all",
    test_fraction: float = 0.05,
    batch: "BatchKind" = "sft",
) -> Preferences:
    """Load a split of a file, or of a folder of files.

    A folder has a file train.*, and may have test.*, validation.* or eval.*, as files, shards or folders of
    save_to_disk. Without a test file, a fraction of the prompts is held out. A hash of each prompt decides, so both
    splits and all runs agree.

    Args:
        path: the file or folder.
        split: the split to load.
        counts: gets the rows of this split, and the dropped ones. Dropped rows have no prompt, so without a test file
            they count as train rows.
        tokenizer: writes message lists as text.
        form: a key of FORMS; None infers it from the columns of the first row.
        chat_template, sft_turns: see Chat.
        test_fraction: of the prompts; at least one prompt if there are two.
        batch: refuse rows that make no examples of this kind.

    Raises:
        UserError: if rows are unreadable, malformed, or refused.
    """
    if form is not None and form not in FORMS:
        raise UserError("CONFIG", f"format: '{form}' is not a form", f"use one of {', '.join(FORMS)}, or null")
    note_source(counts, "split", str(path), split)
    files, has_test_file = find_split(path, split)
    for file in files:
        note_source(counts, "file", str(file))
    file_counts = RowCounts(on_bad_row=counts.on_bad_row)
    data = FilePreferences()
    chat = Chat(tokenizer, chat_template, "next" if batch == "rollout" else sft_turns)
    for row in parse_rows(files, form, chat, file_counts, batch):
        data.add(row)
    if data.num_plain_text and split == "train" and (chat_template or tokenizer.chat_template):
        counts.notify(_plain_text_notice(path, data, chat_template))
    if split == "train" and (data.num_with_weight or ZERO_WEIGHT in file_counts.dropped):
        counts.notify(_weight_notice(path, data, file_counts.dropped[ZERO_WEIGHT]))
    if not has_test_file:
        data.keep_split(split, test_fraction)
    if has_test_file or split == "train":
        file_counts.rows = sum(file_counts.dropped.values())
        counts.add(file_counts)
    counts.rows += sum(data.num_rows[prompt] for prompt in data.preferences)
    if not has_test_file and test_fraction > 0 and len({*data.hashes.values()}) == 1:
        problem = f"datasets: {path} has a single prompt, so none can be held out for evaluation"
        raise UserError("DATA", problem, "add rows with other prompts; test_fraction=0 trains without an evaluation")
    return data.preferences


def _plain_text_notice(path: Path, data: "FilePreferences", chat_template: str | None) -> str:
    """A line about rows of plain text, as no chat template applies to them."""
    num_rows = data.num_rows.total()
    is_mixed = data.num_plain_text < num_rows
    place = f"{data.num_plain_text:,} of {num_rows:,} rows of {path}" if is_mixed else f"{path}"
    advice = "(format=messages applies it to prompt with chosen and rejected, or completion)"
    if chat_template is not None:
        reason = "they are plain text" if is_mixed else "it holds plain text"
        return f"warning: chat_template={chat_template} changes nothing for {place}: {reason} {advice}"
    verb, owner = ("are", "their") if is_mixed else ("holds", "its")
    plain = f"{place} {verb} plain text: {owner} prompts go in as they are"
    return f"note: {plain}, without the chat template of the model {advice}"


def _weight_notice(path: Path, data: "FilePreferences", num_zero: int) -> str:
    """A line about the column `weight`, as it may mean something else to the user."""
    num_rows = data.num_rows.total() + num_zero
    line = f"note: the column weight of {path} scales the loss: {data.num_scaled + num_zero:,} of {num_rows:,} rows"
    return f"{line} have a weight other than 1" + (f", {num_zero:,} of them 0 (dropped)" if num_zero else "")


def parse_rows(
    files: Sequence[Path], form: str | None, chat: Chat, counts: RowCounts, batch: "BatchKind" = "sft"
) -> Iterator[ParsedRow]:
    """Read and parse the rows of a split; counts gets the dropped ones.

    Without a form, the first row that parses decides it for all later rows.
    """
    rows = chain.from_iterable(read_rows(file, counts.reject) for file in files)
    for row in progress(rows, description=f"reading {files[0].name}", unit="rows"):
        parsed: ParsedRow | str | None = None
        with counts.catch_bad_row():
            row_form = form or detect_form(row, may_be_prompts=batch == "rollout")
            parsed = _parse(row, row_form, chat, is_inferred=form is None)
            if batch == "ranked" and isinstance(parsed, ParsedRow) and row.values.get("margin") not in (None, ""):
                parsed = parsed._replace(margin=row.margin())
            if batch == "rollout" and isinstance(parsed, ParsedRow):
                parsed = parsed._replace(columns=row.values)
            form = row_form
        if isinstance(parsed, str):
            counts.drop(parsed, row.origin)
        elif parsed is not None:
            _check_kind(parsed, batch, f"{row.origin}: rows of format={form}")
            yield parsed


def _check_kind(parsed: ParsedRow, batch: "BatchKind", rows: str) -> None:
    """Raise UserError for a row without the responses or the preference that the batch kind needs."""
    if batch == "rollout":
        return
    if not parsed.responses:
        problem = f"{rows} have no responses"
        raise UserError("DATA", problem, "train on them with a loss that samples responses, such as loss=grpo")
    if parsed.is_demonstration and batch != "sft":
        needed = "chosen and rejected" if batch in ("pairs", "ranked") else "prompt, completion and label, or pairs"
        fix = f"train on them with loss=sft; other losses need {needed}"
        raise UserError("DATA", f"{rows} have one response and no preference", fix)
    if parsed.label is not None and batch in ("pairs", "ranked"):
        from losses import LOSSES  # imports torch

        names = " or ".join(f"loss={name}" for name, loss in LOSSES.items() if loss.batch == "unpaired")
        fix = f"train on them with {names}; losses of pairs need chosen and rejected"
        raise UserError("DATA", f"{rows} have one response with a label, and no pair", fix)


def _parse(row: Row, form: str, chat: Chat, *, is_inferred: bool) -> ParsedRow | str:
    try:
        parsed = FORMS[form](row, chat)
        if isinstance(parsed, ParsedRow) and parsed.is_plain_text and read_tools(row):
            raise row.error("tools", "is for messages, and the row is plain text")
        weight = row.weight()
        if weight == 0:
            return ZERO_WEIGHT
        return parsed._replace(weight=weight) if isinstance(parsed, ParsedRow) else parsed
    except BadRow as error:
        if not is_inferred:
            raise
        what = f"{error.what} (its columns are those of format={form})"
        raise BadRow(what, error.remedy) from error


@dataclass
class FilePreferences:
    """Preferences of a file, with everything needed to hold out prompts.

    Rows of one hash stay in one split.

    Args:
        num_plain_text: rows of text instead of messages.
        num_with_weight: rows with a column weight.
        num_scaled: rows with a weight other than 1.
    """

    preferences: Preferences = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # by prompt
    num_rows: Counter[str] = field(default_factory=Counter)  # by prompt
    num_plain_text: int = 0
    num_with_weight: int = 0
    num_scaled: int = 0

    def add(self, row: ParsedRow) -> None:
        turns = (*row.earlier_turns, row)
        weight = 1.0 if row.weight is None else row.weight
        # Dialogues with a common beginning share prompts, so they share a hash.
        known = [self.hashes[turn.prompt] for turn in turns if turn.prompt in self.hashes]
        row_hash = known[0] if known else content_hash([row.key])
        previous: tuple[str, str] | None = None  # of a dialogue
        for turn in turns:
            target = None if turn.label is False or not turn.responses else turn.responses[turn.best]
            preference = add_preference(
                self.preferences, turn.prompt, turn.responses, turn.pairs, target, weight, turn.margin
            )
            if row.columns is not None:
                key = repr({name: value for name, value in row.columns.items() if name not in FORM_COLUMNS})
                preference.setdefault("rows", {}).setdefault(key, (row.columns, weight))
            if turn.from_template:
                preference["from_template"] = True
            if turn.label is not None:
                preference.setdefault("labels", []).append((len(preference["responses"]) - 1, turn.label))
            if target is not None and (turn.is_demonstration or turn.label):
                preference.setdefault("demonstrations", []).append(target)
                if previous is not None:
                    preference.setdefault("previous", {}).setdefault(target, previous)
                previous = turn.prompt, target
            self.hashes.setdefault(turn.prompt, row_hash)
        self.num_rows[row.prompt] += 1
        self.num_plain_text += row.is_plain_text
        self.num_with_weight += row.weight is not None
        self.num_scaled += weight != 1

    def keep_split(self, split: SplitName, test_fraction: float) -> None:
        """Keep the prompts of one split; the lowest hashes are the test split."""
        order = sorted(set(self.hashes.values()))
        num_test = round(test_fraction * len(order))
        if test_fraction > 0 and len(order) > 1:
            num_test = min(max(num_test, 1), len(order) - 1)
        kept = set(order[:num_test] if split == "test" else order[num_test:])
        self.preferences = {
            prompt: preference for prompt, preference in self.preferences.items() if self.hashes[prompt] in kept
        }
