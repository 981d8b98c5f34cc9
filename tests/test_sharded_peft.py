"""Adapters under FSDP: the trajectory of one process, with whole and with quantised base models."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.saved_models import load_saved
from tests.ranks import Job, Trajectory, make_trainer, on_ranks, trajectories

FSDP = ("trainer=FSDPTrainer", "n_epochs=1")
LORA, QLORA = ("peft=lora", "peft.rank=4", "peft.bias=all"), ("peft=qlora", "peft.rank=4")
SETTINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "lora": ("qwen2", "dpo", (*LORA, "peft.full_modules=[norm]")),
    "lora-gpt2": ("gpt2", "dpo", LORA),
    "lora-live": ("llama", "dpo", ("peft=lora", "peft.rank=4", "reference=live")),
    "lora-checkpointed": ("llama", "sft", ("peft=lora", "peft.rank=4", "activation_checkpointing=true")),
    "qlora": ("llama", "dpo", QLORA),
    "qlora-gpt2": ("gpt2", "dpo", (*QLORA, "peft.storage_dtype=bfloat16", "peft.double_quant=false")),
    "qlora-live": ("gpt_neox", "dpo", (*QLORA, "reference=live", "peft.quant_type=fp4")),
    "qlora-int8": ("llama", "sft", (*QLORA, "peft.quant_type=int8")),
    "qlora-bf16": ("llama", "dpo", (*QLORA, "mixed_precision=bfloat16")),
    "freeze": ("llama", "dpo", ("freeze.first_n_layers=1", "freeze.patterns=[embed_tokens]")),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict[str, Trajectory], dict[str, Trajectory]]:
    directory = tmp_path_factory.mktemp("ranks")
    jobs: list[Job] = list(SETTINGS.values())
    sharded = [(architecture, loss, (*overrides, *FSDP)) for architecture, loss, overrides in jobs]
    basic = trajectories([(*job[:2], (*job[2], "n_epochs=1")) for job in jobs], directory / "basic")
    on_two = on_ranks(2, trajectories, sharded, directory / "fsdp")[0]
    return dict(zip(SETTINGS, basic, strict=True)), dict(zip(SETTINGS, on_two, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one(name: str, results) -> None:
    (expected_losses, expected_norms, expected), (losses, norms, weights) = (result[name] for result in results)
    tolerance = 2e-2 if "bf16" in name else 1e-5
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=tolerance, atol=1e-6)
    assert weights.keys() == expected.keys() and len(losses) == 5
    difference = sum((weights[key] - value).square().sum() for key, value in expected.items())
    assert difference.sqrt() / sum(value.square().sum() for value in expected.values()).sqrt() < tolerance


RUN: Job = ("llama", "dpo", ("peft=qlora", "peft.rank=4", "n_epochs=1", "eval_every=10"))


def whole_run(job: Job, run_dir: Path, checkpoint: Path | None = None) -> None:
    """Train as job says, in a directory that all ranks share."""
    trainer = make_trainer(job, run_dir)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(checkpoint)


def sharded_runs(directory: Path) -> None:
    job = (*RUN[:2], (*RUN[2], "trainer=FSDPTrainer", "sample_during_eval=true", "max_length=80"))
    whole_run(job, directory / "fsdp")
    whole_run(job, directory / "again", directory / "fsdp" / "step-20")
    whole_run(job, directory / "from-basic", directory / "basic" / "step-20")


def test_a_sharded_run_saves_what_any_run_goes_on_from(tmp_path: Path) -> None:
    job = (*RUN[:2], (*RUN[2], "keep_checkpoints=null"))
    whole_run(job, tmp_path / "basic")
    on_ranks(2, sharded_runs, tmp_path)
    saved = {name: tmp_path / name / "LATEST" for name in ("basic", "fsdp", "again", "from-basic")}
    weights = {name: load_file(path / "adapter_model.safetensors") for name, path in saved.items()}
    assert all(torch.equal(weights["again"][key], value) for key, value in weights["fsdp"].items())
    for name in ("fsdp", "from-basic"):
        for key, value in weights["basic"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-4, atol=1e-6)
    files = {path.name for path in saved["fsdp"].iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "config.json" not in files
    load_saved(str(tmp_path / "fsdp"))
