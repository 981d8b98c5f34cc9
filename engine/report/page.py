"""The report of a run, and of several runs beside each other, as a web page in one file."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from engine.pages.drawing import Drawing, draw
from engine.pages.templates import as_markup, render
from engine.report.charts import COLOURS, curves, frontier, histogram
from engine.report.panels import panels_of
from engine.report.run_log import ERROR_PARTS, EXAMPLES, Row, RunLog, is_number

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SCRIPT = Path(__file__).with_name("search.js")
MAX_SAMPLE_BYTES = 1_500_000  # of prompts and responses on a page
MAX_TEXT = 20_000  # characters of a response
MAX_EVALUATIONS = 4  # shown of a prompt
# Where a run is, not its work.
PLACES = {"exp_name", "local_dirs", "local_run_dir", "cache_dir", "resume", "resume_allow"}
# What rewards a run by, for the frontier: the first that all runs have.
REWARDS = (
    ("ground_truth/policy", "True reward of samples"),
    ("rewards_eval/sampled", "Reward of samples"),
    ("rewards_eval/accuracies", "Accuracy on held-out pairs"),
)


@dataclass(frozen=True)
class Chart:
    """A chart of a report.

    Args:
        key: of its file.
        title: above it.
        spec: in Vega-Lite.
        is_wide: it takes a whole row.
    """

    key: str
    title: str
    spec: Mapping[str, Any]
    is_wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Sample:
    """Responses to a prompt, the newest evaluation first.

    Args:
        responses: title, text and numbers of each.
    """

    prompt: str
    responses: Sequence[tuple[str, str, str]]


@dataclass
class Report:
    """What a page shows.

    Args:
        notes: below the title.
        samples_note: how many prompts there are, and how many are left out.
        data: lines about the data.
        commands: to run it again, by name of the run.
    """

    title: str
    notes: list[str]
    charts: list[Chart]
    metrics: Table
    settings: Table
    warnings: list[tuple[str, Row]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    samples_note: str = ""
    data: list[str] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)


def make_report(runs: Sequence[RunLog]) -> Report:
    """The report of one run, or of several in comparison."""
    labels = labels_of(runs)
    charts = [Chart(panel.key, panel.title, curves(panel, runs, labels)) for panel in panels_of(runs)]
    commands = [
        (label, run.record["command"]) for run, label in zip(runs, labels, strict=True) if run.record.get("command")
    ]
    warnings = [(label, row) for run, label in zip(runs, labels, strict=True) for row in run.warnings]
    if len(runs) > 1:
        if (chart := frontier_of(runs, labels)) is not None:
            charts.insert(0, chart)
        report = Report(
            title=f"{len(runs)} runs",
            notes=notes_of(runs, labels),
            charts=charts,
            metrics=final_metrics(runs, labels),
            settings=differing_settings(runs, labels),
        )
    else:
        run = runs[0]
        for row in run.histograms[-1:]:
            title = f"Held-out rewards after {int(row[EXAMPLES]):,} examples"
            charts.append(Chart("rewards_histogram", title, histogram(row)))
        report = Report(
            title=run.name,
            notes=[progress_of(run)],
            charts=charts,
            metrics=metrics_of(run),
            settings=Table(["key", "value"], [[key, str(value)] for key, value in run.settings.items()]),
            data=data_lines(run),
        )
        report.samples, report.samples_note = samples_of(run)
    report.warnings, report.commands = warnings, commands
    return report


def format_report(report: Report, drawings: Sequence[Drawing] | None = None) -> str:
    """The HTML of a report.

    Args:
        drawings: of its charts; drawn here if None.

    Raises:
        UserError: if the charts cannot be drawn.
    """
    if drawings is None:
        drawings = draw([chart.spec for chart in report.charts])
    svgs = as_markup([drawing.svg for drawing in drawings])
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    charts = [*zip(report.charts, svgs, strict=True)]
    return render(TEMPLATE, report=report, charts=charts, script=as_markup([script])[0], digest=digest)


# ---- Parts ----


def notes_of(runs: Sequence[RunLog], labels: Sequence[str]) -> list[str]:
    """What runs are compared."""
    notes = [f"{label}: {progress_of(run)}, {run.directory}" for run, label in zip(runs, labels, strict=True)]
    if len(runs) > len(COLOURS):
        notes.append(f"There are {len(COLOURS)} colours: they repeat. Compare fewer runs to tell lines apart.")
    return notes


def progress_of(run: RunLog) -> str:
    """How far a run is."""
    if not run.rows:
        return "no step yet"
    num_updates = int(run.rows[-1].get("counters/updates", 0))
    num_evaluations = len(run.evaluations)
    evaluations = "1 evaluation" if num_evaluations == 1 else f"{num_evaluations:,} evaluations"
    return f"{run.num_examples:,} examples, {num_updates:,} steps, {evaluations}"


def metrics_of(run: RunLog) -> Table:
    """The first, the last and the extreme values of the metrics of evaluations."""
    names = list(dict.fromkeys(name for row in run.evaluations for name in row if not name.startswith("counters/")))
    rows = []
    for name in names:
        values = [row[name] for row in run.evaluations if is_number(row.get(name))]
        if values and not is_error(name):
            error, low, high = (run.evaluations[-1].get(f"{name}/{part}") for part in ERROR_PARTS)
            last = number(values[-1]) + (f" ± {number(error)}" if error is not None else "")
            last += f" ({number(low)} to {number(high)})" if low is not None and high is not None else ""
            rows.append([name, number(values[0]), last, number(min(values)), number(max(values))])
    return Table(["held out", "first", "last", "lowest", "highest"], rows)


def is_error(name: str) -> bool:
    """Whether a metric is the error of another one."""
    return name.rpartition("/")[2] in ERROR_PARTS


def final_metrics(runs: Sequence[RunLog], labels: Sequence[str]) -> Table:
    """The last value of every metric of evaluations, a column for each run."""
    names = list(dict.fromkeys(name for run in runs for row in run.evaluations for name in row))
    names = [name for name in names if not name.startswith("counters/") and not is_error(name)]
    rows = []
    for name in names:
        values = [next((row[name] for row in reversed(run.evaluations) if name in row), None) for run in runs]
        rows.append([name, *("" if value is None else number(value) for value in values)])
    return Table(["held out, last", *labels], rows)


def differing_settings(runs: Sequence[RunLog], labels: Sequence[str]) -> Table:
    """The settings that differ between runs."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key not in PLACES))
    rows = []
    for key in keys:
        values = [str(run.settings.get(key, "")) for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["differing settings", *labels], rows)


def labels_of(runs: Sequence[RunLog]) -> list[str]:
    """Short labels: the values of one or two differing settings, or names; equal ones are numbered."""
    rows = differing_settings(runs, [""] * len(runs)).rows
    labels = [run.name for run in runs]
    if 0 < len(rows) <= 2:
        labels = [
            " ".join(f"{row[0].rpartition('.')[2]}={row[index + 1]}" for row in rows) for index in range(len(runs))
        ]
    if len(set(labels)) < len(labels):
        labels = [f"{number}: {label}" for number, label in enumerate(labels, 1)]
    return labels


def frontier_of(runs: Sequence[RunLog], labels: Sequence[str]) -> Chart | None:
    """Reward against KL at the last evaluation, of the runs that have trained; None unless two have both."""
    trained = [
        (row, label)
        for run, label in zip(runs, labels, strict=True)
        for row in run.evaluations[-1:]
        if row[EXAMPLES] > 0
    ]
    is_sweep = len(differing_settings(runs, labels).rows) == 1
    for kl in ("kl_eval", "forward_kl_eval"):
        for reward, title in REWARDS:
            points = [
                {
                    "kl": row[kl],
                    "kl_error": row.get(f"{kl}/standard_error", 0.0),
                    "reward": row[reward],
                    "label": label,
                }
                for row, label in trained
                if is_number(row.get(kl)) and is_number(row.get(reward))
            ]
            if len(points) > 1 and len(points) == len(trained):
                spec = frontier(points, title, is_sweep)
                return Chart("frontier", f"{title} against {kl}, last evaluation", spec, is_wide=True)
    return None


def data_lines(run: RunLog) -> list[str]:
    """Counts of the data by split."""
    lines = []
    for split, counts in run.record.get("data", {}).items():
        parts = []
        for name, value in counts.items():
            if name == "dropped":
                dropped = [f"{count:,} dropped: {reason}" for reason, count in value.items()]
                parts += dropped
            elif isinstance(value, int):
                parts.append(f"{value:,} {name.replace('_', ' ')}")
        lines.append(f"{split}: {', '.join(parts)}")
    return lines


def samples_of(run: RunLog) -> tuple[list[Sample], str]:
    """Prompts with responses of the newest evaluations, as far as they fit, and a line about the rest."""
    by_prompt: dict[str, list[Row]] = {}
    for row in reversed(run.samples):
        by_prompt.setdefault(str(row.get("prompt", "")), []).append(row)
    # The newest evaluation's prompts in their order, then earlier ones; then responses sampled in training.
    evaluated = [row for row in run.samples if "policy" in row]
    newest = {str(row.get("prompt", "")) for row in evaluated if row["examples"] == evaluated[-1]["examples"]}
    in_order = dict.fromkeys(str(row.get("prompt", "")) for row in [*evaluated, *reversed(run.samples)])
    prompts = sorted(in_order, key=lambda prompt: prompt not in newest)
    samples: list[Sample] = []
    size = 0
    for prompt in prompts:
        sample = Sample(prompt[-MAX_TEXT:], _responses(by_prompt[prompt]))
        size += sum(len(escape(text).encode("utf-8", "replace")) for _, *texts in sample.responses for text in texts)
        size += len(escape(prompt).encode("utf-8", "replace"))
        if size > MAX_SAMPLE_BYTES:
            break
        samples.append(sample)
    note = f"{len(samples):,} prompts"
    if len(samples) < len(prompts):
        note += f" of {len(prompts):,}; samples.jsonl has all"
    return samples, note if prompts else ""


def _responses(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Title, text and numbers of the responses to a prompt. Rows are the newest first."""
    found: list[tuple[str, str, str]] = []
    references: list[tuple[str, str, str]] = []
    evaluations = list(dict.fromkeys(row["examples"] for row in rows))[:MAX_EVALUATIONS]
    for row in rows:
        for name, text in row.items():
            if not isinstance(text, str) or name == "prompt":
                continue
            values = {key: value for key, value in row.items() if is_number(value) and key != "examples"}
            text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"
            own = {key: value for key, value in values.items() if not any(key == f"{other}_reward" for other in row)}
            if f"{name}_reward" in values:
                own = {"reward": values[f"{name}_reward"]}
            numbers = ", ".join(f"{key} {number(value)}" for key, value in own.items())
            if name == "reference":
                references = [(name, text, numbers)]
            elif row["examples"] in evaluations:
                found.append((f"{name}, after {row['examples']:,} examples", text, numbers))
    return [*found, *references]


def number(value: float) -> str:
    """A number in few characters."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
