"""A reference that moves to the policy: by hand, in checkpoints, under every placement."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from engine.models.shards import full_tensor
from tests.configs import make_settings
from tests.invariants.test_runs import numbers, weights
from tests.ranks import Job, make_trainer, on_ranks
from tests.runs import Program, copy_stopped
from utils import UserError

DPO = ("loss=dpo", "loss.beta=0.1")
SOFT = ("reference_refresh.every=2", "reference_refresh.mix=0.6")


def copied(model: Any) -> dict[str, Tensor]:
    return {name: full_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}


def next_batches(trainer: Any, start: int = 0) -> Any:
    return map(trainer.prepare, trainer.train_batches(start))


@pytest.mark.parametrize("option", ["batching=packed", "batching=padded", "mixed_precision=bfloat16"])
def test_after_a_hard_refresh_the_margin_is_0_again(program: Program, option: str) -> None:
    path = program.directory / "rows.jsonl"
    rows = [{"prompt": f"Is {n} even?", "chosen": f" It is {n}.", "rejected": " No."} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    common = (*DPO, f"datasets=[{path}]", "test_fraction=0", "warmup_steps=0", option)
    run = program.ok(*common, "n_examples=24", "n_epochs=null", "reference_refresh.every=2")
    assert len(run.steps) == 6  # each of all four rows
    for number, step in enumerate(run.steps):
        assert (step["rewards_train/margins"] == 0) == (number % 2 == 0), number
        assert (step["loss/train"] == pytest.approx(math.log(2), abs=1e-7)) == (number % 2 == 0)


@pytest.mark.parametrize("mix", [0.6, 1.0])
@pytest.mark.parametrize("precision", ["null", "bfloat16"])
def test_the_reference_moves_by_hand(tmp_path: Path, mix: float, precision: str) -> None:
    """In mixed precision too, weights in fp32 move."""
    moving = ("reference_refresh.every=2", f"reference_refresh.mix={mix}", f"mixed_precision={precision}")
    trainer = make_trainer(("llama", "dpo", moving), tmp_path)
    reference = trainer.moving_reference
    for number, batch in zip(range(1, 6), next_batches(trainer), strict=False):
        before = copied(reference)
        trainer.step(batch)
        policy, after = copied(trainer.policy), copied(reference)
        for name, value in after.items():
            assert value.dtype == torch.float32
            moved = mix * policy[name].double() + (1 - mix) * before[name].double()
            expected = moved if number % 2 == 0 else before[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
            assert number % 2 or mix < 1 or torch.equal(value, policy[name])
        assert any(not torch.equal(after[name], before[name]) for name in after) == (number % 2 == 0)
        assert all(not parameter.requires_grad for parameter in reference.parameters())


def test_a_refresh_that_never_comes_changes_nothing(program: Program) -> None:
    plain = program.ok(*DPO, "reference=live")
    later = program.ok(*DPO, "reference_refresh.every=1000")
    assert numbers(later) == numbers(plain)
    soon = program.ok(*DPO, *SOFT)
    assert [row["loss/train"] for row in soon.steps[:2]] == [row["loss/train"] for row in plain.steps[:2]]
    assert soon.steps[2]["loss/train"] != plain.steps[2]["loss/train"]


# ---- Checkpoints ----


def test_a_resumed_run_is_bitwise_equal(program: Program) -> None:
    common = (*DPO, *SOFT, "batch_size=4", "n_examples=24", "eval_every=8", "save_every=8", "optimizer=AdamW")
    whole = program.ok(*common, "keep_checkpoints=5")
    directory = program.directory / "resumed"
    copy_stopped(whole, directory, 8)
    resumed = program.ok(*common, f"local_run_dir={directory}", "resume=auto", "keep_checkpoints=5")
    assert "after 8 examples" in resumed.out and numbers(resumed) == numbers(whole)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    references = [load_file(run.dir / "LATEST" / "reference.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(references[0][name], references[1][name]) for name in references[0])
    assert references[0].keys() == weights(whole).keys()
    assert any(not torch.equal(references[0][name], tensor) for name, tensor in weights(whole).items())
    # Without the key the reference would jump back.
    fixed = program(
        *common[:2], *common[4:], f"local_run_dir={directory}", "resume=auto", "resume_allow=[reference_refresh]"
    )
    assert fixed.status == 2 and "moved, and reference_refresh.every is null" in fixed.err


def test_only_a_moving_reference_is_saved(program: Program) -> None:
    common = (*DPO, "reference=live", "save_every=8", "eval_every=8")
    fixed = program.ok(*common)
    assert not [*fixed.dir.rglob("reference*.safetensors")]
    # A run may begin to move it: until then it was the starting model.
    branch = (f"resume={fixed.dir}/step-8", f"local_run_dir={program.directory / 'branch'}")
    moved = program.ok(*common, *branch, "reference_refresh.every=1", "resume_allow=[reference_refresh]")
    assert moved.steps[-2]["loss/train"] == fixed.steps[2]["loss/train"]
    assert moved.steps[-1]["loss/train"] != fixed.steps[3]["loss/train"]
    assert (moved.dir / "step-16" / "reference.safetensors").exists()


def test_a_damaged_reference_is_found(program: Program) -> None:
    run = program.ok(*DPO, *SOFT)
    path = run.dir / "step-16" / "reference.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = program(*DPO, *SOFT, f"local_run_dir={run.dir}", "resume=auto")
    assert again.status == 4 and "reference.safetensors" in again.err


def test_a_rollback_restores_the_reference(tmp_path: Path) -> None:
    trainer = make_trainer(("llama", "dpo", ("reference_refresh.every=1", "reference_refresh.mix=0.6")), tmp_path)
    batches = next_batches(trainer)
    for _ in range(2):
        trainer.step(next(batches))
    saved = copied(trainer.moving_reference), copied(trainer.policy)
    trainer.save(is_last=False, evaluation_due=False)
    trainer.step(next(batches))
    assert any(not torch.equal(saved[0][name], value) for name, value in copied(trainer.moving_reference).items())
    assert trainer.roll_back() == "step-10"
    for model, expected in zip((trainer.moving_reference, trainer.policy), saved, strict=True):
        assert all(torch.equal(expected[name], value) for name, value in copied(model).items())


# ---- Placements ----

MOVING = ("n_epochs=1", "reference_refresh.every=1", "reference_refresh.mix=0.6")  # five updates


def run_and_resume(jobs: list[Job], directory: Path) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Losses of each job, those after its resumption from the second update, and its last reference."""
    found = []
    for index, job in enumerate(jobs):
        run_dir = directory / str(index)  # shared by all ranks
        run_dir.mkdir(parents=True, exist_ok=True)
        trainer = make_trainer(job, run_dir)
        losses = []
        for number, batch in enumerate(next_batches(trainer)):
            losses.append(trainer.step(batch).values.read()["loss/train"])
            if number == 1:
                trainer.save(is_last=False, evaluation_due=False)
                trainer.log_finished_save(wait=True, together=True)
        again = make_trainer(job, run_dir)
        again.resume(run_dir / "step-10")
        resumed = [again.step(batch).values.read()["loss/train"] for batch in next_batches(again, start=10)]
        weights = trainer.placement.named_weights(trainer.moving_reference)
        permutations = trainer.placement.permutations
        last = {name: full_tensor(tensor, permutations.get(name)).detach().clone() for name, tensor in weights.items()}
        found.append((torch.tensor(losses), torch.tensor(resumed), last))
        if dist.is_initialized():
            dist.barrier()
    return found


def check_like_basic(runs: list[Any], basic: list[Any]) -> None:
    for (losses, resumed, reference), (expected, _, expected_reference) in zip(runs, basic, strict=True):
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(resumed, losses[2:])
        assert reference.keys() == expected_reference.keys()
        for name, tensor in expected_reference.items():
            torch.testing.assert_close(reference[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    jobs: list[Job] = [("llama", "dpo", MOVING), ("gpt2", "dpo", MOVING)]
    return run_and_resume(jobs, tmp_path_factory.mktemp("basic"))


def test_one_process_resumes_bitwise(basic: list[Any]) -> None:
    check_like_basic(basic, basic)


def test_the_package_moves_the_reference_like_one_process(tmp_path: Path, basic: list[Any]) -> None:
    package = ("trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "tensor_parallel_size=2")
    jobs: list[Job] = [(name, "dpo", (*MOVING, *package)) for name in ("llama", "gpt2")]
    check_like_basic(run_and_resume(jobs, tmp_path), basic)


@pytest.mark.slow
def test_two_processes_move_the_reference_like_one(tmp_path: Path, basic: list[Any]) -> None:
    trainers = ("FSDPTrainer", "TensorParallelTrainer")
    jobs: list[Job] = [(name, "dpo", (*MOVING, f"trainer={each}")) for each in trainers for name in ("llama", "gpt2")]
    for of_rank in on_ranks(2, run_and_resume, jobs, tmp_path):
        check_like_basic(of_rank, basic * 2)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("reference=cached reference_refresh.every=4", "reference_refresh.every: 4 moves the reference, and"),
        ("peft=lora reference_refresh.every=4", "reference_refresh.every: 4 needs peft=none, not lora"),
        ("reference_refresh.every=0", "reference_refresh.every: must be null or an integer of at least 1"),
        ("reference_refresh.mix=0", "reference_refresh.mix: must be a number above 0 and at most 1"),
        ("reference_refresh.mix=1.5", "reference_refresh.mix: must be a number above 0 and at most 1"),
        (
            "reference_refresh.every=4 reference_refresh.mix=0.5 model.reference_dtype=bfloat16",
            "reference_refresh.mix: 0.5 needs model.reference_dtype=float32 or null",
        ),
        ("reference_refresh.every=4 keep_best=loss/eval", "keep_best: loss/eval is measured against the reference"),
    ],
)
def test_refused(overrides: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        make_settings(*DPO, *overrides.split())
    assert problem in str(error.value)


def test_what_needs_no_reference_refuses_it(program: Program) -> None:
    for loss in (("loss=sft",), ("loss=simpo",), (*DPO, "loss.reference_free=true")):
        run = program(*loss, "reference_refresh.every=4")
        assert run.status == 2 and "reference_refresh.every: 4 would change nothing" in run.err
    run = program(*DPO, "reference_refresh.mix=0.5")
    assert run.status == 2 and "reference_refresh.mix: 0.5 would change nothing" in run.err
    assert make_settings(*DPO, "reference_refresh.every=4", "keep_best=ground_truth/policy").has_live_reference
