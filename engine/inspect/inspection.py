"""An inspection: every check on the data, as sections and findings."""

from dataclasses import dataclass
from pathlib import Path

from engine.inspect.collecting import Data
from engine.inspect.findings import Finding, Section
from engine.inspect.repeats import contradictions, duplicates, near_duplicates, prompts_in_both_splits
from engine.inspect.responses import (
    equal_after_truncation,
    length_difference,
    similar_pairs,
    truncated_prompts,
    without_end_of_text,
)
from engine.inspect.sizes import fed_tokens, lengths, row_counts, truncation
from engine.inspect.templates import template_drift
from engine.inspect.texts import contamination, literal_special_tokens
from engine.inspect.tokens import ExampleTokens, choose_examples


@dataclass(frozen=True)
class Inspection:
    """A report on data.

    Args:
        title: the data sets and the loss.
        sections: tables and charts.
        findings: defects found.
        notes: checks that were left out, and why.
        examples: some examples, token by token.
        has_scores: a reward model's, in place of targets.
    """

    title: str
    sections: list[Section]
    findings: list[Finding]
    notes: list[str]
    examples: list[ExampleTokens]
    has_scores: bool


def inspect(
    data: Data,
    *,
    num_examples: int = 3,
    benchmark: Path | None = None,
    checks_near_duplicates: bool | None = None,
    hh_datasets: frozenset[str] = frozenset(),
) -> Inspection:
    """Run every check.

    Args:
        num_examples: to show token by token.
        benchmark: a file to look for in the data.
        checks_near_duplicates: None: unless the data are large.
        hh_datasets: short names of data sets in the format of HH.

    Raises:
        UserError: if the benchmark cannot be read.
    """
    notes: list[str] = []
    differences, unusual_length = length_difference(data)
    similarity, similar = similar_pairs(data)
    sections = [row_counts(data), lengths(data), truncation(data), *fed_tokens(data), differences, similarity]
    findings = [
        *contamination(data, benchmark, notes),
        *prompts_in_both_splits(data),
        *contradictions(data),
        *duplicates(data),
        *near_duplicates(data, checks_near_duplicates, notes),
        *equal_after_truncation(data),
        *similar,
        *without_end_of_text(data),
        *truncated_prompts(data),
        *unusual_length,
        *literal_special_tokens(data),
        *template_drift(data, set(hh_datasets), notes),
    ]
    examples = [*choose_examples(data, num_examples)]
    settings = data.settings
    title = f"{', '.join(settings.datasets)} for loss={settings.loss.name}"
    present = [section for section in sections if section is not None]
    return Inspection(title, present, findings, notes, examples, data.is_ranked)
