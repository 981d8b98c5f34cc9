"""Web pages in one file, from templates: nothing from a network, and texts of the data escaped."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment

ENGINE = Path(__file__).parent.parent


def render(template: Path, **values: Any) -> str:
    """The HTML of a page.

    Args:
        template: a file inside the engine; it extends pages/base.html.jinja.
        values: of its names.
    """
    name = template.relative_to(ENGINE).as_posix()
    return _environment().get_template(name).render(**values)


def write_html(path: Path, html: str) -> None:
    """Write a page in UTF-8, at once. Lone surrogates of the data are written as escapes."""
    write_atomically(path, html.encode("utf-8", "backslashreplace"))


def as_markup(svgs: Sequence[str]) -> list[Any]:
    """Charts, not to be escaped."""
    from markupsafe import Markup

    return [Markup(svg) for svg in svgs]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(ENGINE)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
