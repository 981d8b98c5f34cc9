"""Losses of the whole batch: by hand, and their gradient against one pass over all examples."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.step.first_pass import FirstPass, gather_inputs, run_whole_batch
from engine.step.metrics import MetricAccumulator
from engine.step.objectives import LossInputs, make_objective
from losses import LOSSES, aot_loss, beta_dpo_loss, beta_dpo_state
from tests.configs import make_settings
from tests.faults.test_numbers import limit_memory
from tests.runs import Program
from trainers import BasicTrainer


def logps(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Margins of the policy 4, -1, 2 and of the reference 0, 3, 1.
CHOSEN, REJECTED = logps(-8, -5, -7), logps(-12, -4, -9)
REFERENCE_CHOSEN, REFERENCE_REJECTED = logps(-9, -4, -6), logps(-9, -7, -7)
LOGPS = (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)


def test_aot_by_hand() -> None:
    policy = CHOSEN.clone().requires_grad_()
    losses, chosen, rejected = aot_loss(policy, *LOGPS[1:], beta=0.5)
    # Sorted margins: -1, 2, 4 of the policy and 0, 1, 3 of the reference, so each pair has 4 - 3, -1 - 0 and 2 - 1.
    differences = [1.0, -1.0, 1.0]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.5 * d)) for d in differences], abs=1e-15)
    losses.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.5 / (1 + math.exp(0.5 * d)) for d in differences], abs=1e-15)
    assert (chosen.tolist(), rejected.tolist()) == ([0.5, -0.5, -0.5], [-1.5, 1.5, -1])


def test_aot_of_one_pair_is_dpo_without_its_pairing() -> None:
    losses, _, _ = aot_loss(*(each[:1] for each in LOGPS), beta=0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.5 * (4 - 0)))], abs=1e-15)


def test_beta_dpo_by_hand() -> None:
    policy = CHOSEN.clone().requires_grad_()
    # Margins of log-ratios: 4 - 0, -1 - 3, 2 - 1; their mean is 1/3.
    state = beta_dpo_state(*LOGPS, torch.tensor(2.0, dtype=torch.float64))
    assert state["mean_margin"].item() == pytest.approx(0.9 * 2 + 0.1 / 3, abs=1e-15)
    losses, chosen, rejected, metrics = beta_dpo_loss(policy, *LOGPS[1:], logps(0.2).sum(), beta=0.5, alpha=0.6)
    beta = 0.5 * (1 + 0.6 * (1 / 3 - 0.2))
    margins = [4.0, -4.0, 1.0]
    assert metrics["beta"].tolist() == pytest.approx([beta] * 3, abs=1e-15)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-beta * m)) for m in margins], abs=1e-15)
    losses.sum().backward()
    assert policy.grad is not None  # beta has no gradient
    assert policy.grad.tolist() == pytest.approx([-beta / (1 + math.exp(beta * m)) for m in margins], abs=1e-15)
    assert (chosen / beta).tolist() == pytest.approx([1, -1, -1], abs=1e-14)
    assert (rejected / beta).tolist() == pytest.approx([-3, 3, -2], abs=1e-14)


def test_beta_of_beta_dpo_stays_positive() -> None:
    _, _, _, metrics = beta_dpo_loss(*LOGPS, logps(100).sum(), beta=0.5, alpha=0.6)
    assert metrics["beta"].tolist() == [1e-3] * 3


@pytest.mark.parametrize("name", ["aot", "beta_dpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -1e4])
def test_extremes_have_finite_values_and_gradients(name: str, dtype: torch.dtype, value: float) -> None:
    chosen = torch.full((3,), value, dtype=dtype, requires_grad=True)
    rejected = torch.tensor([value, 0, -1e4], dtype=dtype, requires_grad=True)
    reference = torch.zeros(3, dtype=dtype)
    scalars = [torch.tensor(0.0, dtype=dtype)] if name == "beta_dpo" else []
    keywords = {"alpha": 0.6} if name == "beta_dpo" else {}
    losses = LOSSES[name].function(chosen, rejected, reference, reference, *scalars, beta=0.1, **keywords)[0]
    losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert all(each.isfinite().all() for each in (losses, chosen.grad, rejected.grad))


@pytest.mark.parametrize("sft_weight", [0, 0.5])
def test_gradients_of_ranks_equal_one_pass_over_all(sft_weight: float) -> None:
    """Two ranks with two microbatches and one, against autograd over the whole batch."""
    objective = make_objective(make_settings("loss=aot", f"loss.sft_weight={sft_weight}").loss)
    columns = [each.clone().requires_grad_() for each in (*LOGPS, CHOSEN / 4)]
    weights = logps(1, 2, 0.5)
    truth = objective.losses(LossInputs(columns[:4], columns[4], weights), [], MetricAccumulator()).mean()
    expected = torch.autograd.grad(truth, columns[:2] + columns[4:], materialize_grads=True)

    def inputs_of(examples: slice) -> LossInputs:
        values = [column.detach()[examples] for column in columns]
        return LossInputs(values[:4], values[4], weights[examples])

    places = [[slice(0, 1), slice(1, 2)], [slice(2, 3)]]
    totals = torch.zeros(6, 3, dtype=torch.float64)
    gathered = []

    def add(own: Tensor) -> None:  # the sum over ranks, one after the other
        totals.add_(own)

    def all_reduce_sum(own: Tensor) -> None:
        own.copy_(totals)

    for parts in places:
        local = slice(parts[0].start, parts[-1].stop)
        gather_inputs([inputs_of(part) for part in parts], local, 3, add)
    for parts in places:
        local = slice(parts[0].start, parts[-1].stop)
        whole = gather_inputs([inputs_of(part) for part in parts], local, 3, all_reduce_sum)
        metrics = MetricAccumulator()
        first = run_whole_batch(objective, whole, local, FirstPass([], {}), metrics)
        means = metrics.reduce(lambda totals: None).means
        assert means["loss"].item() == pytest.approx(
            objective.losses(LossInputs(columns[:4], columns[4], weights), [], MetricAccumulator())[local].mean().item()
        )
        for part in parts:
            values = [each.detach()[part].clone().requires_grad_() for each in columns]
            inputs = LossInputs(values[:4], values[4], weights[part])
            inside = slice(part.start - local.start, part.stop - local.start)
            first.surrogate(inputs, inside).backward()
            for value, gradient in zip(values[:2] + values[4:], expected, strict=True):
                assert value.grad is not None
                assert value.grad.tolist() == pytest.approx(gradient[part].tolist(), abs=1e-15)
        gathered.append(whole)
    assert all(torch.equal(a, b) for a, b in zip(gathered[0].columns, gathered[1].columns, strict=True))


def test_step_0_of_aot_compares_sorted_margins_of_equal_models(program: Program) -> None:
    run = program.ok("loss=aot", "n_examples=4")
    assert run.steps[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    assert run.steps[0]["rewards_train/margins"] == 0


def test_evaluations_leave_the_state(program: Program) -> None:
    few, many = (program.ok("loss=beta_dpo", "batch_size=4", f"eval_every={every}") for every in (4, 16))
    assert [row["beta/train"] for row in few.steps] == [row["beta/train"] for row in many.steps]
    assert few.steps[-1]["beta/train"] != 0.1


def test_a_batch_that_runs_out_of_memory_moves_the_state_once(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("loss=beta_dpo", "batch_size=8", "model.policy_dtype=float64")
    plain = program.ok(*common)
    limit_memory(monkeypatch, max_tokens=400)
    short = program.ok(*common)
    assert "out of memory" in short.out
    assert [row["beta/train"] for row in short.steps] == pytest.approx([row["beta/train"] for row in plain.steps])


def test_a_skipped_batch_leaves_the_state(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = BasicTrainer.accumulate_gradients
    states = []

    def with_nan(trainer: BasicTrainer, *arguments: Any) -> None:
        states.append(trainer.runner.objective.state["mean_margin"].item())
        accumulate(trainer, *arguments)
        if trainer.counters["updates"] == 2:
            next(weight.grad for weight in trainer.policy.parameters() if weight.grad is not None).fill_(torch.nan)

    monkeypatch.setattr(BasicTrainer, "accumulate_gradients", with_nan)
    program.ok("loss=beta_dpo", "batch_size=4", "on_nonfinite=skip")
    assert states[2] == states[3] != states[1]
