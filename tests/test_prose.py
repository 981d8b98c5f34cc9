"""Plain words and short pieces: bounds of prose, of Python files and of functions."""

import ast
from pathlib import Path

from tests.prose import ROOT, count, per_1000, prose, prose_files, tree_files

MAX_RELATIVE = 15  # which, that, what, who in 1,000 words
MAX_FILE_LINES = 600
MORE_FILE_LINES = {"losses.py": 900}  # a catalogue
MAX_FUNCTION_LINES = 60


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_prose_of_each_kind_is_counted(tmp_path: Path) -> None:
    python_file, yaml_file, page = (tmp_path / f"x{suffix}" for suffix in (".py", ".yaml", ".md"))
    python_file.write_text('"""What is this."""\n\nthat = "which"  # that\n')
    yaml_file.write_text("which: 1\n# who knows\n")
    page.write_text("One that is. `which`\n```\nwhat\n```\n")
    assert [count(path) for path in (python_file, yaml_file, page)] == [(2, 4), (1, 2), (1, 3)]
    assert prose(yaml_file) == "# who knows"
    assert per_1000([count(python_file), count(yaml_file)]) == 500


def test_prose_has_few_relative_clauses() -> None:
    counts = {path: count(path) for path in prose_files()}
    assert len(counts) > 100
    worst = sorted(counts, key=lambda path: counts[path][0], reverse=True)[:20]
    listed = "\n".join(f"{per_1000([counts[path]]):6.1f} {shown(path)}" for path in worst)
    found = per_1000(counts.values())
    assert found < MAX_RELATIVE, f"{found:.1f} which/that/what/who per 1,000 words; split sentences in\n{listed}"


def test_python_files_are_short() -> None:
    lengths = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in tree_files(".py")}
    long = {name: length for name, length in lengths.items() if length > MORE_FILE_LINES.get(name, MAX_FILE_LINES)}
    assert not long, f"files of more than {MAX_FILE_LINES} lines; split them: {long}"


def test_functions_of_the_product_are_short() -> None:
    long: list[str] = []
    for path in tree_files(".py"):
        if "tests" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{shown(path)}:{node.lineno} {node.name}: {length} lines")
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines; split them:\n" + "\n".join(long)
