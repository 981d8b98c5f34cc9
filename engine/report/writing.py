"""Write a report: the page, and pictures of its charts."""

from collections.abc import Sequence
from pathlib import Path

from engine.pages.drawing import draw
from engine.pages.templates import write_html
from engine.report.page import format_report, make_report
from engine.report.run_log import read_run_log
from utils import write_atomically

PAGE = "report.html"  # in a run directory
PICTURES = "charts"  # a directory beside the page


def write_report(runs: Sequence[Path], page: Path, with_pictures: bool = False) -> None:
    """Write the report of one run, or of several in comparison.

    Args:
        runs: their directories.
        page: the file.
        with_pictures: also write PNG and SVG of each chart, into a directory charts beside the page.

    Raises:
        UserError: a directory is no run, or the charts cannot be drawn.
    """
    report = make_report([read_run_log(run) for run in runs])
    drawings = draw([chart.spec for chart in report.charts], with_pictures)
    write_html(page, format_report(report, drawings))
    if with_pictures:
        directory = page.parent / PICTURES
        directory.mkdir(exist_ok=True)
        for chart, drawing in zip(report.charts, drawings, strict=True):
            write_atomically(directory / f"{chart.key}.svg", drawing.svg.encode())
            write_atomically(directory / f"{chart.key}.png", drawing.png or b"")
