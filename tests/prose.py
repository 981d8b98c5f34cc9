"""Count relative words (which, that, what, who) in comments, docstrings, YAML comments and Markdown.

    python -m tests.prose [PATH ...]

Prints the number per 1,000 words of each file with at least one, and of the whole tree last.
"""

import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELATIVE = re.compile(r"\b(which|what|that|whose|who|whom)\b", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
SKIPPED = {"outputs", "multirun", "results", "mutants", "__pycache__", "wandb"}  # beside hidden directories


def tree_files(*suffixes: str, root: Path = ROOT) -> list[Path]:
    """Files with these suffixes, without environments, caches and results."""
    found: list[Path] = []
    for folder, directories, names in os.walk(root):
        directories[:] = [name for name in directories if name not in SKIPPED and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(found)


def python_prose(source: str) -> Iterator[str]:
    """Docstrings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def prose(path: Path) -> str:
    """All prose of a file; Markdown without its code."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return "\n".join(python_prose(source))
    if path.suffix == ".md":
        return re.sub(r"```.*?```|`[^`]*`", "", source, flags=re.DOTALL)
    return "\n".join(line for line in source.splitlines() if line.lstrip().startswith("#"))


def count(path: Path) -> tuple[int, int]:
    """(relative words, words) in a file."""
    text = prose(path)
    return len(RELATIVE.findall(text)), len(WORD.findall(text))


def per_1000(counts: Iterable[tuple[int, int]]) -> float:
    num_relative, num_words = (sum(numbers) for numbers in zip(*counts, strict=True))
    return 1000 * num_relative / max(1, num_words)


def prose_files() -> list[Path]:
    return tree_files(".py", ".yaml", ".yml", ".md")


def main(arguments: Sequence[str]) -> None:
    paths = [Path(argument) for argument in arguments] or prose_files()
    counts = {path: count(path) for path in paths}
    for path in sorted(paths, key=lambda path: per_1000([counts[path]])):
        if counts[path][0]:
            print(f"{per_1000([counts[path]]):6.1f} {path}")
    print(f"{per_1000(counts.values()):6.1f} in all")


if __name__ == "__main__":
    main(sys.argv[1:])
