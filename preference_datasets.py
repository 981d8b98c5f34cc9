"""What to train on: a loader per data set, the user's own files, and the way from either to tokenised examples.

A loader gives `{prompt: {"responses": [...], "pairs": [(preferred, other), ...], "sft_target": ...}}`. To add a data
set, write a `get_<name>(split, source)` like those below, and name it in DATASETS.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from engine.formats import (
    ASSISTANT_TURN,
    PROMPTS_DIFFER,
    BadRow,
    Preferences,
    Row,
    SplitName,
    Tally,
    add_preference,
    load_file,
    pairs_by_score,
    read_rows,
    split_transcript,
)
from engine.tokenization import BatchKind, Example, Split, TruncationMode, tokenize
from utils import UserError

if TYPE_CHECKING:
    import datasets
    from bs4 import PageElement, Tag
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DATASETS",
    "Dataset",
    "Example",
    "Preferences",
    "Source",
    "Split",
    "format_counts",
    "load_split",
    "num_shared_prompts",
]

HUMAN_TURN = "\n\nHuman: "
HUB_TIMEOUT = 10  # seconds
HTML_BLOCK_ROWS = 20_000  # stripped of HTML at a time; where a data set has so many, by several processes
MAX_HTML_DEPTH = 250
MAX_HTML_WORK = 20_000_000  # tags x characters that may be looked at for each of them; about a second


# ---- Where rows come from ----


@dataclass
class Source:
    """Where the rows of a named data set come from: data_dir if there is one, else the hub or its local cache."""

    name: str
    data_dir: str | None = None
    tally: Tally = field(default_factory=Tally)

    def rows(
        self, hub_id: str, split: SplitName, *, hub_dir: str | None = None, test_share: float | None = None
    ) -> Iterator[Row]:
        """The rows of a split, counted in the tally.

        Args:
            hub_id: the name of the data set on the hub.
            split: the split to read.
            hub_dir: the folder in the hub's repository that holds this split and nothing else.
            test_share: for a data set whose only split is train: the share of it that is the test split, the first
                rows of a shuffle with seed 42. A test file in data_dir goes before.
        """
        shuffled = test_share is not None and (self.data_dir is None or self._file("test") is None)
        stored: SplitName = "train" if shuffled else split
        rows: Iterator[Row]
        num_rows = 0
        if self.data_dir is None:
            table = load_from_hub(self.name, hub_id, stored, hub_dir)
            rows = (Row(values, f"{hub_id} {stored} row {number}") for number, values in enumerate(table))
            num_rows = len(table)
        else:
            path = self._file(stored)
            if path is None:
                problem = f"data_dir: {self.data_dir}/{self.name} holds neither {stored}.jsonl nor {stored}.jsonl.gz"
                raise UserError("DATA", problem, "put the file there, or set data_dir=null to load from the hub")

            def bad(error: BadRow) -> None:
                self.tally.bad(error)
                self.tally.rows += 1

            rows = read_rows(path, bad)
            if shuffled:
                num_rows = sum(1 for _ in read_rows(path, Tally(on_bad_row=self.tally.on_bad_row).bad))
        if shuffled and test_share is not None:
            is_test = np.zeros(num_rows, dtype=bool)
            is_test[np.random.default_rng(42).permutation(num_rows)[: int(num_rows * test_share)]] = True
            rows = (row for row, in_test in zip(rows, is_test, strict=True) if in_test == (split == "test"))
        for row in tqdm(rows, desc=f"reading {self.name} {split}", unit=" rows", disable=None):
            self.tally.rows += 1
            yield row

    def drop(self, reason: str) -> None:
        """Count a row that cannot be trained on."""
        self.tally.dropped[reason] += 1

    def checked(self) -> AbstractContextManager[None]:
        """Around what is done with one row: if it is a bad one, it ends the run, or is dropped with on_bad_row=drop."""
        return self.tally.checked()

    def _file(self, split: SplitName) -> Path | None:
        folder = Path(self.data_dir or "") / self.name
        paths = [folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"]
        return next((path for path in paths if path.exists()), None)


def load_from_hub(name: str, hub_id: str, split: SplitName, hub_dir: str | None = None) -> "datasets.Dataset":
    """A split of a data set on the hub; from the hub's local cache where the hub cannot be reached.

    Raises:
        UserError: within seconds, if neither has it.
    """
    import datasets
    from huggingface_hub import HfApi, snapshot_download

    fix = f"put its rows in DATA_DIR/{name}/train.jsonl and test.jsonl (or .jsonl.gz) and set data_dir=DATA_DIR"
    path = hub_id
    # load_dataset would try for half a minute, so ask first. Anything may be raised: no network, HF_HUB_OFFLINE, 404.
    try:
        HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)
    except Exception as error:
        try:
            path = snapshot_download(hub_id, repo_type="dataset", local_files_only=True)
        except OSError:
            reason = str(error).split("\n")[0] or type(error).__name__
            problem = f"datasets: {name}: {hub_id} is not in the hub's local cache, and the hub fails: {reason}"
            raise UserError("DATA", problem, f"{fix}, or try again with a network") from error
    try:
        tables = datasets.load_dataset(path, data_dir=hub_dir)
        return tables[split if hub_dir is None else next(iter(tables))]  # in a folder of its own it has another name
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError("DATA", f"datasets: {name}: {hub_id} {split} cannot be loaded: {reason}", fix) from error


# ---- Loaders ----


def get_hh(split: SplitName, source: Source) -> Preferences:
    """Anthropic's Helpful and Harmless dialogues: two transcripts that differ in the last turn of the assistant."""
    preferences: Preferences = {}
    for row in source.rows("Anthropic/hh-rlhf", split):
        with source.checked():
            parts = split_transcript(row)
            if parts is None:
                source.drop(PROMPTS_DIFFER)
                continue
            prompt, chosen, rejected = parts
            add_preference(preferences, prompt, [chosen, rejected], [(0, 1)], chosen)
    return preferences


def get_shp(split: SplitName, source: Source) -> Preferences:
    """Stanford Human Preferences: pairs of Reddit comments, where one has at least twice the score of the other.

    The SFT target is the comment with the highest score.
    """
    preferences: Preferences = {}
    best: dict[str, tuple[float, str]] = {}  # the highest score of a prompt, and its response
    for row in source.rows("stanfordnlp/SHP", split):
        with source.checked():
            prompt = HUMAN_TURN + row.text("history") + ASSISTANT_TURN
            responses = [" " + row.text("human_ref_A"), " " + row.text("human_ref_B")]
            scores = [row.number("score_A"), row.number("score_B")]
            label = row.number("labels")
            if label not in (0, 1):
                raise row.error("labels", f"is {label:g}, not 1 (A is preferred) or 0 (B is)")
            # Multiplied, as a score may be 0. A negative score has no ratio to speak of.
            if min(scores) < 0 or max(scores) < 2 * min(scores) or max(scores) == 0:
                source.drop("score ratio below 2")
                continue
            scored = [*zip(scores, responses, strict=True)]
            best[prompt] = max([best[prompt], *scored] if prompt in best else scored, key=lambda item: item[0])
            add_preference(preferences, prompt, responses, [(0, 1) if label == 1 else (1, 0)], best[prompt][1])
    return preferences


def get_se(split: SplitName, source: Source) -> Preferences:
    """Stack Exchange questions: all pairs of answers whose scores differ; HTML is stripped, code stays marked.

    The SFT target is the answer with the highest score.
    """
    preferences: Preferences = {}
    rows = source.rows("HuggingFaceH4/stack-exchange-preferences", split, test_share=0.01)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # starts no process until used
        while block := list(islice(rows, HTML_BLOCK_ROWS)):
            html: list[str] = []  # question, answers, question, answers, ...
            scored: list[tuple[Row, list[float]]] = []
            for row in block:
                with source.checked():
                    row_html, row_scores = [row.text("question")], []
                    for i, answer in enumerate(row.items("answers")):
                        name = f"answers[{i}]"
                        row_html.append(row.as_text(row.member(answer, "text", name), f"{name}.text"))
                        row_scores.append(row.as_number(row.member(answer, "pm_score", name), f"{name}.pm_score"))
                    html += row_html
                    scored.append((row, row_scores))
            is_parallel = len(block) == HTML_BLOCK_ROWS and not multiprocessing.current_process().daemon
            texts = pool.map(_stripped, html, chunksize=256) if is_parallel else map(_stripped, html)
            for row, scores in scored:
                row_texts = list(islice(texts, 1 + len(scores)))
                with source.checked():
                    names = ["question", *(f"answers[{i}].text" for i in range(len(scores)))]
                    for name, text in zip(names, row_texts, strict=True):
                        if isinstance(text, ValueError):
                            raise row.error(name, str(text))
                    prompt = f"{HUMAN_TURN}{row_texts[0]}{ASSISTANT_TURN}"
                    responses = [f" {text}" for text in row_texts[1:]]
                    if not responses:
                        source.drop("no answers")
                        continue
                    target = responses[scores.index(max(scores))]
                    add_preference(preferences, prompt, responses, pairs_by_score(scores), target)
    return preferences


def get_stack_exchange_paired(split: SplitName, source: Source) -> Preferences:
    """Stack Exchange as pairs in plain text: response_j is preferred to response_k."""
    preferences: Preferences = {}
    hub_dir = {"train": "data/rl", "test": "data/evaluation"}[split]
    for row in source.rows("lvwerra/stack-exchange-paired", split, hub_dir=hub_dir):
        with source.checked():
            prompt = "Question: " + row.text("question") + "\n\nAnswer: "
            chosen, rejected = row.text("response_j"), row.text("response_k")
            add_preference(preferences, prompt, [chosen, rejected], [(0, 1)], chosen)
    return preferences


def get_films(split: SplitName, source: Source) -> Preferences:
    """The embedded example: dialogues about films, made by engine/films.py; data_dir has no part in it."""
    from engine.films import film_rows

    preferences: Preferences = {}
    for row in film_rows(split):
        source.tally.rows += 1
        add_preference(preferences, row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["sft_target"])
    return preferences


def films_reward(answer: str) -> float:
    from engine.films import reward

    return reward(answer)


@dataclass(frozen=True)
class Dataset:
    """A named data set: its loader, which end of a prompt that is cut stays, and the reward of an answer if known."""

    function: Callable[[SplitName, Source], Preferences]
    truncation_mode: TruncationMode = "keep_start"
    reward: Callable[[str], float] | None = None


DATASETS = {
    "films": Dataset(get_films, "keep_end", films_reward),
    "hh": Dataset(get_hh, "keep_end"),
    "shp": Dataset(get_shp),
    "se": Dataset(get_se),
    "stack-exchange-paired": Dataset(get_stack_exchange_paired),
}


# ---- HTML ----

BLOCKS = {"p", "pre", "ul", "ol", "blockquote", "div", "table", "tr", "dl", "dt", "dd", "hr"}
BLOCKS |= {f"h{level}" for level in range(1, 7)}


def strip_html(html: str) -> str:
    """The text of HTML, its blocks an empty line apart. Code keeps its <code> tags, list items get "- " or "1. ".

    Raises:
        ValueError: if it would take minutes, or cannot be read.
    """
    from bs4 import BeautifulSoup, ParserRejectedMarkup

    # html.parser goes on after a "<" without its ">", looking at all that follows again.
    if html.count("<") * len(html) > MAX_HTML_WORK:
        parser = HTMLParser(convert_charrefs=False)
        with suppress(AssertionError):  # which the next parser raises too
            parser.feed(html)
        if parser.rawdata.count("<") * len(parser.rawdata) > MAX_HTML_WORK:
            raise ValueError("is HTML with tags that do not end")
    try:
        soup = BeautifulSoup(html, "html.parser")
    except ParserRejectedMarkup:
        raise ValueError("is HTML that cannot be read") from None
    return "\n\n".join(_blocks(soup, _holders_of_blocks(soup)))


def _stripped(html: str) -> str | ValueError:
    """strip_html for map, which an exception would end."""
    try:
        return strip_html(html)
    except ValueError as error:
        return error


def _holders_of_blocks(soup: "Tag") -> set[int]:
    """The tags that hold blocks, by id.

    Raises:
        ValueError: if tags are nested more deeply than functions may be.
    """
    from bs4 import Tag

    levels = [[soup]]
    while levels[-1]:
        if len(levels) > MAX_HTML_DEPTH:
            raise ValueError(f"is HTML with tags nested more than {MAX_HTML_DEPTH} deep")
        levels.append([child for tag in levels[-1] for child in tag.children if isinstance(child, Tag)])
    holders: set[int] = set()
    for level in reversed(levels[1:]):
        holders |= {id(tag.parent) for tag in level if tag.name in BLOCKS or id(tag) in holders}
    return holders


def _blocks(parent: "Tag", holders: set[int]) -> list[str]:
    from bs4 import Tag

    blocks: list[str] = []
    inline = ""  # text outside of any block, up to here
    for child in parent.children:
        if not isinstance(child, Tag) or child.name not in BLOCKS:
            # A tag that holds blocks, such as a link around a paragraph, is one too.
            if isinstance(child, Tag) and id(child) in holders:
                blocks += [inline, *_blocks(child, holders)]
                inline = ""
            else:
                inline += _inline(child)
            continue
        blocks.append(inline)
        inline = ""
        if child.name == "pre":
            blocks.append(f"<code>{child.get_text()}</code>")
        elif child.name in ("ul", "ol"):
            items = [_blocks(item, holders) for item in child.find_all("li", recursive=False)]
            marks = [f"{i}. " if child.name == "ol" else "- " for i in range(1, len(items) + 1)]
            blocks.append("\n".join(mark + _indented(item) for mark, item in zip(marks, items, strict=True)))
        else:
            blocks += _blocks(child, holders)
    return [block for block in (block.strip() for block in [*blocks, inline]) if block]


def _indented(blocks: list[str]) -> str:
    """The blocks of a list item: what follows its first line is indented, but for lines of code."""
    return "\n  ".join(block if block.startswith("<code>") else block.replace("\n", "\n  ") for block in blocks)


def _inline(node: "PageElement") -> str:
    from bs4 import CData, NavigableString, Tag

    if not isinstance(node, Tag):
        return str(node) if type(node) in (NavigableString, CData) else ""  # not comments, scripts or styles
    if node.name == "br":
        return "\n"
    text = "".join(_inline(child) for child in node.children)
    return f"<code>{text}</code>" if node.name == "code" else text


# ---- Splits ----


def load_split(config: "DictConfig", tokenizer: "PreTrainedTokenizerBase", split: SplitName, batch: BatchKind) -> Split:
    """The examples of a split of all of config.datasets, in their order, and what was counted on the way.

    Args:
        config: read are datasets, data_dir, format, chat_template, sft_turns, test_fraction, on_bad_row, max_length,
            max_prompt_length and cache_dir (a path).
        tokenizer: needs an EOS token.
        split: "train" or "test".
        batch: "sft" makes one example per prompt or demonstration, "pairs" one per pair.

    Raises:
        UserError: if rows cannot be read or are malformed, or if none is left to train on.
    """
    tally = Tally(on_bad_row=config.on_bad_row)
    data: list[tuple[Preferences, TruncationMode]] = []
    for name in config.datasets:
        mode: TruncationMode = "keep_end"  # of the user's own files: what is next to the response
        if name in DATASETS:
            mode = DATASETS[name].truncation_mode
            preferences = DATASETS[name].function(split, Source(name, config.data_dir, tally))
        else:
            preferences = load_file(
                Path(name),
                split,
                tally,
                tokenizer,
                form=config.format,
                chat_template=config.chat_template,
                sft_turns=config.sft_turns,
                test_fraction=config.test_fraction,
                needs_pairs=batch == "pairs",
            )
        if not preferences and split == "test" and config.test_fraction == 0:
            continue  # no evaluation, as asked
        if not preferences:
            problem = f"datasets: {name} has no {split} rows{_dropped(tally)}"
            raise UserError("DATA", problem, "add rows; test_fraction=0 trains without an evaluation")
        data.append((preferences, mode))
    result = tokenize(
        data,
        tokenizer,
        batch,
        tally,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        cache_dir=Path(config.cache_dir),
    )
    if not result.examples and (split == "train" or config.test_fraction):
        problem = f"datasets: of the {split} rows of {', '.join(config.datasets)} none is left{_dropped(tally)}"
        raise UserError("DATA", problem, "correct the rows, or raise max_length if that is why")
    return result


def _dropped(tally: Tally) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in tally.dropped.items())
    first = tally.first_bad_row and f"; the first malformed row: {tally.first_bad_row}"
    return reasons and f" (dropped: {reasons}{first})"


def format_counts(split_counts: dict[str, Any]) -> str:
    """Split.counts in one or two lines: "400 rows, 370 prompts, 397 pairs, 12 of them cut to max_length=512"."""
    kind = "pairs" if "pairs" in split_counts else "targets"
    line = ", ".join(f"{split_counts[name]:,} {name}" for name in ("rows", "prompts", kind))
    if split_counts["truncated"]:
        line += f", {split_counts['truncated']:,} of them cut to max_length={split_counts['max_length']}"
    if split_counts["dropped"]:
        line += "\n  dropped: " + ", ".join(f"{number:,} {why}" for why, number in split_counts["dropped"].items())
    if "first_bad_row" in split_counts:
        line += f"\n  the first malformed row: {split_counts['first_bad_row']}"
    if "duplicates" in split_counts:
        line += f"\n  kept, though they repeat a pair: {split_counts['duplicates']:,} pairs"
    if "contradictions" in split_counts:
        line += (
            f"\n  kept, though each has its opposite (A over B and B over A): {split_counts['contradictions']:,} pairs"
        )
    return line


def num_shared_prompts(train: Split, test: Split) -> tuple[int, int]:
    """How many prompts of a test split are prompts of the train split too, and how many there are; as they are cut."""
    of_train = {hash(example.prompt.tobytes()) for example in train.examples}
    of_test = {hash(example.prompt.tobytes()) for example in test.examples}
    return len(of_train & of_test), len(of_test)
