"""Batches with a NaN or Inf loss never reach the optimizer; out of memory does not end a run."""

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.data.examples import Example
from engine.models.shards import local_shard
from engine.models.weight_files import tensors_of
from engine.placement.placement import Placement
from engine.step.first_pass import FirstPass
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import Batch, MicrobatchRunner, Prepared
from tests.faults.processes import TIMINGS, TWO_RANK_TRAINERS, assert_checkpoints_intact, command, complete, saved
from tests.faults.processes import rows as rows_of
from tests.quick import slow_except
from tests.runs import Program, Run
from trainers import BasicTrainer, Step

# Eight updates, a checkpoint after every second one.
COMMON = ("optimizer=AdamW", "n_examples=32", "save_every=8", "keep_checkpoints=null", "eval_every=16")


def rows(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in run.metrics]


def weights(directory: Path) -> dict[str, Tensor]:
    return dict(tensors_of(directory, "model")) | dict(tensors_of(directory, "optimizer"))


def equal(ours: Path, theirs: Path) -> bool:
    first, second = weights(ours), weights(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)


@pytest.fixture
def make_nonfinite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the loss, or only the gradient, of given updates to NaN or Inf."""

    def set_up(*updates: int, target: str = "loss", value: float = math.inf) -> None:
        accumulate_gradients = BasicTrainer.accumulate_gradients

        def broken(trainer: BasicTrainer, batch: Batch, sums: MetricAccumulator) -> None:
            accumulate_gradients(trainer, batch, sums)
            if trainer.counters["updates"] + 1 in updates:
                if target == "loss":
                    sums.add(loss=torch.tensor([value]))
                else:
                    next(p for p in trainer.policy.parameters() if p.grad is not None).grad.view(-1)[3] = value

        monkeypatch.setattr(BasicTrainer, "accumulate_gradients", broken)

    return set_up


@pytest.fixture
def deferred_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step is logged after the next one has begun; the optimizer checks for NaN and Inf."""
    monkeypatch.setattr(BasicTrainer, "runs_ahead", property(lambda self: self.settings.on_nonfinite != "rollback"))


@pytest.mark.parametrize("target, value", [("loss", math.inf), ("loss", math.nan), ("gradient", math.nan)])
def test_the_run_aborts_and_leaves_a_dump(
    program: Program, make_nonfinite: Callable[..., None], target: str, value: float
) -> None:
    make_nonfinite(4, target=target, value=value)
    run_dir = program.directory / "run"
    run = program(*COMMON, f"local_run_dir={run_dir}")
    assert run.status == 5 and run.err.count("\n") == 1
    assert run.err.startswith("error[NONFINITE] update 4 has ") and "nonfinite-4.json" in run.err
    dump = json.loads((run_dir / "nonfinite-4.json").read_text())
    assert dump["update"] == 4 and len(dump["examples"]) == 4
    assert str(sorted({example["prompt_index"] for example in dump["examples"]})) in run.err
    assert [path.name for path in sorted(run_dir.glob("step-*"))] == ["step-8"]
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    assert logged[-1]["counters/updates"] == 3


def test_the_dump_holds_the_batch(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is infinite for one response; the dump holds the whole batch, to reproduce it."""
    batches: list[list[Example]] = []
    step = BasicTrainer.step

    def noting(trainer: BasicTrainer, batch: Batch) -> Step:
        batches.append(batch.examples)
        return step(trainer, batch)

    monkeypatch.setattr(BasicTrainer, "step", noting)
    program.ok(*COMMON)
    bad = batches[2][1].responses[0]
    run_microbatch = MicrobatchRunner.loss

    def overflowing(
        runner: MicrobatchRunner, prepared: Prepared, num: int, first: FirstPass, sums: MetricAccumulator, start: int
    ) -> Tensor:
        found = any(np.array_equal(response, bad) for _, response in prepared[0].responses)
        if found and torch.is_grad_enabled():
            sums.add(loss=torch.tensor([math.inf]))
        return run_microbatch(runner, prepared, num, first, sums, start)

    monkeypatch.setattr(MicrobatchRunner, "loss", overflowing)
    run_dir = program.directory / "run"
    assert program(*COMMON, f"local_run_dir={run_dir}").status == 5
    (path,) = run_dir.glob("nonfinite-*.json")
    dump = json.loads(path.read_text())
    assert dump["loss"] == "inf"
    assert dump["examples"] == [
        {"prompt_index": e.prompt_index, "prompt": e.prompt.tolist(), "responses": [r.tolist() for r in e.responses]}
        for e in batches[dump["update"] - 1]
    ]


def test_skipped_batches_are_counted(program: Program, make_nonfinite: Callable[..., None]) -> None:
    make_nonfinite(2, 5)
    run = program.ok(*COMMON, "on_nonfinite=skip")
    assert [row["counters/updates"] for row in run.steps] == [1, 3, 4, 6, 7, 8]
    assert [row.get("counters/skipped") for row in run.steps] == [None, 1, 1, 2, 2, 2]
    assert run.out.count(": skipped") == 2
    assert not equal(run.dir / "step-8", run.dir / "step-16")
    assert all(value.isfinite().all() for value in weights(run.dir / "LATEST").values())
    counters = json.loads((run.dir / "LATEST" / "training_state.json").read_text())["counters"]
    assert counters == {"examples": 32, "updates": 8, "skipped": 2}


def test_a_skipped_batch_changes_no_weight(program: Program, make_nonfinite: Callable[..., None]) -> None:
    make_nonfinite(3, 4)
    run = program.ok(*COMMON, "on_nonfinite=skip", "n_examples=16")
    assert equal(run.dir / "step-8", run.dir / "step-16")


def test_too_many_skipped_batches_abort_the_run(program: Program, make_nonfinite: Callable[..., None]) -> None:
    make_nonfinite(2, 4, 6)
    run = program(*COMMON, "on_nonfinite=skip", "max_nonfinite=2", f"local_run_dir={program.directory / 'run'}")
    assert run.status == 5 and "more than max_nonfinite=2 batches" in run.err and "update 6" in run.err


def test_a_rollback_restores_the_last_checkpoint(program: Program, make_nonfinite: Callable[..., None]) -> None:
    make_nonfinite(4)
    run = program.ok(*COMMON, "on_nonfinite=rollback", "n_examples=16")
    assert "rolled back to step-8, training continues with the next batch" in run.out
    assert equal(run.dir / "step-8", run.dir / "step-16")
    assert [row["counters/updates"] for row in run.steps] == [1, 2, 3]
    make_nonfinite(1)
    first = program(*COMMON, "on_nonfinite=rollback", f"local_run_dir={program.directory / 'first'}")
    assert first.status == 5 and "no checkpoint to roll back to" in first.err


@pytest.mark.parametrize("optimizer", slow_except(["AdamW", "SGD", "RMSprop"], "AdamW"))
def test_deferred_logging_does_not_change_a_step(
    program: Program, make_nonfinite: Callable[..., None], request: pytest.FixtureRequest, optimizer: str
) -> None:
    """Fused optimizers skip by themselves, others by request; also after a resume."""
    make_nonfinite(2, 5, 8)
    common = (*COMMON, f"optimizer={optimizer}", "on_nonfinite=skip", "save_every=12", "eval_every=12")
    plain = program.ok(*common)
    request.getfixturevalue("deferred_logging")
    late = program.ok(*common)
    assert rows(late) == rows(plain)
    assert equal(late.dir / "LATEST", plain.dir / "LATEST")
    resumed = program.ok(*common, f"resume={plain.dir}/step-12", f"local_run_dir={program.directory / 'b'}")
    assert rows(resumed) == [row for row in rows(plain) if row["counters/examples"] > 12]
    assert equal(resumed.dir / "LATEST", plain.dir / "LATEST")


@pytest.mark.usefixtures("deferred_logging")
def test_deferred_logging_still_aborts_the_run(program: Program, make_nonfinite: Callable[..., None]) -> None:
    make_nonfinite(4)
    run_dir = program.directory / "run"
    run = program(*COMMON, f"local_run_dir={run_dir}")
    assert run.status == 5 and run.err.startswith("error[NONFINITE] update 4 has loss inf")
    assert [path.name for path in run_dir.glob("step-*")] == ["step-8"]


def test_parameters_without_a_gradient_are_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    place_model = Placement.place_model

    def with_more(placement: Placement, dtype: torch.dtype) -> Any:
        model = place_model(placement, dtype)
        model.idle = nn.Linear(2, 2)
        model.frozen = nn.Linear(2, 2).requires_grad_(False)
        return model

    monkeypatch.setattr(Placement, "place_model", with_more)
    run = program()
    assert run.status == 2 and run.err.count("\n") == 1
    assert "2 parameters received no gradient: idle.weight, idle.bias;" in run.err


# ---- Memory ----


def limit_memory(monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    """Raise out of memory after the forward pass of microbatches above max_tokens."""
    run_microbatch = MicrobatchRunner.loss

    def running(runner: MicrobatchRunner, prepared: Prepared, *arguments: Any) -> Tensor:
        loss = run_microbatch(runner, prepared, *arguments)
        if torch.is_grad_enabled() and prepared[0].num_tokens > max_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore of it")
        return loss

    monkeypatch.setattr(MicrobatchRunner, "loss", running)


def test_out_of_memory_halves_the_budget_and_changes_no_gradient(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("loss=dpo", "loss.beta=0.1", *COMMON, "batch_size=8", "model.policy_dtype=float64", "token_budget=4096")
    plain = program.ok(*common)
    limit_memory(monkeypatch, 300)
    short = program.ok(*common)
    messages = [line for line in short.out.splitlines() if line.startswith("out of memory (CUDA out of memory.")]
    budgets = [int(line.split("token_budget is ")[1].split()[0].replace(",", "")) for line in messages]
    assert budgets and budgets[-1] >= 100 and all(b <= a / 2 for a, b in pairwise(budgets))
    for row, other in zip(short.metrics, plain.metrics, strict=True):
        assert row["counters/examples"] == other["counters/examples"]
        for key in ("loss/train", "grad_norm", "loss/eval"):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-6), key
    ours, theirs = weights(short.dir / "LATEST"), weights(plain.dir / "LATEST")
    for name, value in theirs.items():
        if "exp_avg" not in name:
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name


def test_a_resumed_run_keeps_its_halved_budget(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = program.directory / "run"
    common = ("loss=dpo", "loss.beta=0.1", *COMMON, "batch_size=8", "token_budget=4096", f"local_run_dir={directory}")
    budgets: list[int] = []
    accumulate_gradients = BasicTrainer.accumulate_gradients

    def recording(trainer: BasicTrainer, batch: Batch, metrics: MetricAccumulator) -> None:
        budgets.append(batch.token_budget)
        accumulate_gradients(trainer, batch, metrics)

    with monkeypatch.context() as patches:
        limit_memory(patches, 300)
        program.ok(*common, "n_examples=16")
    state = json.loads((directory / "LATEST" / "training_state.json").read_text())
    assert state["token_budget"] <= 2048
    with monkeypatch.context() as patches:
        patches.setattr(BasicTrainer, "accumulate_gradients", recording)
        resumed = program.ok(*common, "n_examples=32", "resume=auto", "resume_allow=[n_examples]")
    assert "out of memory" not in resumed.out
    assert budgets == [state["token_budget"]] * 2


def test_out_of_memory_with_one_example(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 20)
    run = program(*COMMON)
    assert run.status == 8 and run.err.count("\n") == 1
    assert run.err.startswith("error[MEMORY] out of memory with one example at a time (CUDA out of memory.")
    assert "activation_checkpointing=true" in run.err and "max_length" in run.err


# ---- Several ranks ----


def poison(target: str, rank: int) -> None:
    """Set the loss of update 3, or the local gradient, to NaN on one rank."""
    accumulate = BasicTrainer.accumulate_with_oom_retry

    def broken(trainer: BasicTrainer, batch: Batch) -> tuple[Batch, MetricAccumulator]:
        batch, sums = accumulate(trainer, batch)
        if trainer.counters["updates"] == 2 and trainer.placement.rank == rank:
            if target == "loss":
                sums.add(loss=torch.tensor([math.nan]))
            else:
                gradients = [local_shard(p.grad) for p in trainer.policy.parameters() if p.grad is not None]
                next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = math.nan
        return batch, sums

    BasicTrainer.accumulate_with_oom_retry = broken  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "target, trainer", slow_except([("gradient", "FSDPTrainer"), ("loss", "TensorParallelTrainer")], "gradient")
)
def test_ranks_skip_alike(inputs: Path, tmp_path: Path, target: str, trainer: str) -> None:
    """Only one rank has the NaN; the result equals one process."""
    settings = ("on_nonfinite=skip", "n_examples=24", "save_every=24", "sample_during_eval=false")
    found = []
    for num_ranks, overrides in ((1, ()), (2, TWO_RANK_TRAINERS[trainer])):
        run_dir = tmp_path / f"on-{num_ranks}"
        arguments = command(inputs, run_dir, *settings, *overrides)
        status, out, err = complete(
            arguments, tmp_path / "output", num_ranks, prepare=partial(poison, target, num_ranks - 1)
        )
        assert status == 0 and out.count(": skipped") == 1, err
        steps = [row for row in rows_of(run_dir) if "loss/train" in row]
        assert [row["counters/updates"] for row in steps] == [1, 2, 4, 5, 6] and steps[-1]["counters/skipped"] == 1
        found.append((steps, weights(run_dir / "LATEST")))
    (steps, theirs), (expected_steps, expected) = found
    for row, other in zip(steps, expected_steps, strict=True):
        assert row["loss/train"] == pytest.approx(other["loss/train"], rel=1e-5)
    for name, value in expected.items():
        assert torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("target", slow_except(["loss", "gradient"], "gradient"))
def test_ranks_abort_or_roll_back_alike(inputs: Path, tmp_path: Path, target: str) -> None:
    prepare = partial(poison, target, 1)
    abort, rollback = (
        command(
            inputs,
            tmp_path / how,
            *TWO_RANK_TRAINERS["FSDPTrainer"],
            f"on_nonfinite={how}",
            "n_examples=16",
            "keep_checkpoints=null",
        )
        for how in ("abort", "rollback")
    )
    status, _, err = complete(abort, tmp_path / "output", 2, prepare=prepare)
    assert status == 5 and err.startswith("error[NONFINITE] rank 0: update 3 has ") and err.count("\n") == 1
    assert saved(tmp_path / "abort")[-1] == "step-8" and (tmp_path / "abort" / "nonfinite-3.json").exists()
    assert_checkpoints_intact(tmp_path / "abort")
    status, out, err = complete(rollback, tmp_path / "output", 2, prepare=prepare)
    assert status == 0 and "rolled back to step-8, training continues with the next batch" in out, err
    assert equal(tmp_path / "rollback" / "step-8", tmp_path / "rollback" / "step-12")
    assert not equal(tmp_path / "rollback" / "step-12", tmp_path / "rollback" / "step-16")
