"""Settings: immutable, known to mypy, the same after a trip through text, and the only home of choices."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

import train
from engine.data.chat_templates import JINJA
from engine.data.forms import FORMS
from engine.placement.worker_link import Failure
from engine.settings.choices import BestMetric, RowForm, TemplateName, is_better
from engine.settings.hardware import HARDWARE, HardwareName, peak_flops
from engine.settings.keys import PEFT_GROUPS, all_keys
from engine.settings.presets import CONFIG_DIR
from engine.settings.reading import read_settings, settings_from_text, settings_to_text
from engine.settings.schema import LoraSettings, Names, QLoraSettings, Settings

ROOT = CONFIG_DIR.parent
NAMES = ("films", "hh")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose("config", overrides=list(overrides))


def read(*overrides: str) -> Settings:
    return read_settings(composed(*overrides), NAMES)


# ---- Values ----


def test_values_are_those_of_the_config():
    config = composed("loss=dpo", "loss.beta=0.25", "peft=qlora", "lr=1e-3")
    settings = read_settings(config, NAMES)
    assert (settings.lr, settings.batch_size, settings.model.name_or_path) == (1e-3, 4, "tiny")
    assert settings.loss.keywords == {"beta": 0.25, "label_smoothing": 0, "reference_free": False}
    assert (settings.loss.name, settings.loss.sft_weight) == ("dpo", 0)
    assert isinstance(settings.peft, LoraSettings) and isinstance(settings.peft, QLoraSettings)
    assert settings.source == config and settings.source is not config


def test_sft_has_no_sft_weight():
    settings = read("loss=sft")
    assert settings.loss.sft_weight == 0 and settings.loss.keywords == {}
    assert "loss.sft_weight" in all_keys()


@pytest.mark.parametrize(
    ("overrides", "is_live"),
    [
        (["loss=grpo"], True),
        (["loss=rloo"], True),
        (["loss=dapo"], False),  # beta=0
        (["loss=dapo", "reference=live"], False),
        (["loss=best_of_n"], False),
        (["loss=sft", "reference=live"], False),
        (["loss=dpo", "loss.beta=0.1"], False),
        (["loss=dpo", "loss.beta=0.1", "reference=live"], True),
        (["loss=tdpo1"], True),
    ],
)
def test_only_a_loss_with_a_reference_keeps_one(overrides, is_live):
    """Memory for a second model is reserved by it."""
    assert read(*overrides).has_live_reference == is_live


@pytest.mark.parametrize("given", ["hh", "[hh]"])
def test_one_data_set_needs_no_brackets(given):
    settings = read(f"datasets={given}")
    assert settings.datasets == ["hh"] and settings.source.datasets == ["hh"]


def test_one_data_set_of_the_environment_stays_a_name(monkeypatch):
    monkeypatch.setenv("DATA", "hh")
    settings = read("datasets=${oc.env:DATA}")
    assert settings.datasets == ["hh"]
    assert OmegaConf.is_interpolation(settings.source.datasets, 0)


def test_settings_are_immutable():
    settings = read()
    with pytest.raises(ValidationError):
        settings.lr = 1.0
    with pytest.raises(ValidationError):
        settings.model.archive = "x"
    with pytest.raises(Exception, match="read-only"):
        settings.source.lr = 1.0


def test_named_is_a_copy():
    settings = read("peft=lora")
    named = settings.named(exp_name="a", cache_dir="b", local_run_dir="c")
    assert (named.exp_name, named.cache_dir, named.local_run_dir) == ("a", "b", "c")
    assert (named.source.exp_name, named.source.cache_dir, named.source.local_run_dir) == ("a", "b", "c")
    assert settings.exp_name is None and settings.source.exp_name is None
    assert named.peft == settings.peft


def test_settings_survive_text_and_pickle(monkeypatch):
    monkeypatch.setenv("DATA", "hh")
    settings = read("loss=ipo", "loss.beta=1", "datasets=${oc.env:DATA}", "model.fsdp_policy_mp=bfloat16")
    names: Names = {"exp_name": "a" * 230, "cache_dir": "b", "local_run_dir": "c"}  # a derived name may be long
    text = settings_to_text(settings, names)
    assert "${oc.env:DATA}" in text
    settings = settings.named(**names)
    for other in (settings_from_text(text, NAMES), pickle.loads(pickle.dumps(settings))):
        assert other == settings and other.source == settings.source


def test_a_worker_reports_settings_that_it_cannot_read(monkeypatch):
    reports: list[Failure] = []
    settings = read("loss=ipo", "loss.beta=1")
    names: Names = {"exp_name": "a", "cache_dir": "b", "local_run_dir": "c"}
    text = settings_to_text(settings, names).replace("batch_size: 4", "batch_size: 0")
    monkeypatch.setattr(train.worker_link, "attach", lambda: text)
    monkeypatch.setattr(train.worker_link, "report", reports.append)
    assert train.run_worker() == 2
    assert "batch_size: must be" in reports[0].line


# ---- Choices ----


def test_choices_are_those_of_the_other_modules():
    assert set(get_args(RowForm)) == set(FORMS)
    assert set(get_args(TemplateName)) == set(JINJA)
    assert set(get_args(HardwareName)) == set(HARDWARE)
    assert {path.stem for path in (CONFIG_DIR / "peft").glob("*.yaml")} == set(PEFT_GROUPS)
    metrics = [name for names in get_args(BestMetric) for name in get_args(names)]
    assert len(metrics) == 11 and is_better("loss/eval", 1, 2) and is_better("ground_truth/win_rate", 2, 1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peak_flops(name, peak):
    assert peak_flops(name) == peak


# ---- Programs ----


def test_settings_import_no_torch():
    modules = sorted(path.stem for path in (ROOT / "engine" / "settings").glob("[!_]*.py"))
    names = ", ".join(f"engine.settings.{module}" for module in modules)
    code = f"import sys; import {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_mypy_knows_every_key(tmp_path: Path):
    lines = {
        "settings.batch_size + 1": None,
        "settings.batch_szie": '"Settings" has no attribute "batch_szie"',
        "settings.model.archiv": '"ModelSettings" has no attribute "archiv"',
        "settings.max_length + settings.optimizer": "Unsupported operand types",
        "settings.peft.rank": "has no attribute",
        "settings.peft.rank + 1 if isinstance(settings.peft, LoraSettings) else 0": None,
    }
    header = "from engine.settings.schema import LoraSettings, Settings\nsettings: Settings\n"
    (tmp_path / "snippet.py").write_text(header + "\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    run = subprocess.run([*command, str(tmp_path / "snippet.py")], cwd=ROOT, capture_output=True, text=True)
    for number, error in enumerate(lines.values(), start=3):
        reported = [line for line in run.stdout.splitlines() if f"snippet.py:{number}: error" in line]
        assert bool(reported) == (error is not None), run.stdout
        assert error is None or error in reported[0]
