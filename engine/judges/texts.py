"""Prompts and transcripts of a judge."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The prompt of the judge. Braces around other words, and those in the replaced texts, stay."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match.group(1), match.group(0))), template)


def append_line(path: Path, line: str) -> None:
    """Append a line in one write: other ranks append to the same file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, line.encode(errors="backslashreplace") + b"\n")
    finally:
        os.close(file)
