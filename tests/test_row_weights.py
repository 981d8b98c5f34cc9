"""The column `weight`: it scales the loss of a row's examples."""

import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.data.examples import Example
from tests.invariants.test_runs import assert_close, numbers, weights
from tests.quick import slow_except
from tests.ranks import Job, make_trainer, on_ranks
from tests.runs import Program

ROWS = [
    {"prompt": f"{'Is ' * (1 + n % 3)}{n} even?", "chosen": f" It is{' so' * (n % 4)}.", "rejected": " No."}
    for n in range(8)
]
WEIGHTS = [1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.25, 1.5]
WEIGHTED = [row | {"weight": weight} for row, weight in zip(ROWS, WEIGHTS, strict=True)]
FP64 = ("model.policy_dtype=float64", "optimizer=SGD", "max_grad_norm=1e6", "test_fraction=0", "lr=1e-2")
DPO = ("loss=dpo", "loss.beta=0.1")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"datasets=[{path}]"


@pytest.mark.parametrize("loss", [DPO, ("loss=sft",)], ids=["dpo", "sft"])
def test_the_loss_and_the_gradient_by_hand(program: Program, loss: tuple[str, ...]) -> None:
    """One step of SGD on four rows equals the weighted mean of the steps on each row alone."""
    rows = WEIGHTED[:4]
    common = (*loss, *FP64, "warmup_steps=0", "n_examples=null", "n_epochs=1")
    together = program.ok(*common, "batch_size=4", write(program.directory / "all.jsonl", rows))
    alone = []
    for index, row in enumerate(ROWS[:4]):
        alone.append(program.ok(*common, "batch_size=1", write(program.directory / f"{index}.jsonl", [row])))
    factors = [weight / 4 for weight in WEIGHTS[:4]]  # the mean is over examples, not over weights
    losses = [run.steps[0]["loss/train"] for run in alone]
    expected = sum(factor * loss for factor, loss in zip(factors, losses, strict=True))
    assert together.steps[0]["loss/train"] == pytest.approx(expected, rel=1e-9)
    start = weights(program.ok(*common, "lr=0", "batch_size=1", write(program.directory / "0.jsonl", ROWS[:1])))
    found, after = weights(together), [weights(run) for run in alone]
    for name, before in start.items():
        change = sum(factor * (each[name] - before).double() for factor, each in zip(factors, after, strict=True))
        assert isinstance(change, Tensor)
        assert torch.allclose((found[name] - before).double(), change, rtol=1e-7, atol=1e-12), name
    assert any(not torch.equal(found[name], start[name]) for name in start)


def test_weights_of_1_equal_no_column_bitwise(program: Program) -> None:
    plain = program.ok(*DPO, "test_fraction=0.25", write(program.directory / "plain.jsonl", ROWS))
    ones = [row | {"weight": 1} for row in ROWS]
    weighted = program.ok(*DPO, "test_fraction=0.25", write(program.directory / "ones.jsonl", ones))
    assert "the column weight" in weighted.out and "0 of 8 rows have a weight other than 1\n" in weighted.out
    assert "the column weight" not in plain.out
    assert numbers(weighted) == numbers(plain)
    assert all(torch.equal(tensor, weights(weighted)[name]) for name, tensor in weights(plain).items())


@pytest.mark.parametrize("loss", slow_except(["dpo", "aot"], "aot"))
def test_layouts_and_splits_give_the_same_result(program: Program, loss: str) -> None:
    path = write(program.directory / "rows.jsonl", WEIGHTED)
    common = (f"loss={loss}", "loss.beta=0.1", *FP64[:1], "test_fraction=0.25", "batch_size=6", "n_epochs=null", path)
    packed = program.ok(*common)
    unweighted = program.ok(*common[:-1], write(program.directory / "plain.jsonl", ROWS))
    assert packed.steps[0]["loss/train"] != pytest.approx(unweighted.steps[0]["loss/train"], rel=1e-3)
    for other in (
        "batching=padded",
        "gradient_accumulation_steps=3",
        "gradient_accumulation_steps=6",
        "token_budget=1",
    ):
        assert_close(program.ok(*common, other), packed, rel=1e-5)


def weighted_trajectories(jobs: Sequence[Job], directory: Path) -> list[tuple[Tensor, ...]]:
    """Losses and gradient norms of each job, on examples with weights."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = []
    for index, job in enumerate(jobs):
        trainer = make_trainer(job, directory / f"{index}-{rank}")
        examples: Sequence[Example] = trainer.source.examples
        trainer.source.examples = [
            dataclasses.replace(example, weight=WEIGHTS[i % 8]) for i, example in enumerate(examples)
        ]
        steps = [trainer.step(batch).values.read() for batch in map(trainer.prepare, trainer.train_batches())]
        found.append(tuple(torch.tensor([step[name] for step in steps]) for name in ("loss/train", "grad_norm")))
    return found


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    jobs: list[Job] = [("llama", loss, ("n_epochs=1",)) for loss in ("dpo", "aot")]
    basic = weighted_trajectories(jobs, tmp_path / "basic")
    sharded = [(architecture, loss, (*short, "trainer=FSDPTrainer")) for architecture, loss, short in jobs]
    on_two = on_ranks(2, weighted_trajectories, sharded, tmp_path / "two")
    for one, two in zip(basic, on_two[0], strict=True):
        for expected, found in zip(one, two, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_must_have_the_same_weights(program: Program) -> None:
    path = write(program.directory / "rows.jsonl", WEIGHTED)
    common = (*DPO, "test_fraction=0", "save_every=8", "eval_every=8", f"local_run_dir={program.directory / 'run'}")
    program.ok(*common, "n_epochs=null", path)
    again = (*common, "n_epochs=null", "resume=auto", "resume_allow=[n_examples]", "n_examples=24")
    write(program.directory / "rows.jsonl", [*WEIGHTED[:-1], WEIGHTED[-1] | {"weight": 4}])
    run = program(*again, path)
    assert run.status == 3 and "was trained on other examples" in run.err
    write(program.directory / "rows.jsonl", WEIGHTED)
    program.ok(*again, path)


# ---- Rows ----


@pytest.mark.parametrize("form", ["strings", "ranked", "messages", "completion", "alpaca"])
def test_rows_of_every_form_have_weights(program: Program, form: str) -> None:
    user, assistant = ({"role": role, "content": "hello"} for role in ("user", "assistant"))
    rows: dict[str, dict[str, Any]] = {
        "strings": ROWS[0],
        "ranked": {"prompt": "Rank", "responses": [" a", " b", " c"]},
        "messages": {"prompt": [user], "chosen": [assistant], "rejected": [assistant | {"content": "bye"}]},
        "completion": {"prompt": "p", "completion": " c"},
        "alpaca": {"instruction": "i", "output": "o"},
    }
    row = rows[form]
    loss = ("loss=sft",) if form in ("completion", "alpaca") else DPO
    common = (*loss, "test_fraction=0", "n_epochs=1", "n_examples=null", "chat_template=hh")
    plain = program.ok(*common, write(program.directory / "plain.jsonl", [row]))
    double = program.ok(*common, write(program.directory / "double.jsonl", [row | {"weight": 2}]))
    ratio = double.steps[0]["loss/train"] / plain.steps[0]["loss/train"]
    assert ratio == pytest.approx(2, rel=1e-6)  # all three pairs of the ranked row


@pytest.mark.parametrize("kind", ["csv", "jsonl.gz", "parquet"])
def test_files_of_every_kind_have_weights(program: Program, kind: str) -> None:
    path = program.directory / f"rows.{kind}"
    if kind == "csv":
        lines = [f'"{row["prompt"]}","{row["chosen"]}","{row["rejected"]}",{row["weight"]}' for row in WEIGHTED]
        path.write_text("\n".join(["prompt,chosen,rejected,weight", *lines]))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(WEIGHTED), path)
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, WEIGHTED)).encode()))
    plain = program.ok(*DPO, "test_fraction=0", write(program.directory / "plain.jsonl", WEIGHTED))
    assert numbers(program.ok(*DPO, "test_fraction=0", f"datasets=[{path}]")) == numbers(plain)


def test_rows_of_weight_0_are_dropped_and_counted(program: Program) -> None:
    rows: list[Mapping[str, Any]] = [*WEIGHTED]
    rows += [row | {"prompt": f"{row['prompt']} 0", "weight": 0} for row in ROWS[:3]]
    run = program.ok(*DPO, "test_fraction=0", write(program.directory / "rows.jsonl", rows))
    assert "8 of 11 rows have a weight other than 1, 3 of them 0 (dropped)\n" in run.out
    assert "11 rows, 8 prompts, 8 pairs\n  dropped: 3 weight of 0\n" in run.out


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        ("x", "is text, not a number"),
        (None, "is null, not a number"),
        (True, "is a boolean, not a number"),
        ([1], "is a list, not a number"),
        (-0.5, "is -0.5, below 0"),
        (float("nan"), "is NaN"),
        (float("inf"), "is too large"),
    ],
)
def test_a_wrong_weight_names_its_row(program: Program, weight: Any, problem: str) -> None:
    rows = [WEIGHTED[0], ROWS[1] | {"weight": weight}]
    path = write(program.directory / "rows.jsonl", rows)
    run = program(*DPO, "test_fraction=0", path)
    assert run.status == 3
    assert f"rows.jsonl line 2: field 'weight' {problem}" in run.err
    assert "1 malformed" in program.ok(*DPO, "test_fraction=0", path, "on_bad_row=drop").out


def test_rows_of_one_prompt_keep_their_weights(program: Program) -> None:
    """Of two equal rows for SFT the first counts, as the second is dropped."""
    target: dict[str, Any] = {"prompt": "p", "completion": " c"}
    common = ("loss=sft", "test_fraction=0", "n_epochs=1", "n_examples=null", "lr=0")
    one, two, three = (
        program.ok(*common, write(program.directory / f"{index}.jsonl", rows)).steps[0]["loss/train"]
        for index, rows in enumerate(
            [[target], [target | {"weight": 2}, target], [target, target | {"completion": " d", "weight": 3}]]
        )
    )
    other = program.ok(*common, write(program.directory / "other.jsonl", [target | {"completion": " d"}]))
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert three == pytest.approx((one + 3 * other.steps[0]["loss/train"]) / 2, rel=1e-6)
