"""Adapters under FSDP equal one process, on full and on quantised base models."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.export.saved_models import load_saved
from tests.quick import slow_except
from tests.ranks import Job, Trajectory, make_trainer, on_ranks, trajectories

pytestmark = pytest.mark.alone

FSDP, TENSOR = "trainer=FSDPTrainer", "trainer=TensorParallelTrainer"
LORA, QLORA = ("peft=lora", "peft.rank=4", "peft.bias=all"), ("peft=qlora", "peft.rank=4")
SETTINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "lora": ("qwen2", "dpo", (*LORA, "peft.full_modules=[norm]")),
    "lora-gpt2": ("gpt2", "dpo", LORA),
    "lora-live": ("llama", "dpo", ("peft=lora", "peft.rank=4", "reference=live")),
    "lora-tdpo2": ("qwen2", "tdpo2", ("peft=lora", "peft.rank=4")),  # a tied head
    "lora-checkpointed": ("llama", "sft", ("peft=lora", "peft.rank=4", "activation_checkpointing=true")),
    "qlora": ("llama", "dpo", QLORA),
    "qlora-gpt2": ("gpt2", "dpo", (*QLORA, "peft.storage_dtype=bfloat16", "peft.double_quant=false")),
    "qlora-live": ("gpt_neox", "dpo", (*QLORA, "reference=live", "peft.quant_type=fp4")),
    "qlora-int8": ("llama", "sft", (*QLORA, "peft.quant_type=int8")),
    "qlora-bf16": ("llama", "dpo", (*QLORA, "mixed_precision=bfloat16")),
    "qlora-offloaded": ("llama", "dpo", QLORA),
    "qlora-in-order": ("llama", "dpo", (*QLORA, "deterministic=true")),
    "qlora-live-checkpointed": ("llama", "dpo", (*QLORA, "reference=live", "activation_checkpointing=true")),
    "qlora-bf16-storage": ("llama", "dpo", (*QLORA, "mixed_precision=bfloat16", "peft.storage_dtype=bfloat16")),
    "freeze": ("llama", "dpo", ("freeze.first_n_layers=1", "freeze.patterns=[embed_tokens]")),
    "freeze-tensor": ("llama", "dpo", ("freeze.first_n_layers=1", "freeze.patterns=[embed_tokens]")),
    "freeze-tensor-gpt2": ("gpt2", "dpo", ("freeze.patterns=[ln_]", "reference=live")),
}
# Overrides on two processes; the default is FSDP alone.
SHARDED = {
    "qlora-offloaded": (FSDP, "fsdp.cpu_offload=true"),
    "freeze-tensor": (TENSOR,),
    "freeze-tensor-gpt2": (TENSOR,),
}


# Both trainers and kinds of adapter; `make soak` runs the others.
QUICK = ("lora-tdpo2", "qlora-gpt2", "qlora-live-checkpointed", "freeze-tensor-gpt2")
Results = tuple[dict[str, Trajectory], dict[str, Trajectory]]


@pytest.fixture(scope="module")
def quick_results(tmp_path_factory) -> Results:
    return run_all(QUICK, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory) -> Results:
    return run_all([name for name in SETTINGS if name not in QUICK], tmp_path_factory.mktemp("ranks"))


def run_all(names: Sequence[str], directory: Path) -> Results:
    """Trajectories in one process and on two."""
    jobs: dict[str, Job] = {name: (*SETTINGS[name][:2], (*SETTINGS[name][2], "n_epochs=1")) for name in names}
    sharded = [(*job[:2], (*job[2], *SHARDED.get(name, (FSDP,)))) for name, job in jobs.items()]
    basic = trajectories([*jobs.values()], directory / "basic")
    on_two = on_ranks(2, trajectories, sharded, directory / "fsdp")[0]
    return dict(zip(names, basic, strict=True)), dict(zip(names, on_two, strict=True))


@pytest.mark.parametrize("name", slow_except(SETTINGS, *QUICK))
def test_two_processes_train_as_one(name: str, request: pytest.FixtureRequest) -> None:
    results = request.getfixturevalue("quick_results" if name in QUICK else "slow_results")
    (expected_losses, expected_norms, expected), (losses, norms, weights) = (result[name] for result in results)
    tolerance = 2e-2 if "bf16" in name else 1e-5
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=tolerance, atol=1e-6)
    assert weights.keys() == expected.keys() and len(losses) == 5
    difference = sum((weights[key] - value).square().sum() for key, value in expected.items())
    assert difference.sqrt() / sum(value.square().sum() for value in expected.values()).sqrt() < tolerance


RUN: Job = ("llama", "dpo", ("peft=qlora", "peft.rank=4", "n_epochs=1", "eval_every=10"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    return model.eval()(tokens, use_cache=False).logits


def train_job(job: Job, run_dir: Path, checkpoint: Path | None = None) -> torch.Tensor:
    """Train a job in a directory common to all ranks; returns logits of the trained model."""
    trainer = make_trainer(job, run_dir)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(checkpoint)
    trainer.policy.set_attn_implementation("sdpa")
    return logits(trainer.policy)


def sharded_runs(directory: Path) -> torch.Tensor:
    job = (*RUN[:2], (*RUN[2], "trainer=FSDPTrainer", "sample_during_eval=true", "max_length=40"))
    train_job(job, directory / "fsdp")
    train_job(job, directory / "again", directory / "fsdp" / "step-20")
    train_job(job, directory / "from-basic", directory / "basic" / "step-20")
    lora = ("peft=lora", "peft.rank=4", "peft.bias=all", "peft.full_modules=[lm_head]", "n_epochs=1", "lr=1e-2", FSDP)
    return train_job(("qwen2", "sft", lora), directory / "lora")


@pytest.mark.slow
def test_any_trainer_resumes_from_a_sharded_checkpoint(tmp_path: Path) -> None:
    job = (*RUN[:2], (*RUN[2], "keep_checkpoints=null"))
    train_job(job, tmp_path / "basic")
    expected = on_ranks(2, sharded_runs, tmp_path)[0]
    saved = {name: tmp_path / name / "LATEST" for name in ("basic", "fsdp", "again", "from-basic")}
    weights = {name: load_file(path / "adapter_model.safetensors") for name, path in saved.items()}
    assert all(torch.equal(weights["again"][key], value) for key, value in weights["fsdp"].items())
    for name in ("fsdp", "from-basic"):
        for key, value in weights["basic"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-4, atol=1e-6)
    files = {path.name for path in saved["fsdp"].iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "config.json" not in files
    load_saved(str(tmp_path / "fsdp"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "base")
    assert (logits(base) - expected).abs().max() > 0.01  # it was trained
    torch.testing.assert_close(logits(load_saved(str(tmp_path / "lora")).model), expected, rtol=1e-4, atol=1e-4)
