"""Iterations of online training that go wrong, or whose responses are masked."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewards import REWARDS
from tests.runs import vowels


def test_a_rollback_inside_an_iteration_moves_the_weight_of_the_kl_once(online, monkeypatch):
    num_scored = 0

    def overflows_once(prompt: str, response: str, row: Any) -> float:
        nonlocal num_scored
        num_scored += 1
        return 1e200 if num_scored == 55 else vowels(prompt, response, row)  # in the second batch of iteration 2

    monkeypatch.setitem(REWARDS, "vowels", overflows_once)
    run = online(
        *("loss=rloo", "rollout.prompts=12", "n_examples=36", "save_every=16", "do_first_eval=false"),
        *("on_nonfinite=rollback", "max_nonfinite=2", "max_grad_norm=1000"),
        *("loss.target_kl=100", "loss.kl_horizon=36", "loss.beta=0.1"),
    )
    assert run.status == 0, run.err
    assert "rolled back to step-16" in run.out
    assert [row["counters/examples"] for row in run.steps] == [4, 8, 12, 16, 24, 28, 32, 36]
    moved = [row["objective/kl_coef"] for row in run.steps if "objective/kl_coef" in row]
    assert moved == pytest.approx([0.1, 0.08, 0.064])  # a fifth below the iteration before


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_a_run_whose_responses_are_all_masked_says_so(online, loss):
    run = online(f"loss={loss}", "rollout.truncated=mask", "n_examples=16", "rollout.max_new_tokens=1")
    assert run.status == 0, run.err
    assert {row["rollout/truncated"] for row in run.steps if "rollout/truncated" in row} == {1}
    assert run.out.count("responses of an iteration are truncated, and rollout.truncated=mask") == 1
    kept = online(f"loss={loss}", "n_examples=4", "rollout.max_new_tokens=1")
    assert "responses of an iteration are truncated" not in kept.out


def test_stored_responses_are_learned_where_all_sampled_ones_are_left_out(online):
    """The critic, which has nothing to learn, stays as it is."""
    run = online(
        *("loss=ppo", "rollout.truncated=mask", "rollout.max_new_tokens=1", "n_examples=8", "do_first_eval=false"),
        *("save_every=4", "keep_checkpoints=null", "ptx.datasets=[films]", "optimizer=AdamW"),
    )
    assert run.status == 0, run.err
    policies, critics = (
        [load_file(run.dir / f"step-{step}" / f"{kind}.safetensors") for step in (4, 8)] for kind in ("model", "critic")
    )
    assert any(not torch.equal(policies[1][name], value) for name, value in policies[0].items())
    assert all(torch.equal(critics[1][name], value) for name, value in critics[0].items())
