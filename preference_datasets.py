"""Data sets to train on: a loader per data set, and DATASETS.

A loader gives `{prompt: {"responses": [...], "pairs": [(preferred, other), ...], "sft_target": ...}}`. To add a data
set: a function `get_<name>(split, source)` here, a line in DATASETS, and a test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.chat import ASSISTANT_TURN, HUMAN_TURN
from engine.data.example_table import of_all_turns, prompt_hashes
from engine.data.examples import COUNTED, Example, Observe, Split, TruncationMode, tokenize
from engine.data.files import load_file
from engine.data.films import film_reward, film_rows
from engine.data.forms import PROMPTS_DIFFER, split_transcript
from engine.data.mismatched import add_mismatched
from engine.data.preferences import Preferences, SplitName, add_preference, pairs_by_score
from engine.data.read_sources import UNKNOWN, are_unchanged
from engine.data.row_sources import RowSource
from engine.data.rows import RowCounts
from engine.data.split_store import SplitStore
from engine.data.stack_exchange import read_questions
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.settings.schema import Settings
    from losses import BatchKind

__all__ = [
    "DATASETS",
    "Dataset",
    "Example",
    "Preferences",
    "RowSource",
    "Split",
    "chat_form",
    "format_counts",
    "ground_truth_reward",
    "load_split",
    "num_shared_prompts",
    "read_texts",
]


# ---- Loaders ----


def get_hh(split: SplitName, source: RowSource) -> Preferences:
    """Anthropic's Helpful and Harmless dialogues: two transcripts with different last responses."""
    preferences: Preferences = {}
    for row in source.rows("Anthropic/hh-rlhf", split):
        with source.catch_bad_row():
            parts = split_transcript(row)
            if parts is None:
                source.drop(PROMPTS_DIFFER, row.origin)
                continue
            prompt, chosen, rejected = parts
            add_preference(preferences, prompt, [chosen, rejected], [(0, 1)], chosen)
    return preferences


def get_shp(split: SplitName, source: RowSource) -> Preferences:
    """Stanford Human Preferences: pairs of Reddit comments.

    The preferred comment has at least twice the other's score. The SFT target is the comment with the highest score.
    """
    preferences: Preferences = {}
    best: dict[str, tuple[float, str]] = {}  # highest score of each prompt, and its response
    for row in source.rows("stanfordnlp/SHP", split):
        with source.catch_bad_row():
            prompt = f"{HUMAN_TURN} {row.text('history')}{ASSISTANT_TURN}"
            responses = [" " + row.text("human_ref_A"), " " + row.text("human_ref_B")]
            scores = [row.number("score_A"), row.number("score_B")]
            label = row.number("labels")
            if label not in (0, 1):
                raise row.error("labels", f"is {label:g}, not 1 (A is preferred) or 0 (B is preferred)")
            # No division, as a score may be 0. Negative scores have no ratio.
            if min(scores) < 0 or max(scores) < 2 * min(scores) or max(scores) == 0:
                source.drop("score ratio below 2", row.origin)
                continue
            scored = [*zip(scores, responses, strict=True)]
            best[prompt] = max([best[prompt], *scored] if prompt in best else scored, key=lambda item: item[0])
            add_preference(preferences, prompt, responses, [(0, 1) if label == 1 else (1, 0)], best[prompt][1])
    return preferences


def get_se(split: SplitName, source: RowSource) -> Preferences:
    """Stack Exchange questions: all pairs of answers with different scores. HTML is stripped, code stays marked.

    The SFT target is the answer with the highest score.
    """
    preferences: Preferences = {}
    rows = source.rows("HuggingFaceH4/stack-exchange-preferences", split, test_fraction=0.01)
    for question in read_questions(rows, source.counts):
        if not question.answers:
            source.drop("no answers")
            continue
        prompt = f"{HUMAN_TURN} {question.text}{ASSISTANT_TURN}"
        responses = [" " + answer for answer in question.answers]
        target = responses[question.scores.index(max(question.scores))]
        add_preference(preferences, prompt, responses, pairs_by_score(question.scores), target)
    return preferences


def get_stack_exchange_paired(split: SplitName, source: RowSource) -> Preferences:
    """Stack Exchange as pairs of plain text: response_j is preferred to response_k."""
    preferences: Preferences = {}
    hub_dir = {"train": "data/rl", "test": "data/evaluation"}[split]
    for row in source.rows("lvwerra/stack-exchange-paired", split, hub_dir=hub_dir):
        with source.catch_bad_row():
            prompt = "Question: " + row.text("question") + "\n\nAnswer: "
            chosen, rejected = row.text("response_j"), row.text("response_k")
            add_preference(preferences, prompt, [chosen, rejected], [(0, 1)], chosen)
    return preferences


def get_films(split: SplitName, source: RowSource) -> Preferences:
    """The embedded dialogues about films (engine/data/films.py), whatever data_dir is."""
    preferences: Preferences = {}
    for row in film_rows(split):
        source.counts.rows += 1
        add_preference(preferences, row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["sft_target"])
    return preferences


@dataclass(frozen=True)
class Dataset:
    """A named data set.

    Args:
        function: its loader.
        truncation_mode: the end of a prompt kept by truncation.
        reward: ground-truth reward of a response, if there is one.
        chat_template: "hh" if its prompts are dialogues of "\\n\\nHuman: ...\\n\\nAssistant:".
    """

    function: Callable[[SplitName, RowSource], Preferences]
    truncation_mode: TruncationMode = "keep_start"
    reward: Callable[[str], float] | None = None
    chat_template: str | None = None


DATASETS = {
    "films": Dataset(get_films, "keep_end", film_reward, chat_template="hh"),
    "hh": Dataset(get_hh, "keep_end", chat_template="hh"),
    "shp": Dataset(get_shp, chat_template="hh"),
    "se": Dataset(get_se, chat_template="hh"),
    "stack-exchange-paired": Dataset(get_stack_exchange_paired),
}


def chat_form(datasets: Sequence[str]) -> str | None:
    """The chat template shared by all of these data sets, if any."""
    templates = {DATASETS[name].chat_template if name in DATASETS else None for name in datasets}
    return templates.pop() if len(templates) == 1 else None


def ground_truth_reward(datasets: Sequence[str]) -> Callable[[str], float] | None:
    """The ground-truth reward of the only data set, if there is one."""
    rewards = [DATASETS[name].reward if name in DATASETS else None for name in datasets]
    return rewards[0] if len(rewards) == 1 else None


# ---- Splits ----


def load_split(
    settings: "Settings",
    tokenizer: "PreTrainedTokenizerBase",
    split: SplitName,
    batch: "BatchKind",
    *,
    needs_mismatched: bool = False,
    counts: RowCounts | None = None,
    observe: Observe | None = None,
) -> Split:
    """Load the examples of a split, from all of settings.datasets in order.

    Args:
        settings: datasets, data_dir, format, chat_template, sft_turns, test_fraction, on_bad_row, max_length,
            max_prompt_length, seed and cache_dir are read; of ranked responses loss too.
        tokenizer: needs an EOS token.
        split: "train" or "test".
        batch: "sft": one example per demonstration and SFT target, those of a dialogue in one; "pairs": one per pair;
            "unpaired": one per labelled response, two per pair; "ranked": one per prompt, with all its pairs;
            "rollout": the prompts alone.
        needs_mismatched: give each example the response to another prompt.
        counts: gets the rows read and dropped.
        observe: gets each example beside its text, those dropped by tokenization too.

    Raises:
        UserError: if rows are unreadable or malformed, or none can be trained on.
    """
    assert settings.cache_dir is not None  # the run has named it
    store = None
    if observe is None and counts is None and SplitStore.holds(batch):
        loaders = [DATASETS[name].function for name in settings.datasets if name in DATASETS]
        store = SplitStore(settings, tokenizer, split, batch, loaders)
    result = store.read() if store else None
    if result is None:
        counts = counts or RowCounts(on_bad_row=settings.on_bad_row)
        result = _read_split(settings, tokenizer, split, batch, counts, observe)
        # A file that changed while it was read: its hash is of another content.
        if store and UNKNOWN not in counts.sources and are_unchanged(counts.sources):
            store.write(result, counts)
            result = store.read(is_quiet=True) or result  # views of files take less memory
    if needs_mismatched and result.examples:
        result.examples = add_mismatched(result.examples, settings.max_length, settings.seed, split)
    return result


def _read_split(
    settings: "Settings",
    tokenizer: "PreTrainedTokenizerBase",
    split: SplitName,
    batch: "BatchKind",
    counts: RowCounts,
    observe: Observe | None,
) -> Split:
    """Read the rows of a split and make its examples."""
    assert settings.cache_dir is not None
    data: list[tuple[Preferences, TruncationMode]] = []
    for name in settings.datasets:
        num_sources = len(counts.sources)
        preferences, truncation_mode = _load_dataset(name, settings, tokenizer, split, batch, counts)
        if len(counts.sources) == num_sources:  # a loader that reads files by itself
            counts.sources[UNKNOWN] = name
        if preferences:
            data.append((preferences, truncation_mode))
        elif split == "train" or settings.test_fraction != 0:
            problem = f"datasets: {name} has no {split} rows{_describe_dropped(counts)}"
            raise UserError("DATA", problem, "add rows; test_fraction=0 trains without an evaluation")
    limits = {"max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length}
    result = tokenize(
        data,
        tokenizer,
        batch,
        counts,
        **limits,
        cache_dir=Path(settings.cache_dir),
        needs_order=batch == "ranked" and settings.loss.needs_order,
        observe=observe,
    )
    if not result.examples and (split == "train" or settings.test_fraction):
        names = ", ".join(settings.datasets)
        problem = f"datasets: no row of the {split} split of {names} is left{_describe_dropped(counts)}"
        raise UserError("DATA", problem, "correct the rows, or raise max_length if it is the reason")
    return result


def read_texts(settings: "Settings") -> Callable[[str, SplitName], list[str] | None]:
    """A function: a data set and a split -> its prompts with their SFT targets, as texts; None for a path."""

    def read(name: str, split: SplitName) -> list[str] | None:
        if name not in DATASETS:
            return None
        counts = RowCounts(on_bad_row=settings.on_bad_row)
        preferences = DATASETS[name].function(split, RowSource(name, settings.data_dir, counts))
        return [prompt + target for prompt, each in preferences.items() if (target := each["sft_target"]) is not None]

    return read


def _load_dataset(
    name: str,
    settings: "Settings",
    tokenizer: "PreTrainedTokenizerBase",
    split: SplitName,
    batch: "BatchKind",
    counts: RowCounts,
) -> tuple[Preferences, TruncationMode]:
    """The preferences of a data set or file, and its truncation mode."""
    if name in DATASETS:
        dataset = DATASETS[name]
        return dataset.function(split, RowSource(name, settings.data_dir, counts)), dataset.truncation_mode
    preferences = load_file(
        Path(name),
        split,
        counts,
        tokenizer,
        form=settings.format,
        chat_template=settings.chat_template,
        sft_turns=settings.sft_turns,
        test_fraction=settings.test_fraction,
        batch=batch,
    )
    return preferences, "keep_end"  # the end is next to the response


def _describe_dropped(counts: RowCounts) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.dropped.items())
    first = counts.first_bad_row and f"; the first malformed row: {counts.first_bad_row}"
    return reasons and f" (dropped: {reasons}{first})"


def format_counts(split_counts: dict[str, Any]) -> str:
    """Describe Split.counts.

    "400 rows, 370 prompts, 397 pairs, 12 of them truncated to max_length=512", and dropped rows below.
    """
    kind = next(name for name in COUNTED.values() if name in split_counts)
    line = ", ".join(f"{split_counts[name]:,} {name}" for name in dict.fromkeys(("rows", "prompts", kind)))
    if "joined" in split_counts:
        line += f" in {split_counts['joined']:,} examples"
    if "desirable" in split_counts:
        line += f" ({split_counts['desirable']:,} desirable)"
    if "compared_pairs" in split_counts:
        line += f" of {split_counts['compared_pairs']:,} pairs"
    if split_counts["truncated"]:
        of_them = f"{kind} of them" if "joined" in split_counts else "of them"
        line += f", {split_counts['truncated']:,} {of_them} truncated to max_length={split_counts['max_length']}"
    if split_counts["dropped"]:
        dropped = split_counts["dropped"].items()
        line += "\n  dropped: " + ", ".join(f"{number:,} {reason}" for reason, number in dropped)
    if "first_bad_row" in split_counts:
        line += f"\n  the first malformed row: {split_counts['first_bad_row']}"
    repeated, kept = ("an example", kind) if kind == "examples" else ("a pair", "pairs")
    if "duplicates" in split_counts:
        line += f"\n  kept, though they repeat {repeated}: {split_counts['duplicates']:,} {kept}"
    if "contradictions" in split_counts:
        opposite = "A over B and B over A" if kept == "pairs" else "desirable and undesirable"
        line += f"\n  kept, though each has its opposite ({opposite}): {split_counts['contradictions']:,} {kept}"
    if "ties" in split_counts:
        line += f"\n  tied with another response to their prompt: {split_counts['ties']:,} responses"
    if "truncated_responses" in split_counts:
        line += f"\n  truncated, so scored before their end: {split_counts['truncated_responses']:,} responses"
    return line


def num_shared_prompts(train: Split, test: Split) -> tuple[int, int]:
    """Numbers of truncated prompts: in both splits, and in the test split."""
    train_prompts, test_prompts = (
        np.unique(of_all_turns("prompt_hash", split.examples, prompt_hashes(split.examples))) for split in (train, test)
    )
    return len(np.intersect1d(train_prompts, test_prompts, assume_unique=True)), len(test_prompts)
