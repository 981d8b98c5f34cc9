"""An inspection as a web page in one file: no script, nothing from a network."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from engine.inspect.charts import caption, draw
from engine.inspect.inspection import Inspection
from utils import UserError, write_atomically

if TYPE_CHECKING:
    from jinja2 import Template

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
        write_atomically(path, format_page(inspection).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError("STORAGE", f"page: {path} cannot be written ({error})", "give another file") from error


def format_page(inspection: Inspection) -> str:
    """The HTML of a report. Texts of the data are escaped; only the charts of the child are not."""
    from markupsafe import Markup

    drawings = iter(draw([histogram for section in inspection.sections for histogram in section.histograms]))
    charts = [
        [(caption(histogram), Markup(next(drawings))) for histogram in section.histograms]
        for section in inspection.sections
    ]
    return _template().render(inspection=inspection, sections=zip(inspection.sections, charts, strict=True))


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
