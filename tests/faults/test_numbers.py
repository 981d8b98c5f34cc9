"""Batches whose loss is not a number never reach the optimizer; nor do those that memory has no room for cost a run."""

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

from engine.checkpoint import tensors_of
from engine.metrics import Sums
from engine.sharding import own
from engine.tokenization import Example
from tests.faults.processes import TIMINGS, TWO, assert_whole, command, complete, saved
from tests.faults.processes import rows as written
from tests.runs import Program, Run
from trainers import BasicTrainer, Batch, Prepared, Step

# Eight updates, a checkpoint after each second one.
COMMON = ("optimizer=AdamW", "n_examples=32", "save_every=8", "keep_checkpoints=null", "eval_every=16")


def rows(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in run.metrics]


def weights(directory: Path) -> dict[str, Tensor]:
    return dict(tensors_of(directory, "model")) | dict(tensors_of(directory, "optimizer"))


def equal(ours: Path, theirs: Path) -> bool:
    first, second = weights(ours), weights(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss of updates not a number, or their gradient alone."""

    def set_up(*updates: int, what: str = "loss", value: float = math.inf) -> None:
        add_gradients = BasicTrainer.add_gradients

        def broken(trainer: BasicTrainer, batch: Batch, sums: Sums) -> None:
            add_gradients(trainer, batch, sums)
            if trainer.counters["updates"] + 1 in updates:
                if what == "loss":
                    sums.add(loss=torch.tensor([value]))
                else:
                    next(p for p in trainer.policy.parameters() if p.grad is not None).grad.view(-1)[3] = value

        monkeypatch.setattr(BasicTrainer, "add_gradients", broken)

    return set_up


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step is logged when the next one has been started, and the optimizer looks at what is finite."""
    monkeypatch.setattr(BasicTrainer, "runs_ahead", property(lambda self: self.config.on_nonfinite != "rollback"))


@pytest.mark.parametrize("what, value", [("loss", math.inf), ("loss", math.nan), ("gradient", math.nan)])
def test_the_run_ends_and_leaves_what_it_takes_to_find_out(
    program: Program, breaking: Callable[..., None], what: str, value: float
) -> None:
    breaking(4, what=what, value=value)
    run_dir = program.directory / "run"
    run = program(*COMMON, f"local_run_dir={run_dir}")
    assert run.status == 5 and run.err.count("\n") == 1
    assert run.err.startswith("error[NONFINITE] update 4 had ") and "nonfinite-4.json" in run.err
    dump = json.loads((run_dir / "nonfinite-4.json").read_text())
    assert dump["update"] == 4 and len(dump["examples"]) == 4
    assert str(sorted({example["prompt_index"] for example in dump["examples"]})) in run.err
    assert [path.name for path in sorted(run_dir.glob("step-*"))] == ["step-8"]
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    assert logged[-1]["counters/updates"] == 3


def test_the_dump_has_the_batch(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is infinite for one answer: all of its batch is in the dump, so that it can be had again."""
    batches: list[list[Example]] = []
    step = BasicTrainer.step

    def noting(trainer: BasicTrainer, batch: Batch) -> Step:
        batches.append(batch.examples)
        return step(trainer, batch)

    monkeypatch.setattr(BasicTrainer, "step", noting)
    program.ok(*COMMON)
    bad = batches[2][1].responses[0]
    run_microbatch = BasicTrainer.run_microbatch

    def overflowing(trainer: BasicTrainer, prepared: Prepared, num_examples: int, sums: Sums) -> Tensor:
        found = any(np.array_equal(response, bad) for _, response in prepared[0].responses)
        if found and torch.is_grad_enabled():
            sums.add(loss=torch.tensor([math.inf]))
        return run_microbatch(trainer, prepared, num_examples, sums)

    monkeypatch.setattr(BasicTrainer, "run_microbatch", overflowing)
    run_dir = program.directory / "run"
    assert program(*COMMON, f"local_run_dir={run_dir}").status == 5
    (path,) = run_dir.glob("nonfinite-*.json")
    dump = json.loads(path.read_text())
    assert dump["loss"] == "inf"
    assert dump["examples"] == [
        {"prompt_index": e.prompt_index, "prompt": e.prompt.tolist(), "responses": [r.tolist() for r in e.responses]}
        for e in batches[dump["update"] - 1]
    ]


def test_skipped_batches_are_counted(program: Program, breaking: Callable[..., None]) -> None:
    breaking(2, 5)
    run = program.ok(*COMMON, "on_nonfinite=skip")
    assert [row["counters/updates"] for row in run.steps] == [1, 3, 4, 6, 7, 8]
    assert [row.get("counters/skipped") for row in run.steps] == [None, 1, 1, 2, 2, 2]
    assert run.out.count(": skipped") == 2
    assert not equal(run.dir / "step-8", run.dir / "step-16")
    assert all(value.isfinite().all() for value in weights(run.dir / "LATEST").values())
    counters = json.loads((run.dir / "LATEST" / "training_state.json").read_text())["counters"]
    assert counters == {"examples": 32, "updates": 8, "skipped": 2}


def test_a_skipped_batch_changes_no_weight(program: Program, breaking: Callable[..., None]) -> None:
    breaking(3, 4)
    run = program.ok(*COMMON, "on_nonfinite=skip", "n_examples=16")
    assert equal(run.dir / "step-8", run.dir / "step-16")


def test_skipping_has_an_end(program: Program, breaking: Callable[..., None]) -> None:
    breaking(2, 4, 6)
    run = program(*COMMON, "on_nonfinite=skip", "max_nonfinite=2", f"local_run_dir={program.directory / 'run'}")
    assert run.status == 5 and "more than max_nonfinite=2 batches" in run.err and "update 6" in run.err


def test_rolling_back_takes_the_weights_of_the_last_checkpoint(program: Program, breaking: Callable[..., None]) -> None:
    breaking(4)
    run = program.ok(*COMMON, "on_nonfinite=rollback", "n_examples=16")
    assert "back to the weights of step-8, on with the next batch" in run.out
    assert equal(run.dir / "step-8", run.dir / "step-16")
    assert [row["counters/updates"] for row in run.steps] == [1, 2, 3]
    breaking(1)
    first = program(*COMMON, "on_nonfinite=rollback", f"local_run_dir={program.directory / 'first'}")
    assert first.status == 5 and "no checkpoint to roll back to" in first.err


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_a_step_that_is_logged_late_is_the_same(
    program: Program, breaking: Callable[..., None], request: pytest.FixtureRequest, optimizer: str
) -> None:
    """Fused optimizers decide by themselves whether to step; others are told. Also in a run that goes on."""
    breaking(2, 5, 8)
    common = (*COMMON, f"optimizer={optimizer}", "on_nonfinite=skip", "save_every=12", "eval_every=12")
    plain = program.ok(*common)
    request.getfixturevalue("ahead")
    late = program.ok(*common)
    assert rows(late) == rows(plain)
    assert equal(late.dir / "LATEST", plain.dir / "LATEST")
    resumed = program.ok(*common, f"resume={plain.dir}/step-12", f"local_run_dir={program.directory / 'b'}")
    assert rows(resumed) == [row for row in rows(plain) if row["counters/examples"] > 12]
    assert equal(resumed.dir / "LATEST", plain.dir / "LATEST")


@pytest.mark.usefixtures("ahead")
def test_a_step_that_is_logged_late_aborts_the_run_all_the_same(
    program: Program, breaking: Callable[..., None]
) -> None:
    breaking(4)
    run_dir = program.directory / "run"
    run = program(*COMMON, f"local_run_dir={run_dir}")
    assert run.status == 5 and run.err.startswith("error[NONFINITE] update 4 had loss inf")
    assert [path.name for path in run_dir.glob("step-*")] == ["step-8"]


def test_parameters_without_a_gradient_are_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    place_model = BasicTrainer.place_model

    def with_more(trainer: BasicTrainer, dtype: torch.dtype) -> Any:
        model = place_model(trainer, dtype)
        model.idle = nn.Linear(2, 2)
        model.frozen = nn.Linear(2, 2).requires_grad_(False)
        return model

    monkeypatch.setattr(BasicTrainer, "place_model", with_more)
    run = program()
    assert run.status == 2 and run.err.count("\n") == 1
    assert "2 parameters received no gradient: idle.weight, idle.bias;" in run.err


# ---- Memory ----


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> None:
    """Let memory run out in microbatches of more tokens than that, half-way through the forward pass."""
    run_microbatch = BasicTrainer.run_microbatch

    def running(trainer: BasicTrainer, prepared: Prepared, num_examples: int, sums: Sums) -> Tensor:
        loss = run_microbatch(trainer, prepared, num_examples, sums)
        if torch.is_grad_enabled() and prepared[0].num_tokens > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore of it")
        return loss

    monkeypatch.setattr(BasicTrainer, "run_microbatch", running)


def test_out_of_memory_halves_the_budget_and_changes_no_gradient(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("loss=dpo", "loss.beta=0.1", *COMMON, "batch_size=8", "model.policy_dtype=float64", "token_budget=4096")
    plain = program.ok(*common)
    short_of_memory(monkeypatch, 300)
    short = program.ok(*common)
    said = [line for line in short.out.splitlines() if line.startswith("out of memory (CUDA out of memory.")]
    budgets = [int(line.split("token_budget is ")[1].split()[0].replace(",", "")) for line in said]
    assert budgets and budgets[-1] >= 100 and all(b <= a / 2 for a, b in pairwise(budgets))
    for row, other in zip(short.metrics, plain.metrics, strict=True):
        assert row["counters/examples"] == other["counters/examples"]
        for key in ("loss/train", "grad_norm", "loss/eval"):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-6), key
    ours, theirs = weights(short.dir / "LATEST"), weights(plain.dir / "LATEST")
    for name, value in theirs.items():
        if "exp_avg" not in name:
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name


def test_out_of_memory_with_one_example(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 20)
    run = program(*COMMON)
    assert run.status == 8 and run.err.count("\n") == 1
    assert run.err.startswith("error[MEMORY] out of memory with one example at a time (CUDA out of memory.")
    assert "activation_checkpointing=true" in run.err and "max_length" in run.err


# ---- On several ranks ----


def poison(what: str, rank: int) -> None:
    """Have a rank of those that this is called in find the loss of update 3, or its own share of the gradient, not a
    number."""
    fitted_gradients = BasicTrainer.fitted_gradients

    def broken(trainer: BasicTrainer, batch: Batch) -> tuple[Batch, Sums]:
        batch, sums = fitted_gradients(trainer, batch)
        if trainer.counters["updates"] == 2 and trainer.rank == rank:
            if what == "loss":
                sums.add(loss=torch.tensor([math.nan]))
            else:
                gradients = [own(p.grad) for p in trainer.policy.parameters() if p.grad is not None]
                next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = math.nan
        return batch, sums

    BasicTrainer.fitted_gradients = broken  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("what, trainer", [("gradient", "FSDPTrainer"), ("loss", "TensorParallelTrainer")])
def test_ranks_skip_alike(inputs: Path, tmp_path: Path, what: str, trainer: str) -> None:
    """Though only one of them has seen it, and as one process would."""
    settings = ("on_nonfinite=skip", "n_examples=24", "save_every=24", "sample_during_eval=false")
    found = []
    for num, overrides in ((1, ()), (2, TWO[trainer])):
        run_dir = tmp_path / f"on-{num}"
        arguments = command(inputs, run_dir, *settings, *overrides)
        status, out, err = complete(arguments, tmp_path / "output", num, prepare=partial(poison, what, num - 1))
        assert status == 0 and out.count(": skipped") == 1, err
        steps = [row for row in written(run_dir) if "loss/train" in row]
        assert [row["counters/updates"] for row in steps] == [1, 2, 4, 5, 6] and steps[-1]["counters/skipped"] == 1
        found.append((steps, weights(run_dir / "LATEST")))
    (steps, theirs), (expected_steps, expected) = found
    for row, other in zip(steps, expected_steps, strict=True):
        assert row["loss/train"] == pytest.approx(other["loss/train"], rel=1e-5)
    for name, value in expected.items():
        assert torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_ranks_abort_or_roll_back_alike(inputs: Path, tmp_path: Path, what: str) -> None:
    prepare = partial(poison, what, 1)
    abort, rollback = (
        command(
            inputs, tmp_path / how, *TWO["FSDPTrainer"], f"on_nonfinite={how}", "n_examples=16", "keep_checkpoints=null"
        )
        for how in ("abort", "rollback")
    )
    status, _, err = complete(abort, tmp_path / "output", 2, prepare=prepare)
    assert status == 5 and err.startswith("error[NONFINITE] rank 0: update 3 had ") and err.count("\n") == 1
    assert saved(tmp_path / "abort")[-1] == "step-8" and (tmp_path / "abort" / "nonfinite-3.json").exists()
    assert_whole(tmp_path / "abort")
    status, out, err = complete(rollback, tmp_path / "output", 2, prepare=prepare)
    assert status == 0 and "back to the weights of step-8, on with the next batch" in out, err
    assert equal(tmp_path / "rollback" / "step-8", tmp_path / "rollback" / "step-12")
    assert not equal(tmp_path / "rollback" / "step-12", tmp_path / "rollback" / "step-16")
