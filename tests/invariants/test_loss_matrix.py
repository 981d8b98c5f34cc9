"""Every loss through the same equivalences: batching, splits, references, adapters, resume.

Packed against padded batches: one loss of each batch kind and need runs always. The other equivalences: FEW of them.
The others run with the slow tests.
"""

import pytest
import torch

from losses import LOSSES
from tests.invariants.test_runs import assert_close, numbers, weights
from tests.quick import slow_except
from tests.runs import Program, copy_stopped

ALWAYS = ("dpo", "reward", "simpo", "aot", "beta_dpo", "kto", "bco", "tdpo2", "wpo", "ld_dpo")
FP64 = ("model.policy_dtype=float64", "sample_during_eval=false")
FEW = ("reward", "beta_dpo", "tdpo2")  # a head of its own, a running mean, token KL
NAMES = [name for name, loss in LOSSES.items() if loss.batch != "rollout"]  # see test_rollouts.py
WITH_REFERENCE = [
    name
    for name, loss in LOSSES.items()
    # Token KL and rollouts are of live references alone.
    if "reference" in loss.needs and "token kl" not in loss.needs and loss.batch != "rollout"
]


def settings_of(name: str) -> tuple[str, ...]:
    if LOSSES[name].batch == "tokens":  # a padded row is one text
        return (f"loss={name}", "document_mask=false", "max_length=64", "max_prompt_length=16")
    needs_beta = name in ("dpo", "cdpo", "ipo")  # as in the reference implementation
    return (f"loss={name}", *(["loss.beta=0.1"] if needs_beta else []))


@pytest.mark.parametrize("name", slow_except(NAMES, *ALWAYS))
def test_packed_equals_padded(program: Program, name: str) -> None:
    common = (*settings_of(name), *FP64, "batch_size=6", "n_examples=18")
    assert_close(program.ok(*common), program.ok(*common, "batching=padded"), rel=1e-5)


@pytest.mark.parametrize("name", slow_except(NAMES, *FEW))
def test_any_split_gives_the_same_result(program: Program, name: str) -> None:
    common = (*settings_of(name), *FP64, "batch_size=8", "n_examples=20")
    plain = program.ok(*common)
    for split in ("gradient_accumulation_steps=4", "token_budget=1"):
        assert_close(program.ok(*common, split), plain, rel=1e-5)  # Llama's norms round to fp32


@pytest.mark.parametrize("name", slow_except(WITH_REFERENCE, "beta_dpo", "bco"))
def test_cached_equals_live(program: Program, name: str) -> None:
    common = (*settings_of(name), "eval_every=8", "gradient_accumulation_steps=2")
    cached = program.ok(*common, "reference=cached", f"cache_dir={program.directory / 'own'}")
    assert numbers(program.ok(*common, "reference=live")) == numbers(cached)


@pytest.mark.parametrize("name", slow_except(NAMES, *FEW))
def test_adapters_train(program: Program, name: str) -> None:
    run = program.ok(*settings_of(name), "peft=lora", "batch_size=8", "lr=1e-2", "n_examples=24", "peft.dropout=0.1")
    assert all(row["grad_norm"] > 0 for row in run.steps)
    assert run.evals[-1]["loss/eval"] != run.evals[0]["loss/eval"]


@pytest.mark.parametrize("name", slow_except(NAMES, *FEW))
def test_a_resumed_run_is_bitwise_equal(program: Program, name: str) -> None:
    common = (*settings_of(name), "batch_size=4", "eval_every=8", "save_every=8", "optimizer=AdamW")
    whole = program.ok(*common, "keep_checkpoints=5")
    directory = program.directory / "resumed"
    copy_stopped(whole, directory, 8)
    resumed = program.ok(*common, f"local_run_dir={directory}", "resume=auto", "keep_checkpoints=5")
    assert "resumed from" in resumed.out
    assert numbers(resumed) == numbers(whole)
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
