"""Online training on a GPU: it learns what it sampled, resumes to the bit, and moves models to the CPU and back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewards import REWARDS
from tests.runs import QUICK, SMALL, Program, Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

BF16 = "mixed_precision=bfloat16"
DEFAULTS = (
    *(*SMALL, *QUICK, "batch_size=4", "max_length=64", "max_prompt_length=40", "sample_during_eval=true"),
    *("rollout.max_new_tokens=16", "rollout.num_responses=4", "n_eval_model_samples=2", "rewards=[vowels]"),
)
Online = Callable[..., Run]


def vowels(prompt: str, response: str, row: Any) -> float:
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


@pytest.fixture
def online(program: Program, monkeypatch: pytest.MonkeyPatch) -> Online:
    monkeypatch.setitem(REWARDS, "vowels", vowels)
    return lambda *overrides: program.ok(*overrides, defaults=DEFAULTS)


def losses_of(run: Run) -> list[float]:
    return [row["loss/train"] for row in run.steps]


@pytest.mark.parametrize("loss", ["grpo", "rloo", "online_dpo", "xpo", "ppo"])
@pytest.mark.parametrize("overrides", [(), (BF16,), (BF16, "peft=lora"), (BF16, "peft=qlora")], ids=" ".join)
def test_the_first_pass_has_the_policy_that_sampled(loss: str, overrides: tuple[str, ...], online: Online) -> None:
    num_responses = 2 if loss == "xpo" else 4
    run = online(f"loss={loss}", "rollout.epochs=1", f"rollout.num_responses={num_responses}", *overrides)
    assert len(run.steps) == 4
    for row in run.steps:
        assert row.get("policy/ratio_max", 1) == 1 and row.get("policy/approxkl", 0) == 0
    assert run.steps[0]["objective/kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("overrides", [(), (BF16, "peft=lora")], ids=" ".join)
def test_continuous_batching_samples_the_policy(overrides: tuple[str, ...], online: Online) -> None:
    run = online("loss=grpo", "rollout.engine=continuous", *overrides)
    assert all(row["policy/ratio_max"] == 1 for row in run.steps)
    assert all(0 <= row["rollout/mismatch_k3"] < 1e-2 for row in run.steps)


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_a_resumed_run_is_bitwise_the_same(loss: str, online: Online, tmp_path: Any) -> None:
    common = (f"loss={loss}", "rollout.epochs=1", BF16, "deterministic=true", "save_every=8", "optimizer=AdamW")
    whole = online(*common, f"local_run_dir={tmp_path / 'whole'}")
    directory = f"local_run_dir={tmp_path / 'stopped'}"
    online(*common, "n_examples=8", directory)
    resumed = online(*common, directory, "resume=auto", "resume_allow=[n_examples]")
    assert losses_of(resumed) == losses_of(whole)
    ours, theirs = (load_file(run.dir / "LATEST" / "model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_offload_changes_nothing(loss: str, online: Online) -> None:
    plain, moved = (online(f"loss={loss}", BF16, "deterministic=true", f"rollout.offload={on}") for on in (False, True))
    assert losses_of(plain) == losses_of(moved)
