"""KL divergences of policy and reference, in every kind of run."""

import copy
import itertools
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.placement.placement import Placement
from engine.run import kl
from engine.run.evaluation import Evaluator
from engine.run.kl import mean_and_error
from engine.step.divergence import Divergence, compare
from engine.step.layout import lay_out
from engine.step.packing_check import use_packed_attention
from engine.step.reference import LiveReference
from engine.step.reference_cache import CachedReference
from tests.invariants.test_runs import numbers
from tests.models import random_examples, tiny_model
from tests.quick import slow_except
from tests.ranks import Job, make_trainer, on_ranks
from tests.runs import Program, stop_after
from utils import UserError

DPO = ("loss=dpo", "loss.beta=0.1")
SAMPLES = ("sample_during_eval=true", "win_rate.judge=null", "n_eval_model_samples=3", "max_length=280", "eval_every=8")
FORWARD, REVERSE = "forward_kl_eval", "kl_eval"
KINDS = {
    "cached": (),
    "live": ("reference=live",),
    "lora": ("peft=lora",),
    "other dtype": ("model.reference_dtype=float64",),
    "by token": ("loss=ld_dpo", "reference=cached"),
    "unpaired": ("loss=kto",),
    "padded": ("batching=padded",),
}


# ---- The estimates ----

VOCABULARY, END, LONGEST = 5, 1, 4


def all_responses() -> list[np.ndarray]:
    """All responses that sampling can give: up to the end of text, or to the longest length."""
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == LONGEST):
                found.append(np.array(tokens, dtype=np.int32))
    return found


def two_models(layout: str) -> tuple[LiveReference, LiveReference]:
    first = tiny_model("llama", torch.float64, vocab_size=VOCABULARY)
    second = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for model in (first, second):
        if layout == "packed":
            use_packed_attention(model)
    return LiveReference(first), LiveReference(second)


def enumerated(first: LiveReference, second: LiveReference, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of all responses: probability under first, and the two estimates, [responses] each."""
    prompt = np.array([2, 0, 3], dtype=np.int32)
    batch = lay_out([Example(prompt, tuple(all_responses()), 0)], layout)
    logratios, kls = compare(first, second, batch)
    assert kls is not None
    return first.logps(batch).exp(), logratios, kls


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_both_estimates_are_unbiased(layout: str) -> None:
    """Their means over all responses equal the KL divergence, in both directions."""
    models = two_models(layout)
    for first, second in (models, models[::-1]):
        probs, logratios, kls = enumerated(first, second, layout)
        other_probs, opposite, _ = enumerated(second, first, layout)
        assert probs.sum().item() == pytest.approx(1)
        exact = (probs * (probs.log() - other_probs.log())).sum().item()
        assert exact > 0.1
        assert (probs * logratios).sum().item() == pytest.approx(exact)
        assert (probs * kls).sum().item() == pytest.approx(exact)
        torch.testing.assert_close(logratios, -opposite)


def test_the_standard_errors_match_the_spread_of_estimates() -> None:
    """Of means over 16 samples: the exact spread, by enumeration. That of the next token's KL is smaller."""
    probs, logratios, kls = enumerated(*two_models("packed"), "packed")
    drawn = torch.multinomial(probs, 16 * 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    spreads = []
    for values in (logratios, kls):
        mean = (probs * values).sum()
        spreads.append(((probs * (values - mean).square()).sum() / 16).sqrt().item())
        found = [mean_and_error("kl", row) for row in values[drawn].view(4000, 16)]
        means, errors = (torch.tensor([each[key] for each in found]) for key in ("kl", "kl/standard_error"))
        assert means.mean().item() == pytest.approx(mean.item(), abs=4 * spreads[-1] / 4000**0.5)
        assert errors.square().mean().sqrt().item() == pytest.approx(spreads[-1], rel=0.05)
    assert spreads[1] < spreads[0]


def test_one_sample_has_no_standard_error() -> None:
    assert mean_and_error("kl", torch.tensor([2.0])) == {"kl": 2.0}


# ---- Runs ----


@pytest.mark.parametrize("kind", slow_except(KINDS, "cached", "live", "unpaired"))
def test_runs_measure_kl(program: Program, kind: str) -> None:
    """Both are exactly 0 before the first step. Without a loaded reference, kl_eval is of the end alone."""
    run = program.ok(*DPO, *SAMPLES, *KINDS[kind])
    first, middle, last = run.evals
    loaded = kind in ("live", "lora")
    assert [REVERSE in row for row in (first, middle, last)] == [loaded, loaded, True]
    assert all(FORWARD in row for row in run.evals)
    if kind != "other dtype":
        assert {row for key, row in first.items() if "kl" in key} == {0}
    assert last[f"{FORWARD}/next_token"] > 0 < last[f"{REVERSE}/next_token"]
    for name in (FORWARD, REVERSE):  # two estimates of one number
        error = last[f"{name}/standard_error"]
        assert error > 0 and abs(last[name] - last[f"{name}/next_token"]) < 4 * error


def test_kinds_of_references_agree(program: Program) -> None:
    cached, live = program.ok(*DPO, *SAMPLES), program.ok(*DPO, *SAMPLES, "reference=live")
    for row, other in zip(cached.evals, live.evals, strict=True):
        for key in [key for key in row if "kl" in key or "logratios" in key]:
            assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("overrides", [(), pytest.param(("peft=lora",), marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_kl(program: Program, overrides: tuple[str, ...]) -> None:
    run = program.ok(*DPO, *SAMPLES, *overrides)
    expected = numbers(run)
    stop_after(run.dir, 8)
    resumed = program.ok(*DPO, *SAMPLES, *overrides, f"resume={run.dir}")
    assert "after 8 examples" in resumed.out
    assert numbers(run) == expected and REVERSE in expected[-1]


WRONG_SAMPLES = b'{"samples": [[1], [2], [3]], "checksum": "0"}'


@pytest.mark.parametrize("damage", slow_except([None, b"{", WRONG_SAMPLES], WRONG_SAMPLES))
def test_samples_of_the_reference_are_drawn_once(
    program: Program, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    """And again from a damaged file. Other settings of the samples have a file of their own."""
    cache = f"cache_dir={program.directory / 'own'}"
    drawn = []
    sample = Evaluator.sample

    def noted(evaluator: Evaluator, model: PreTrainedModel, num_examples: int) -> list[np.ndarray]:
        drawn.append(num_examples)
        return sample(evaluator, model, num_examples)

    monkeypatch.setattr(Evaluator, "sample", noted)
    first = program.ok(*DPO, *SAMPLES, cache)
    assert drawn == [0, 0, 8, 16]
    (path,) = (program.directory / "own" / "reference").glob("*.samples.json")
    if damage is not None:
        path.write_bytes(damage)
    again = program.ok(*DPO, *SAMPLES, cache)
    assert drawn[4:] == ([0, 8, 16] if damage is None else [0, 0, 8, 16])
    assert numbers(again) == numbers(first) and again.samples == first.samples
    program.ok(*DPO, *SAMPLES, cache, "max_prompt_length=255")
    assert len([*path.parent.glob("*.samples.json")]) == 2


def test_archived_adapters_are_the_reference(program: Program) -> None:
    """A frozen copy of them; the base model without adapters is another one."""
    start = program.ok("loss=sft", "peft=lora", "n_examples=8")
    run = program.ok(*DPO, *SAMPLES, "peft=lora", f"model.archive={start.dir}")
    assert run.evals[0][REVERSE] == run.evals[0][FORWARD] == 0
    assert run.evals[1][f"{REVERSE}/next_token"] > 0


def test_a_moved_reference_has_no_forward_kl(program: Program) -> None:
    """The samples are of the first reference."""
    run = program.ok(*DPO, *SAMPLES, "reference_refresh.every=1")
    assert all(REVERSE in row and FORWARD not in row for row in run.evals)
    assert run.evals[-1][REVERSE] == 0  # it has moved to the policy just now


@pytest.mark.parametrize("overrides", [("loss=sft",), (*DPO, "sample_during_eval=false"), ("loss=cpo",)])
def test_runs_without_reference_or_samples_measure_no_kl(program: Program, overrides: tuple[str, ...]) -> None:
    run = program.ok(*SAMPLES, *overrides)
    assert not any("kl_eval" in key for row in run.evals for key in row)


def test_lost_weights_end_no_run(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is loaded at the end. By then the user may have removed it."""

    def fail(self: Placement, dtype: torch.dtype) -> None:
        raise UserError("CHECKPOINT", "model.archive: gone", "bring it back")

    place_again = Placement.place_again

    def remove_and_place(self: Placement, dtype: torch.dtype) -> torch.nn.Module:
        monkeypatch.setattr(Placement, "place_model", fail)
        return place_again(self, dtype)

    monkeypatch.setattr(Placement, "place_again", remove_and_place)
    run = program.ok(*DPO, *SAMPLES)
    assert "kl_eval is left out: the reference cannot be loaded" in run.out
    assert REVERSE not in run.evals[-1] and FORWARD in run.evals[-1]


@pytest.mark.parametrize("problem", ["no memory", "other weights", "infinite"])
def test_what_fails_at_the_end_is_left_out(program: Program, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    """The final checkpoint is not saved yet."""
    place_again = Placement.place_again

    def place(self: Placement, dtype: torch.dtype) -> torch.nn.Module:
        if problem == "no memory":
            raise torch.OutOfMemoryError("no memory is left")
        model = place_again(self, dtype)
        with torch.no_grad():
            next(model.parameters()).add_(1.0 if problem == "other weights" else 0.0)
        return model

    def infinite(*arguments: object) -> Divergence:
        return Divergence(torch.full((1,), math.inf), None)

    monkeypatch.setattr(Placement, "place_again", place)
    if problem == "infinite":
        monkeypatch.setattr(kl, "compare", infinite)
    run = program.ok(*DPO, *SAMPLES)
    words = {"no memory": "needs too much memory", "other weights": "have changed since the start"}
    assert words.get(problem, "kl_eval is left out: it is NaN or Inf") in run.out
    assert REVERSE not in run.evals[-1] and run.evals[-1]["loss/eval"] > 0
    assert (FORWARD in run.evals[-1]) == (problem != "infinite")
    assert (run.dir / "LATEST" / "model.safetensors").exists()


def test_a_cache_of_all_examples_need_not_be_writable(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    first = program.ok(*DPO, *SAMPLES)

    def fail(*arguments: object) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(CachedReference, "_unusable", fail)
    monkeypatch.setattr(sqlite3, "connect", read_only(sqlite3.connect))
    second = program.ok(*DPO, *SAMPLES)
    assert second.evals[0][FORWARD] == first.evals[0][FORWARD]


def read_only(connect: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
    """Connect to a file, and refuse to insert rows."""

    def refuse(action: int, table: str | None, *_: object) -> int:
        is_insert = action == sqlite3.SQLITE_INSERT and table in ("logps", "token_logps")
        return sqlite3.SQLITE_DENY if is_insert else sqlite3.SQLITE_OK

    def connect_read_only(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **keywords)
        connection.set_authorizer(refuse)
        return connection

    return connect_read_only


def test_log_ratios_are_rewards_without_beta(program: Program) -> None:
    run = program.ok(*DPO)
    for row, split in ((run.steps[-1], "train"), (run.evals[-1], "eval")):
        for role in ("chosen", "rejected"):
            reward = row[f"rewards_{split}/{role}"]
            assert row[f"logratios_{split}/{role}"] == pytest.approx(10 * reward, rel=1e-5) and reward != 0
    assert not any("logratios" in key for key in program.ok("loss=cpo").steps[0])


# ---- Placements ----


def kl_after_training(jobs: list[Job], directory: Path) -> list[dict[str, float]]:
    """KL metrics of trained policies, on the same responses under every placement."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    responses = [each.responses[0] for each in random_examples([(1, 4), (1, 1), (1, 7), (1, 9), (1, 3)])]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "sample", lambda *arguments: responses)
        for index, job in enumerate(jobs):
            trainer = make_trainer(job, directory / f"{index}-{rank}")
            for batch in trainer.train_batches():
                trainer.step(trainer.prepare(batch))
            trainer.policy.eval()
            measure = trainer.evaluator.kl.measure
            metrics = measure(responses, trainer.token_budget, is_last=False)
            found.append({f"before/{key}": value for key, value in metrics.items()})
            found[-1] |= measure(responses, trainer.token_budget, is_last=True)
    return found


SAMPLING = ("sample_during_eval=true", "n_eval_model_samples=5", "n_epochs=1")
MEASURED: list[Job] = [
    ("llama", "dpo", SAMPLING),
    ("llama", "dpo", (*SAMPLING, "reference=live")),
    ("llama", "dpo", (*SAMPLING, "peft=lora")),
    ("gpt2", "dpo", (*SAMPLING, "mixed_precision=bfloat16")),
]


@pytest.mark.alone
@pytest.mark.parametrize(
    "trainer, num_jobs",
    slow_except([("FSDPTrainer", 1), ("FSDPTrainer", 4), ("TensorParallelTrainer", 4)], ("FSDPTrainer", 1)),
)
def test_sharded_models_measure_the_same(tmp_path: Path, trainer: str, num_jobs: int) -> None:
    basic = [job for job in MEASURED[:num_jobs] if trainer == "FSDPTrainer" or "peft=lora" not in job[2]]
    expected = kl_after_training(basic, tmp_path / "basic")
    jobs = [(architecture, loss, (*overrides, f"trainer={trainer}")) for architecture, loss, overrides in basic]
    for found in on_ranks(2, kl_after_training, jobs, tmp_path / "sharded"):
        for metrics, others, job in zip(found, expected, basic, strict=True):
            is_low = "mixed_precision=bfloat16" in job[2]
            assert metrics == pytest.approx(others, rel=0.1 if is_low else 1e-3, abs=0.02 if is_low else 1e-5)
            assert f"before/{FORWARD}" in metrics and REVERSE in metrics


@pytest.mark.slow
def test_the_package_measures_the_same(tmp_path: Path) -> None:
    package = ("trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "tensor_parallel_size=2")
    jobs = [(architecture, loss, (*overrides, *package)) for architecture, loss, overrides in MEASURED[:2]]
    found, expected = kl_after_training(jobs, tmp_path / "package"), kl_after_training(MEASURED[:2], tmp_path / "basic")
    for metrics, others in zip(found, expected, strict=True):
        assert metrics == pytest.approx(others, rel=1e-3, abs=1e-5) and REVERSE in metrics
