"""On a GPU: kernels against their readable twins in fp64, and training against the CPU.

`make gpu` runs these. The trainers of other tests run on a GPU too, where there is one.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.placement.memory import total_memory
from engine.placement.placement import Placement
from engine.settings.choices import TORCH_OPTIMIZERS
from engine.step.attention import Segments, packed, packed_dense
from engine.step.layout import GroupSpan, lay_out
from engine.step.logprobs import chunked_head, plain_head
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import Batch
from tests.models import pair_examples
from tests.ranks import make_trainer, trajectory
from tests.runs import Program, Run
from trainers import BasicTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ROOT = Path(__file__).resolve().parent.parent
DPO = ("loss=dpo", "loss.beta=0.1")
BF16 = "mixed_precision=bfloat16"
# One to four responses, some of one token (0 fed tokens), and prompts of one token.
GROUPS = [(150, 130, 20, 41, 0), (1, 200), (40, 0), (1, 0, 3, 0), (33, 8, 0, 257)]
NUM_TOKENS = sum(map(sum, GROUPS))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


# ---- Kernels ----


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [6, 8, 36, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention(dtype: torch.dtype, head_dim: int, num_key_heads: int, window: int | None) -> None:
    """Every path, forward and backward, against the dense mask in fp64."""
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(1, 4, NUM_TOKENS, head_dim), *[(1, num_key_heads, NUM_TOKENS, head_dim)] * 2]
    states = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    grad = torch.randn(1, NUM_TOKENS, 4, head_dim, generator=generator).to("cuda", dtype)

    def run(attention: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [state.to(dtype).requires_grad_() for state in states]
        output, _ = attention(torch.nn.Module(), *leaves, None, segments=Segments(GROUPS), sliding_window=window)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    tolerance = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for ours, dense in zip(run(packed, dtype), run(packed_dense, torch.float64), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, dense) < tolerance


@pytest.mark.parametrize("vocabulary", [61, 50257, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_head(dtype: torch.dtype, vocabulary: int, has_bias: bool) -> None:
    """Loss, log-probs and gradients against the plain head in fp64; weights stay in fp32."""
    batch = lay_out(pair_examples()).to(torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.num_tokens, 64, generator=generator).to("cuda", dtype)
    weight = (torch.randn(vocabulary, 64, generator=generator) / 4).to("cuda")
    weight = weight.to(dtype).float()  # so that both sides compute from the same numbers
    bias = torch.randn(vocabulary, generator=generator).to("cuda") if has_bias else None

    def span_loss(logps: Tensor, span: GroupSpan) -> Tensor:
        return (0.1 * logps).sigmoid().sum()

    def run(head: Callable[..., Any], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [
            (tensor if dtype is None else tensor.to(dtype)).clone().requires_grad_()
            for tensor in (hidden, weight, bias)
            if tensor is not None
        ]
        loss, logps = head(*leaves, *([] if has_bias else [None]), batch, span_loss)
        return [loss.detach(), logps, *torch.autograd.grad(loss, leaves)]

    exact = run(plain_head, torch.float64)
    for index, (ours, expected) in enumerate(zip(run(chunked_head, None), exact, strict=True)):
        is_wide = dtype == torch.float32 or index < 2  # logits and log-probs are never rounded to bf16
        assert relative_error(ours, expected) < (2e-6 if is_wide else 8e-3), index


# ---- Training ----


def on_the_cpu(function: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placement, "choose_device", lambda self: torch.device("cpu"))
        return function()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2", "mistral", "qwen2"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_training_matches_the_cpu(architecture: str, batching: str, tmp_path: Path) -> None:
    job = (architecture, "dpo", (f"batching={batching}", "n_examples=40", "n_epochs=null"))
    losses, norms, weights = trajectory(job, tmp_path / "gpu")
    expected_losses, expected_norms, expected_weights = on_the_cpu(lambda: trajectory(job, tmp_path / "cpu"))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-3, atol=1e-5)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name].cpu(), weight, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("optimizer", TORCH_OPTIMIZERS)
def test_optimizers_match_the_cpu(optimizer: str, tmp_path: Path) -> None:
    job = ("llama", "dpo", (f"optimizer={optimizer}", "n_examples=40", "n_epochs=null"))
    _, norms, weights = trajectory(job, tmp_path / "gpu")
    _, expected_norms, expected_weights = on_the_cpu(lambda: trajectory(job, tmp_path / "cpu"))
    torch.testing.assert_close(norms, expected_norms, rtol=1e-3, atol=1e-5)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name].cpu(), weight, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("reference", ["cached", "live"])
@pytest.mark.parametrize(
    "overrides",
    [(), (BF16,), ("model.policy_dtype=bfloat16",), (BF16, "peft=lora"), (BF16, "peft=qlora"), (BF16, "compile=true")],
    ids=" ".join,
)
def test_the_margin_is_exactly_0_at_first(program: Program, reference: str, overrides: tuple[str, ...]) -> None:
    if reference == "cached" and overrides == (BF16, "compile=true"):
        pytest.skip("one compilation is enough")
    run = program.ok(*DPO, f"reference={reference}", *overrides, "n_examples=8")
    assert run.steps[0]["rewards_train/margins"] == run.evals[0]["rewards_eval/margins"] == 0
    assert run.steps[0]["loss/train"] == pytest.approx(math.log(2), abs=5e-9)


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop", "SGD"])
def test_nan_batches_change_nothing(optimizer: str, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights after a run whose last batch is NaN are those before that batch."""
    common = (*DPO, f"optimizer={optimizer}", "batch_size=4", "eval_every=1000", "on_nonfinite=skip", "lr=1e-3")
    plain = program.ok(*common, "n_examples=12", f"local_run_dir={program.directory / 'plain'}", "deterministic=true")
    accumulate_gradients = BasicTrainer.accumulate_gradients

    def broken(trainer: BasicTrainer, batch: Batch, metrics: MetricAccumulator) -> None:
        accumulate_gradients(trainer, batch, metrics)
        if trainer.counters["updates"] == 3:
            next(p for p in trainer.policy.parameters() if p.grad is not None).grad.view(-1)[3] = math.nan

    monkeypatch.setattr(BasicTrainer, "accumulate_gradients", broken)
    run = program.ok(*common, "n_examples=16", f"local_run_dir={program.directory / 'nan'}", "deterministic=true")
    assert run.evals[-1]["counters/skipped"] == 1
    assert_equal_weights(run, plain)


def assert_equal_weights(run: Run, other: Run) -> None:
    from safetensors.torch import load_file

    ours, theirs = (load_file(each.dir / "LATEST" / "model.safetensors") for each in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_activation_checkpointing_changes_nothing(program: Program) -> None:
    common = (*DPO, BF16, "deterministic=true")
    plain, recomputed = (program.ok(*common, f"activation_checkpointing={value}") for value in ("false", "true"))
    assert losses_of(plain) == losses_of(recomputed)


def losses_of(run: Run) -> list[float]:
    return [row["loss/train"] for row in run.steps]


@pytest.mark.parametrize("overrides", [(), (BF16,), (BF16, "peft=qlora")], ids=" ".join)
def test_deterministic_runs_resume_bitwise(program: Program, overrides: tuple[str, ...]) -> None:
    common = (*DPO, "deterministic=true", "save_every=8", "batch_size=4", "optimizer=AdamW", *overrides)
    runs = [program.ok(*common, f"local_run_dir={program.directory / name}") for name in ("first", "second")]
    assert losses_of(runs[0]) == losses_of(runs[1])
    directory = program.directory / "stopped"
    program.ok(*common, "n_examples=8", f"local_run_dir={directory}")
    resumed = program.ok(*common, f"local_run_dir={directory}", "resume=auto", "resume_allow=[n_examples]")
    assert losses_of(resumed) == losses_of(runs[0])
    assert [row["loss/eval"] for row in resumed.evals][-1] == [row["loss/eval"] for row in runs[0].evals][-1]


@pytest.mark.parametrize("compute", [(), (BF16,)], ids=" ".join)
def test_compiled_layers_train_the_same(compute: tuple[str, ...], program: Program) -> None:
    common = (*DPO, *compute, "n_examples=16")
    plain, compiled = (program.ok(*common, f"compile={on}") for on in ("false", "true"))
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=2e-2 if compute else 1e-4)


def test_out_of_memory_halves_the_budget(program: Program) -> None:
    """A real one: the process may use 1.5 GB, and one microbatch would take more."""
    big = ("model.architecture.hidden_size=1024", "model.architecture.intermediate_size=4096")
    common = (*DPO, "batch_size=64", "n_examples=128", "token_budget=65536", "eval_batch_size=4", *big)
    plain = program.ok(*common, "do_first_eval=false")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5e9 / total_memory(torch.device("cuda")))
    try:
        short = program.ok(*common, "do_first_eval=false")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory (" in short.out and "token_budget is" in short.out
    assert losses_of(short) == pytest.approx(losses_of(plain), rel=1e-3)


def test_fsdp_in_one_process_matches_basic(tmp_path: Path) -> None:
    """Over NCCL, in processes of their own."""

    def run(name: str, *overrides: str) -> list[dict[str, Any]]:
        sizes = ["model.architecture.hidden_size=32", "model.architecture.num_attention_heads=2", "n_examples=32"]
        sizes += ["model.architecture.num_key_value_heads=2", "lr=1e-3", "warmup_steps=2", "sample_during_eval=false"]
        command = [sys.executable, "train.py", *DPO, BF16, *sizes, "wandb.enabled=false", "n_eval_examples=8"]
        command += [f"local_run_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}", *overrides]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss/train" in row]

    basic, sharded = run("basic"), run("sharded", "trainer=FSDPTrainer", "num_processes=1")
    assert len(basic) == len(sharded) == 8
    for ours, theirs in zip(sharded, basic, strict=True):
        assert ours["loss/train"] == pytest.approx(theirs["loss/train"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("overrides", [("optimizer=AdamW",), ("optimizer=RMSprop",), (BF16,)], ids=" ".join)
def test_a_step_never_waits_for_the_gpu(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """torch raises where the host would wait. Only reading the metrics of the previous step waits, on purpose."""
    trainer = make_trainer(("llama", "dpo", overrides), tmp_path)
    batches = [trainer.prepare(microbatches) for microbatches in list(trainer.train_batches())[:4]]
    trainer.step(batches[0])  # allocations, compilations and checks of the first step
    trainer.step(batches[1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [trainer.step(batch) for batch in batches[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(step.values.read()["loss/train"]) for step in steps)
