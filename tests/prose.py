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
from collections.abc import Iterator, Sequence
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


def count(paths: Sequence[Path]) -> tuple[int, int]:
    """(relative words, words) in files."""
    texts = [prose(path) for path in paths]
    return sum(len(RELATIVE.findall(text)) for text in texts), sum(len(WORD.findall(text)) for text in texts)


def per_1000(paths: Sequence[Path]) -> float:
    num_relative, num_words = count(paths)
    return 1000 * num_relative / max(1, num_words)


def prose_files() -> list[Path]:
    return tree_files(".py", ".yaml", ".yml", ".md")


def main(arguments: Sequence[str]) -> None:
    paths = [Path(argument) for argument in arguments] or prose_files()
    for path in sorted(paths, key=lambda path: per_1000([path])):
        if count([path])[0]:
            print(f"{per_1000([path]):6.1f} {path}")
    print(f"{per_1000(paths):6.1f} in all")


if __name__ == "__main__":
    main(sys.argv[1:])
