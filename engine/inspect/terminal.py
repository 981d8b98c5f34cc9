"""An inspection as text for a terminal, with or without colour."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.inspect.findings import Finding, Section, Table
from engine.inspect.inspection import Inspection
from engine.inspect.tokens import ExampleTokens, Part, Token
from utils import clipped

MAX_TOKEN_LINES = 6  # of a part; the page shows all of it


@dataclass(frozen=True)
class Terminal:
    """How to write: the columns of a line, and whether colour and characters beyond ASCII are there."""

    width: int = 80
    has_colour: bool = False
    has_unicode: bool = True

    def paint(self, text: str, *codes: int) -> str:
        """Text in colours of ANSI: 1 bold, 2 dim, 31 red, 32 green, 33 yellow, 36 cyan."""
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if self.has_colour and text.strip() else text


def format_inspection(inspection: Inspection, terminal: Terminal) -> str:
    """The report as text."""
    lines = [terminal.paint(f"Data of {clipped(visible(inspection.title), terminal.width - 8)}", 1), ""]
    for section in inspection.sections:
        lines += [*_section(section, terminal), ""]
    for example in inspection.examples:
        lines += [*_example(example, terminal), ""]
    lines += _findings(inspection, terminal)
    text = "\n".join(line.rstrip() for line in lines)
    return text if terminal.has_unicode else _as_ascii(text)


def _as_ascii(text: str) -> str:
    for bar in "▁▂▃▄▅▆▇█":
        text = text.replace(bar, "_" if bar in "▁▂▃" else "=" if bar in "▄▅▆" else "#")
    return text.encode("ascii", "backslashreplace").decode()


def visible(text: str) -> str:
    """Text with control characters escaped: data may hold the codes of a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# ---- Sections ----


def _section(section: Section, terminal: Terminal) -> Iterator[str]:
    yield terminal.paint(section.title, 1)
    if section.table is not None:
        yield from _table(section.table, terminal)
    for note in section.notes:
        for line in _wrapped(visible(note), terminal, indent=4 if note.startswith(" ") else 2):
            yield terminal.paint(line, 2)


def _table(table: Table, terminal: Terminal) -> Iterator[str]:
    rows = [[visible(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(columns(row[index]) for row in rows) for index in range(len(table.header))]
    widths[0] = min(widths[0], max(terminal.width - sum(widths[1:]) - 2 * len(widths), 12))
    for number, row in enumerate(rows):
        cells = [padded(_fit(row[0], widths[0]), widths[0])]
        cells += [padded(cell, width, is_right=True) for cell, width in zip(row[1:], widths[1:], strict=True)]
        line = "  " + "  ".join(cells)
        yield terminal.paint(line, 2) if number == 0 else line


def _fit(text: str, width: int) -> str:
    """The text, without its middle if it is too wide: its start and its end tell rows apart."""
    return text if columns(text) <= width else f"{text[: width // 2 - 2]}...{text[-(width - width // 2 - 1) :]}"


def columns(text: str) -> int:
    """Columns of a terminal that a text takes."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def padded(text: str, width: int, *, is_right: bool = False) -> str:
    space = " " * max(width - columns(text), 0)
    return space + text if is_right else text + space


def _wrapped(text: str, terminal: Terminal, indent: int) -> list[str]:
    """Lines of whole words; a word is divided only if it is wider than a line."""
    width = terminal.width - indent
    lines = [""]
    for word in text.split():
        if columns(f"{lines[-1]} {word}") <= width or not lines[-1]:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
        else:
            lines.append(word)
        while columns(lines[-1]) > width:
            end = next(end for end in range(width, 0, -1) if columns(lines[-1][:end]) <= width)
            lines[-1:] = [lines[-1][:end], lines[-1][end:]]
    return [" " * indent + line for line in lines]


# ---- Findings ----


def _findings(inspection: Inspection, terminal: Terminal) -> Iterator[str]:
    findings = inspection.findings
    title = f"Findings: {len(findings)}" if findings else "Findings: none"
    yield terminal.paint(title, 1, 33 if findings else 32)
    for finding in findings:
        yield from _finding(finding, terminal)
    for note in inspection.notes:
        for line in _wrapped(visible(note), terminal, indent=2):
            yield terminal.paint(line, 2)


def _finding(finding: Finding, terminal: Terminal) -> Iterator[str]:
    first, *rest = _wrapped(f"{finding.check}: {finding.headline}", terminal, indent=2)
    yield from (terminal.paint(line, 33) for line in (first, *rest))
    yield from _wrapped(finding.meaning, terminal, indent=4)
    for place in finding.places:
        for line in _wrapped(f"- {visible(place)}", terminal, indent=4):
            yield terminal.paint(line, 2)


# ---- Tokens ----


def _example(example: ExampleTokens, terminal: Terminal) -> Iterator[str]:
    yield terminal.paint(f"Tokens: {visible(example.title)}", 1)
    for part in example.parts:
        cut = f", {part.num_cut:,} more cut" if part.num_cut else ""
        yield f"  {part.role}: {len(part.tokens):,} tokens, {part.state}{cut}"
        yield from _token_lines(part, terminal)


def _token_lines(part: Part, terminal: Terminal) -> Iterator[str]:
    """Tokens above their ids, in columns. Of a long part the first and last lines."""
    lines = _token_rows(part.tokens, terminal.width - 4)
    half = MAX_TOKEN_LINES // 2
    hidden = lines[half : len(lines) - half] if len(lines) > MAX_TOKEN_LINES else []
    for number, tokens in enumerate(lines):
        if hidden and number == half:
            yield f"    ... {sum(map(len, hidden)):,} tokens ..."
        if hidden and half <= number < len(lines) - half:
            continue
        texts, ids = [], []
        for token in tokens:
            width = _width(token, terminal.width - 4)
            text = _fit(token.text, width)
            text = text if token is tokens[-1] else padded(text, width)
            codes = (1, 35) if token.is_special else (32,) if token.is_used else (2,)
            texts.append(terminal.paint(text, *codes))
            ids.append(padded(str(token.id), width))
        yield "    " + " ".join(texts)
        yield terminal.paint("    " + " ".join(ids).rstrip(), 2)


def _width(token: Token, limit: int) -> int:
    return min(max(columns(token.text), len(str(token.id))), limit)


def _token_rows(tokens: Sequence[Token], width: int) -> list[list[Token]]:
    """Tokens by line."""
    rows: list[list[Token]] = []
    used = width
    for token in tokens:
        size = _width(token, width) + 1
        if used + size > width + 1:
            rows.append([])
            used = 0
        rows[-1].append(token)
        used += size
    return rows
