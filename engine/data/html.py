"""HTML as text."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from html.parser import HTMLParser
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from utils import Progress

if TYPE_CHECKING:
    from bs4 import PageElement, Tag

T = TypeVar("T")

MAX_HTML_DEPTH = 250
MAX_HTML_WORK = 20_000_000  # tags times characters to look at for each; about a second
CHUNK_SIZE = 20_000  # items stripped at once; several processes share a full chunk

BLOCKS = {"p", "pre", "ul", "ol", "blockquote", "div", "table", "tr", "dl", "dt", "dd", "hr"}
BLOCKS |= {f"h{level}" for level in range(1, 7)}


def strip_html(html: str) -> str:
    """The text of HTML, with an empty line between blocks.

    Code keeps its <code> tags. List items start with "- " or "1. ".

    Raises:
        ValueError: if the HTML is unreadable or would take minutes.
    """
    from bs4 import BeautifulSoup, ParserRejectedMarkup

    # After each "<" without ">" html.parser looks at the rest of the text again.
    if html.count("<") * len(html) > MAX_HTML_WORK:
        parser = HTMLParser(convert_charrefs=False)
        with suppress(AssertionError):  # the parser below raises it again
            parser.feed(html)
        if parser.rawdata.count("<") * len(parser.rawdata) > MAX_HTML_WORK:
            raise ValueError("is HTML with unclosed tags")
    try:
        soup = BeautifulSoup(html, "html.parser")
    except ParserRejectedMarkup:
        raise ValueError("is HTML that cannot be read") from None
    return "\n\n".join(_blocks(soup, _holders_of_blocks(soup)))


def stripped_or_error(html: str) -> str | ValueError:
    """strip_html for map(), where an exception would end all items."""
    try:
        return strip_html(html)
    except ValueError as error:
        return error


def strip_many(items: Iterable[tuple[T, list[str]]]) -> Iterator[tuple[T, list[str | ValueError]]]:
    """Strip the HTML of many items, in order.

    Args:
        items: each any object, and its pieces of HTML.

    Returns:
        Each object, and the text of its pieces; for an unreadable piece a ValueError instead.
    """
    items = iter(items)
    with _process_pool() as pool, Progress("stripping HTML", unit="texts") as progress:
        while chunk := list(islice(items, CHUNK_SIZE)):
            html = [piece for _, pieces in chunk for piece in pieces]
            if pool is not None and len(chunk) == CHUNK_SIZE:  # the pool starts its processes on first use
                texts = pool.map(stripped_or_error, html, chunksize=256)
            else:
                texts = map(stripped_or_error, html)
            for item, pieces in chunk:
                yield item, list(islice(texts, len(pieces)))
                progress.update(len(pieces))


@contextmanager
def _process_pool() -> Iterator[ProcessPoolExecutor | None]:
    """Processes for a with block; None where there can be none: daemons, or a full /dev/shm."""
    pool = None
    if not multiprocessing.current_process().daemon:
        try:
            pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
        except OSError as error:  # of its semaphores
            print(f"stripping HTML in one process: no shared memory ({error.strerror})", flush=True)
    with pool or nullcontext():
        yield pool


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _holders_of_blocks(soup: "Tag") -> set[int]:
    """The ids of the tags with blocks inside.

    Raises:
        ValueError: if tags are nested too deeply for recursive functions.
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
    inline = ""  # text since the last block
    for child in parent.children:
        if not isinstance(child, Tag) or child.name not in BLOCKS:
            # A tag with blocks inside, such as a link around a paragraph, is a block too.
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
    """The text of a list item: lines after the first are indented, except code."""
    return "\n  ".join(block if block.startswith("<code>") else block.replace("\n", "\n  ") for block in blocks)


def _inline(node: "PageElement") -> str:
    from bs4 import CData, NavigableString, Tag

    if not isinstance(node, Tag):
        return str(node) if type(node) in (NavigableString, CData) else ""  # not comments, scripts or styles
    if node.name == "br":
        return "\n"
    text = "".join(_inline(child) for child in node.children)
    return f"<code>{text}</code>" if node.name == "code" else text
