"""config/experiment: each file is a whole run, composed, validated and run on a tiny model."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from engine.settings.presets import CONFIG_DIR
from tests.configs import composed, make_settings
from tests.quick import slow_except
from tests.runs import QUICK, SMALL, Program

NAMES = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
REFERENCE = (
    "datasets=[hh] exp_name={} gradient_accumulation_steps=2 eval_batch_size=32 trainer=FSDPTrainer "
    "sample_during_eval=false"
)


@pytest.mark.parametrize("name", slow_except(NAMES, "demo_dpo", "demo_grpo", "llama3_8b_se_qlora_sft"))
def test_experiment_validates_and_runs(name: str, program: Program) -> None:
    settings = make_settings(f"+experiment={name}")
    sizes = ("n_examples=4", "batch_size=4", "max_length=260", "max_prompt_length=200", "n_eval_model_samples=2")
    run = program.ok(f"+experiment={name}", "model=tiny", "datasets=films", *sizes, defaults=SMALL + QUICK)
    assert run.steps[-1]["counters/examples"] == 4
    written = OmegaConf.load(run.dir / "config.yaml")
    assert (written.loss.name, written.peft.name) == (settings.loss.name, settings.peft.name)
    assert (written.trainer, written.optimizer) == (settings.trainer, settings.optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_experiment_names_its_command(name: str) -> None:
    lines = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert any(line.startswith(f"# python train.py +experiment={name}") for line in lines)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (
            "pythia28_hh_dpo",
            f"model=pythia28 loss=dpo loss.beta=0.1 batch_size=64 model.fsdp_policy_mp=bfloat16 "
            f"{REFERENCE.format('anthropic_dpo_pythia28')}",
        ),
        (
            "pythia69_hh_dpo",
            f"model=pythia69 loss=dpo loss.beta=0.1 batch_size=32 {REFERENCE.format('anthropic_dpo_pythia69')}",
        ),
        ("pythia69_hh_sft", f"model=pythia69 loss=sft batch_size=64 {REFERENCE.format('anthropic_dpo_pythia69')}"),
    ],
)
def test_experiment_is_a_command_of_the_reference_implementation(name: str, command: str) -> None:
    assert make_settings(f"+experiment={name}") == make_settings(*command.split())


def test_the_command_line_overrides_an_experiment() -> None:
    config = composed("+experiment=pythia28_hh_dpo", "model=tiny", "loss.beta=0.5", "batch_size=8")
    assert (config.model.name_or_path, config.loss.beta, config.batch_size) == ("tiny", 0.5, 8)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("experiment=demo_sft", "+experiment=NAME"),
        ("+experiment=demo_sf", "did you mean demo_sft?"),
    ],
)
def test_a_wrong_experiment_is_explained(argument: str, problem: str, program: Program) -> None:
    run = program(argument)
    assert run.status == 2 and problem in run.err


def test_help_lists_the_experiments(program: Program) -> None:
    assert f"experiment: {', '.join(NAMES)}" in program("--help").out


def test_experiments_of_a_folder_of_ones_own(tmp_path: Path, program: Program) -> None:
    (tmp_path / "presets" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n- override /loss: dpo\n\nloss:\n  beta: 0.3\n"
    (tmp_path / "presets" / "experiment" / "mine.yaml").write_text(text)
    run = program.ok(f"--config-dir={tmp_path / 'presets'}", "+experiment=mine", "n_examples=4")
    assert OmegaConf.load(run.dir / "config.yaml").loss.beta == 0.3
