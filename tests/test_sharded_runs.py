"""Whole runs in several processes: what they log, save and resume is what one process would."""

import contextlib
import io
import math
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import train
from engine import launch
from engine.checkpoint import tensors_of
from tests.invariants.test_runs import ARCHITECTURES, numbers
from tests.runs import Run
from tests.sharded_worker import run as run_here

WORKER = Path(__file__).with_name("sharded_worker.py")
FSDP = ("trainer=FSDPTrainer",)
TENSOR = ("trainer=TensorParallelTrainer",)
BOTH = (*FSDP, "tensor_parallel_size=2")
PACKAGE = (*TENSOR, "tensor_parallel.backend=package", "tensor_parallel_size=2")
DPO = ("loss=dpo", "loss.beta=0.1")
# The last batch and the last evaluation batch hold one example; the prompts that are sampled for divide by no number
# of processes; prompts are of several lengths.
COMMON = (
    "model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films", "wandb.enabled=false",
    "optimizer=AdamW", "lr=1e-3", "warmup_steps=2", "max_grad_norm=1.0", "batch_size=4",
    "gradient_accumulation_steps=2", "token_budget=300", "max_length=128", "max_prompt_length=96", "n_examples=21",
    "n_eval_examples=5", "eval_batch_size=4", "n_eval_model_samples=3", "eval_every=8", "keep_checkpoints=null",
)  # fmt: skip
MODEL = {name: (f"model.architecture={value}",) for name, value in ARCHITECTURES.items()}
LLAMA = MODEL["llama"]
# Not of training: what is sampled differs with the arrangement.
OF_SAMPLES = ("ground_truth/", "kl_eval")


def command(directory: Path, name: str, overrides: tuple[str, ...]) -> list[str]:
    given = {override.partition("=")[0] for override in overrides}
    defaults = (*COMMON, *LLAMA, f"cache_dir={directory / 'cache'}", f"local_run_dir={directory / name}")
    return [*(default for default in defaults if default.partition("=")[0] not in given), *overrides]


def runs_on(num: int, directory: Path, runs: dict[str, tuple[str, ...]]) -> dict[str, Run]:
    """Several runs, one after another, each on num processes, which are started once for all."""
    commands = {name: command(directory, name, overrides) for name, overrides in runs.items()}
    outs = {name: directory / f"{name}.out" for name in runs}
    if num == 1:
        for name in runs:
            run_here(commands[name], outs[name])
    else:
        config = OmegaConf.create({"runs": [[commands[name], str(outs[name])] for name in runs]})
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = launch.launch(config, num, [sys.executable, WORKER])
        assert status == 0, err.getvalue()
    return {name: Run(0, path.read_text(), "") for name, path in outs.items()}


def program(*arguments: str) -> Run:
    """`python train.py *arguments`, which starts its own workers."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["train.py", *arguments])
        status = train.main()
    return Run(status, out.getvalue(), err.getvalue())


def weights(run: Run) -> dict[str, Tensor]:
    return dict(tensors_of(run.dir / "LATEST", "model"))


def assert_same_weights(ours: Run, theirs: Run, rel: float = 1e-5) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    squares = sum((found[name] - value).square().sum() for name, value in expected.items())
    assert (squares / sum(value.square().sum() for value in expected.values())).sqrt() < rel


def assert_same(ours: Run, theirs: Run, rel: float = 1e-5, after: int = 0) -> None:
    """Both have the same rows, and the same weights; of ours those after so many examples."""
    assert len(ours.steps) and len(ours.evals)
    found, expected = ([row for row in numbers(run) if row["counters/examples"] > after - 1] for run in (ours, theirs))
    if after:  # a resumed run does not evaluate what it starts from
        expected = [row for row in expected if row["counters/examples"] > after]
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            is_known = not key.startswith(OF_SAMPLES) and not (  # before the first step, which is larger is chance
                "accuracies" in key and abs(other[key.replace("accuracies", "margins")]) < 1e-4
            )
            if is_known:  # rewards are differences of log-probs of about 100
                scale = 1e-5 if "rewards" in key else 1e-6
                assert row[key] == pytest.approx(value, rel=rel, abs=scale * rel / 1e-5), (key, row, other)
    assert_same_weights(ours, theirs, rel)


def assert_bitwise(ours: Run, theirs: Run, after: int) -> None:
    assert numbers(ours) == [row for row in numbers(theirs) if row["counters/examples"] > after]
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def assert_starts_at_zero(run: Run) -> None:
    for split, row in (("eval", run.evals[0]), ("train", run.steps[0])):
        assert row[f"rewards_{split}/margins"] == row[f"rewards_{split}/chosen"] == 0
        assert row[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-7)


# ---- The runs ----

OTHERS: dict[str, tuple[str, ...]] = {  # variants of a run, each under BasicTrainer too
    "live": (*DPO, "reference=live", "n_eval_examples=1", "n_eval_model_samples=1", "n_examples=9"),
    "padded": (*DPO, "batching=padded", "sample_during_eval=false", "n_examples=9"),
    "sft": ("loss=sft", "n_examples=9"),
    "checkpointed": (*DPO, "activation_checkpointing=true", "sample_during_eval=false", "n_examples=9"),
    "bf16": (*DPO, "mixed_precision=bfloat16", "n_examples=9", "sample_during_eval=false"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def launched(directory: Path) -> Run:
    """A run of FSDPTrainer on two processes as a user starts it."""
    cache = f"cache_dir={directory / 'cache'}"
    run = program(*command(directory, "launched", (*DPO, *FSDP, "num_processes=2", cache)))
    assert run.status == 0, run.err
    return run


@pytest.fixture(scope="module")
def basic(directory: Path, launched: Run) -> dict[str, Run]:
    """Runs of BasicTrainer; its first one finds the reference that was launched has kept."""
    runs = {"llama": DPO, "gpt2": (*DPO, *MODEL["gpt2"]), "gpt_neox": (*DPO, *MODEL["gpt_neox"]), **OTHERS}
    return runs_on(1, directory / "basic", runs)


@pytest.fixture(scope="module")
def on_two(directory: Path, launched: Run, basic: dict[str, Run]) -> dict[str, Run]:
    gpt2 = (*DPO, *MODEL["gpt2"])
    from_launched = f"resume={launched.dir}/step-8"
    runs = {f"fsdp-{name}": (*FSDP, *overrides) for name, overrides in OTHERS.items()}
    runs |= {f"tensor-{name}": (*TENSOR, *OTHERS[name]) for name in ("live", "padded", "sft", "checkpointed")}
    runs |= {
        "fsdp-offload": (*DPO, *FSDP, "fsdp.cpu_offload=true"),
        "fsdp-resumed": (*DPO, *FSDP, from_launched),
        "fsdp-from-basic": (*DPO, *FSDP, f"resume={basic['llama'].dir}/step-8"),
        "tensor": (*DPO, *TENSOR),
        "tensor-from-fsdp": (*DPO, *TENSOR, from_launched),
        "tensor-gpt2": (*gpt2, *TENSOR),
        "tensor-gpt2-resumed": (*gpt2, *TENSOR, f"resume={directory}/tensor-gpt2/step-8"),
        "tensor-gpt2-from-basic": (*gpt2, *TENSOR, f"resume={basic['gpt2'].dir}/step-8"),
    }
    return runs_on(2, directory, runs)


def test_a_launched_run_is_a_run_of_one_process(launched: Run, basic: dict[str, Run], directory: Path) -> None:
    assert_same(launched, basic["llama"])
    assert len(launched.steps) == 6 and [row["counters/examples"] for row in launched.evals] == [0, 8, 16, 21]
    assert [row["prompt"] for row in launched.samples] == [row["prompt"] for row in basic["llama"].samples]
    assert len(launched.samples) == 3 * 4
    assert all(row["policy"] and row["reference"] for row in launched.samples)
    assert_starts_at_zero(launched)
    assert launched.err == "" and launched.out.count("run directory: ") == 1
