"""docs/extend.md, step by step: its blocks are applied to a copy of the repository, and its commands run there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.runs import QUICK, SMALL

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("*.py", "pyproject.toml", "Makefile", "*.md", "config", "docs", "engine", "tests", "benchmarks")
# The learning rate, warm-up and optimizer come from the page.
QUICKER = [option for option in (*QUICK, "n_eval_model_samples=2") if not option.startswith(("lr", "warmup_steps"))]
BLOCK = (
    r"```(?:python|yaml|json)\n# (?P<file>\S+?)(?:, (?P<place>[^\n]*))?\n(?P<text>.*?)```|```bash\n(?P<commands>.*?)```"
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository's files."""
    target = tmp_path / "copy"
    target.mkdir()
    for pattern in PARTS:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(path, target)
    return target


def apply(block: re.Match[str], copy: Path) -> None:
    """Do as the first line of a block says."""
    path, place, text = copy / block["file"], block["place"], block["text"]
    if place is None:
        assert not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    old = path.read_text(encoding="utf-8")
    if place == "at the end":
        new = f"{old}\n\n{text}"
    elif line := re.fullmatch(r"before `(.+)`", place):
        assert old.count(f"\n{line[1]}") >= 1
        new = old.replace(f"\n{line[1]}", f"\n{text}\n\n{line[1]}", 1)
    else:
        table = re.fullmatch(r"in `(.+)`", place)
        assert table is not None, place
        new = re.sub(
            rf"(^{table[1]}(?:: [^=]+)? = {{\n.*?)(^}})",
            lambda found: found[1] + text + found[2],
            old,
            flags=re.S | re.M,
        )
    assert new != old
    path.write_text(new, encoding="utf-8")


def run(command: str, copy: Path, home: Path) -> str:
    """Run a command of the page in the copy; returns what it printed."""
    words = shlex.split(command)
    if words == ["make", "docs"]:
        words = ["python", "-m", "docs.make_config"]  # as in the Makefile, with this Python
    assert words[0] == "python"
    if words[1] == "train.py":
        sizes = [] if re.search("architecture|small-neox", command) else SMALL
        words += [*sizes, *QUICKER, "n_examples=4", f"local_dirs=[{home}]"]
    result = subprocess.run(
        [sys.executable, *words[1:]],
        capture_output=True,
        text=True,
        cwd=copy,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def settings(printed: str) -> DictConfig:
    """The config of the run with this output."""
    loaded = OmegaConf.load(Path(printed.splitlines()[-1].removeprefix("run_dir: "), "config.yaml"))
    assert isinstance(loaded, DictConfig)
    return loaded


@pytest.mark.slow
def test_the_page_does_as_it_says(copy: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    output: dict[str, str] = {}
    changed: set[str] = set()
    assert len(re.findall(BLOCK, page, re.S)) == page.count("```") / 2
    for block in re.finditer(BLOCK, page, re.S):
        if block["commands"] is None:
            apply(block, copy)
            changed.add(block["file"])
        else:
            output |= {command: run(command, copy, tmp_path) for command in block["commands"].splitlines()}

    quadratic = settings(output["python train.py loss=quadratic loss.margin=0.5"])
    assert (quadratic.loss.name, quadratic.loss.margin, quadratic.loss.beta) == ("quadratic", 0.5, 0.1)
    assert (quadratic.lr, quadratic.optimizer, quadratic.warmup_steps) == (1e-7, "AdamW", 20)
    xyz = output["python train.py loss=dpo loss.beta=0.1 datasets=xyz data_dir=DATA"]
    assert "train: 2 rows, 2 prompts, 2 pairs" in xyz and settings(xyz).datasets == ["xyz"]
    neox = settings(output["python train.py model=small-neox loss=dpo loss.beta=0.1"])
    assert neox.model.architecture.model_type == "gpt_neox"
    experiment = settings(output["python train.py +experiment=quadratic_films"])
    assert (experiment.loss.name, experiment.lr, experiment.loss.margin) == ("quadratic", 1e-4, 0.5)

    assert "loss=quadratic" in (copy / "docs" / "config.md").read_text(encoding="utf-8")
    python = [file for file in changed if file.endswith(".py")]
    for check in (["check"], ["format", "--check"]):
        ruff = subprocess.run([sys.executable, "-m", "ruff", *check, *python], cwd=copy, capture_output=True, text=True)
        assert ruff.returncode == 0, ruff.stdout


def test_a_new_loss_may_set_defaults_of_its_stage(tmp_path: Path) -> None:
    """Defaults of a loss's YAML are overridden by the command line."""
    from hydra import compose, initialize_config_dir

    shutil.copytree(ROOT / "config", tmp_path / "config")
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    text = re.search(r"# config/loss/quadratic.yaml\n(.*?)```", page, re.S)
    assert text is not None
    (tmp_path / "config" / "loss" / "quadratic.yaml").write_text(text[1])
    with initialize_config_dir(str(tmp_path / "config"), version_base=None):
        config = compose("config", overrides=["loss=quadratic"])
        assert (config.lr, config.optimizer, config.loss.name, config.seed) == (1e-7, "AdamW", "quadratic", 0)
        config = compose("config", overrides=["loss=quadratic", "lr=1e-3", "loss.beta=3"])
        assert (config.lr, config.loss.beta, config.warmup_steps) == (1e-3, 3, 20)
