"""Inspections of small data, for tests."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from engine.inspect.inspection import Inspection
from inspect_data import InspectOptions, read_overrides, run_inspection
from tests.data.samples import byte_tokenizer

Row = dict[str, Any]


def words(number: int, seed: object) -> str:
    """Random words of random letters: texts made of them have little in common."""
    rng = random.Random(str(seed))
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(number))


def clean_rows(split: str, number: int) -> list[Row]:
    """Pairs without a defect; the chosen response is longer in every second one."""
    rows = []
    for index in range(number):
        texts = [" " + words(size + index % 3, (split, index, size)) for size in (5, 6)]
        chosen, rejected = texts if index % 2 else texts[::-1]
        rows.append({"prompt": words(8, (split, index)), "chosen": chosen, "rejected": rejected})
    return rows


class Inspector:
    """Runs an inspection on a folder of rows, with a byte-level tokenizer."""

    def __init__(self, directory: Path, cache: Path):
        self.directory, self.cache = directory, cache
        self.train, self.test = clean_rows("train", 40), clean_rows("test", 10)
        self.tokenizer = byte_tokenizer()

    def overrides(self, *more: str) -> list[str]:
        folder = self.directory / "rows"
        folder.mkdir(exist_ok=True)
        for split, rows in (("train", self.train), ("test", self.test)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.tokenizer.save_pretrained(self.directory / "tokenizer")
        return [
            f"datasets={folder}",
            "loss=dpo",
            *(() if {"loss=sft", "loss=reward", "loss=grpo"} & {*more} else ("loss.beta=0.1",)),
            f"model.tokenizer_name_or_path={self.directory / 'tokenizer'}",
            f"cache_dir={self.cache}",
            f"local_dirs=[{self.directory}]",
            *more,
        ]

    def __call__(self, *more: str, **options: Any) -> Inspection:
        return run_inspection(read_overrides(self.overrides(*more)), InspectOptions(**options))

    def checks(self, *more: str, **options: Any) -> dict[str, int]:
        """The number of each finding."""
        return {finding.check: finding.number for finding in self(*more, **options).findings}


def table(inspection: Inspection, title: str) -> dict[str, dict[str, str]]:
    found = next(section.table for section in inspection.sections if section.title == title)
    assert found is not None
    return {row[0]: dict(zip(found.header[1:], row[1:], strict=True)) for row in found.rows}


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
