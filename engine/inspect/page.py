"""An inspection as a web page in one file: no script, nothing from a network."""

from pathlib import Path

from engine.inspect.charts import caption, specification
from engine.inspect.inspection import Inspection
from engine.pages.drawing import draw
from engine.pages.templates import as_markup, render, write_html
from utils import UserError

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def check_page(path: Path) -> None:
    """Raise UserError if the page cannot be written there: an inspection may take minutes."""
    directory = path.absolute().parent
    if path.is_dir() or not directory.is_dir():
        problem = f"page: {path} is a directory" if path.is_dir() else f"page: there is no directory {directory}"
        raise UserError("CONFIG", problem, "give the path of a file in an existing directory")


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the report as HTML.

    Raises:
        UserError: if the charts cannot be drawn, or the file cannot be written.
    """
    try:
        write_html(path, format_page(inspection))
    except OSError as error:
        raise UserError("STORAGE", f"page: {path} cannot be written ({error})", "give another file") from error


def format_page(inspection: Inspection) -> str:
    """The HTML of a report. Texts of the data are escaped; only the charts of the child are not."""
    histograms = [histogram for section in inspection.sections for histogram in section.histograms]
    svgs = iter(as_markup([drawing.svg for drawing in draw([*map(specification, histograms)])]))
    charts = [[(caption(histogram), next(svgs)) for histogram in section.histograms] for section in inspection.sections]
    return render(TEMPLATE, inspection=inspection, sections=zip(inspection.sections, charts, strict=True))
