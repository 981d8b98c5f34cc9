"""Imports between the files at the top go one way. `lint-imports` checks those inside the engine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import QUICK, SMALL

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


# Packages that take a tenth of a second or more.
SLOW = "torch transformers pandas pyarrow scipy datasets peft bitsandbytes wandb sympy matplotlib aiohttp jinja2"
IMPORTED = f"print('imported:', *(name for name in {SLOW.split()} if name in sys.modules), flush=True)"
HELP = f"""
import atexit, runpy, sys
atexit.register(lambda: {IMPORTED})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FIRST_STEP = f"""
import os, sys
import process_start
process_start.begin()
import train
from engine.run.loggers import Loggers

def end(*arguments):
    {IMPORTED}
    os._exit(0)

Loggers.train = end
train.main()
"""


def imported_by(script: str, *arguments: str) -> set[str]:
    """The slow packages that a script has imported in a process of its own."""
    script = f"import sys; sys.argv = {[*arguments]}; sys.path.insert(0, '.')\n{script}"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "\nimported:" in result.stdout, result
    return set(result.stdout.rpartition("imported:")[2].split())


@pytest.mark.parametrize("name", ["train", "chat", "compare", "evaluate", "export", "inspect_data", "report"])
def test_help_needs_no_slow_imports(name: str) -> None:
    assert not imported_by(HELP, f"{name}.py", "--help")


@pytest.mark.slow
def test_training_starts_without_packages_that_it_does_not_use(tmp_path: Path) -> None:
    directories = (f"local_dirs=[{tmp_path}]", f"cache_dir={tmp_path}/cache")
    defaults = [each for each in (*SMALL, *QUICK) if not each.startswith(("wandb", "report"))]
    arguments = [*defaults, *directories, "loss=dpo", "loss.beta=0.1", "do_first_eval=false"]
    found = imported_by(FIRST_STEP, "train.py", *arguments)
    assert found <= {"torch", "transformers", "pyarrow", "scipy", "sympy", "jinja2"}, found
