"""Training on dialogues: whole runs, and several processes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.data.dialogues import split_turns
from engine.data.examples import Example
from tests.invariants.test_dialogue_packing import dialogue
from tests.invariants.test_runs import assert_close, numbers, weights
from tests.models import random_examples
from tests.ranks import Job, make_trainer, on_ranks
from tests.runs import Program, Run, copy_stopped

FP64 = ("loss=sft", "model.policy_dtype=float64", "chat_template=hh", "test_fraction=0.2", "n_examples=12")


def chats(directory: Path) -> str:
    """Dialogues of one to six turns, and instructions, with weights."""
    path = directory / "chats.jsonl"
    rows = []
    for index in range(15):
        texts = [f"what of {index} and {turn}?" if turn % 2 == 0 else f"it is {index + turn}." for turn in range(12)]
        messages = [
            {"role": ("user", "assistant")[turn % 2], "content": text}
            for turn, text in enumerate(texts[: 2 + 2 * (index % 6)])
        ]
        rows.append({"messages": messages, "weight": 1 + index % 3})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"datasets={path}"


def train(program: Program, *overrides: str) -> Run:
    return program.ok(*FP64, chats(program.directory), "batch_size=3", "eval_every=6", *overrides)


def test_layouts_and_splits_give_the_same_result(program: Program) -> None:
    packed = train(program)
    assert "12 rows, " in packed.out and " targets in 12 examples" in packed.out
    assert "training on 12 examples in 4 steps of 3" in packed.out
    assert [row["counters/examples"] for row in packed.steps] == [3, 6, 9, 12]
    for other in ("batching=padded", "gradient_accumulation_steps=3", "token_budget=1"):
        found = train(program, other)
        assert_close(found, packed, rel=1e-5)
        for row, expected in zip(found.evals, packed.evals, strict=True):
            assert row["loss/eval"] == pytest.approx(expected["loss/eval"], rel=1e-5)


def test_a_resumed_run_is_bitwise_equal(program: Program) -> None:
    common = ("n_examples=21", "n_epochs=null", "save_every=6", "optimizer=AdamW")  # into the second epoch
    whole = train(program, *common, "keep_checkpoints=5")
    directory = program.directory / "resumed"
    copy_stopped(whole, directory, 6)
    resumed = train(program, *common, f"local_run_dir={directory}", "resume=auto", "keep_checkpoints=5")
    assert "resumed from" in resumed.out
    assert numbers(resumed) == numbers(whole)
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_plan_counts_dialogues(program: Program) -> None:
    run = train(program, "plan=true")
    assert " targets in 12 examples" in run.out


# ---- Trajectories ----


def some_dialogues() -> list[Example]:
    lengths = [[(1 + (3 * i + t) % 5, 1 + (5 * i + 2 * t) % 7) for t in range(1 + i % 5)] for i in range(20)]
    return [*(dialogue(each, i, 1 + i % 3) for i, each in enumerate(lengths)), *random_examples([(5, 4)] * 5, 30)]


def trajectories(jobs: Sequence[Job], directory: Path, one_example_per_turn: bool) -> list[tuple[Tensor, ...]]:
    """Losses, log-probs and gradient norms of each job on dialogues."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = []
    for index, job in enumerate(jobs):
        trainer = make_trainer(job, directory / f"{index}-{rank}")
        trainer.source.examples = some_dialogues()
        batches = map(trainer.split_batch, trainer.source.batches())
        if one_example_per_turn:
            expanded = ([turn for each in batch for turn in split_turns(each)] for batch in trainer.source.batches())
            batches = map(trainer.split_batch, expanded)
        steps = [trainer.step(trainer.prepare(batch)).values.read() for batch in batches]
        names = ("loss/train", "logps_train/chosen", "grad_norm")
        found.append(tuple(torch.tensor([step[name] for step in steps], dtype=torch.float64) for name in names))
    return found


def assert_near(found: Sequence[tuple[Tensor, ...]], expected: Sequence[tuple[Tensor, ...]], rel: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for values, others in zip(ours, theirs, strict=True):
            torch.testing.assert_close(values, others, rtol=rel, atol=0.0)


def test_dialogues_train_like_one_example_per_turn(tmp_path: Path) -> None:
    jobs: list[Job] = [
        (architecture, "sft", ("n_epochs=1", "model.policy_dtype=float64", f"batching={batching}"))
        for architecture, batching in (("gpt2", "packed"), ("gpt_neox", "padded"))  # with norms in fp64
    ]
    joined, apart = (trajectories(jobs, tmp_path / str(each), each) for each in (False, True))
    assert len(joined[0][0]) == 5
    assert_near(joined, apart, rel=1e-10)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    jobs: list[Job] = [("llama", "sft", ("n_epochs=1",))]
    basic = trajectories(jobs, tmp_path / "basic", False)
    sharded: list[Job] = [
        ("llama", "sft", ("n_epochs=1", "trainer=FSDPTrainer", *more)) for more in ((), DETERMINISTIC)
    ]
    on_two = on_ranks(2, trajectories, sharded, tmp_path / "two", False)
    for found in on_two[0]:
        assert_near([found], basic, rel=1e-4)


DETERMINISTIC = ("deterministic=true",)
