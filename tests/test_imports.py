"""Imports between the files at the top go one way. `lint-imports` checks those inside the engine."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    ("compare",),
    ("train", "evaluate", "export", "chat", "inspect_data"),
    ("trainers",),
    ("preference_datasets",),
    ("engine",),
    ("losses", "rewards"),
    ("online_losses", "reward_losses"),
    ("utils",),
    ("process_start",),
]


def imports_of(path: Path) -> set[str]:
    """The top-level names a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", [name for layer in LAYERS for name in layer if name != "engine"])
def test_a_file_imports_only_from_lower_layers(name: str) -> None:
    index = next(index for index, layer in enumerate(LAYERS) if name in layer)
    not_below = {other for layer in LAYERS[: index + 1] for other in layer}
    assert not imports_of(ROOT / f"{name}.py") & not_below
