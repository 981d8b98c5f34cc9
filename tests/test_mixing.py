"""Weights for mixing data sets: counts, orders, resume and the command line."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.examples import Example
from engine.step.mixing import Mixture, apportion, describe_mixture, make_mixture
from engine.step.sources import StoredExamples, plan_batches
from tests.invariants.test_runs import numbers, weights
from tests.quick import slow_except
from tests.runs import Program, copy_stopped
from utils import UserError


def examples_of(*pairs_per_prompt: int) -> list[Example]:
    """Pairs of other lengths; each argument is a prompt."""
    return [
        Example(np.full(2 + 3 * prompt % 7, 9, np.int32), (np.ones(2, np.int32), np.ones(1, np.int32)), prompt)
        for prompt, count in enumerate(pairs_per_prompt)
        for _ in range(count)
    ]


def order_of(
    examples: Sequence[Example], mixture: Mixture, num_epochs: int, seed: int = 0, **options: Any
) -> list[int]:
    plan = plan_batches(examples, 4, seed=seed, n_epochs=num_epochs, n_examples=None, mixture=mixture, **options)
    return list(chain.from_iterable(plan))


@pytest.mark.parametrize(
    ("total", "weights", "counts"),
    [
        (10, [0.7, 0.3], [7, 3]),
        (10, [7, 3], [7, 3]),
        (10, [1, 1, 1], [4, 3, 3]),
        (100, [0.29, 0.71], [29, 71]),
        (5, [2, 1], [3, 2]),  # 3.33 and 1.67
        (7, [1e-9, 1], [0, 7]),
        (3, [1], [3]),
    ],
)
def test_shares_fit_the_total(total: int, weights: list[float], counts: list[int]) -> None:
    assert apportion(total, weights) == counts


@pytest.mark.parametrize("length_grouping", [False, True])
def test_each_epoch_has_the_shares_and_each_data_set_walks_on(length_grouping: bool) -> None:
    """Eight examples and four: an epoch of twelve takes three of the first, and nine of the second."""
    examples = examples_of(*[1] * 12)
    mixture = make_mixture(["large", "small"], [0.25, 0.75], [8, 4])
    order = order_of(examples, mixture, 8, length_grouping=length_grouping)
    assert len(order) == 96
    for start in range(0, 96, 12):
        assert sum(index < 8 for index in order[start : start + 12]) == 3
    large, small = [i for i in order if i < 8], [i for i in order if i >= 8]
    assert Counter(large) == {index: 3 for index in range(8)}  # 24 draws: three passes
    assert Counter(small) == {index: 18 for index in range(8, 12)}
    assert len(set(large[:6])) == 6  # the second epoch continues the pass of the first


def test_data_sets_are_mixed_within_batches() -> None:
    mixture = make_mixture(["a", "b"], [1, 1], [200, 200])
    order = order_of(examples_of(*[1] * 400), mixture, 1)
    shares = [sum(index < 200 for index in order[start : start + 40]) for start in range(0, 400, 40)]
    assert all(10 <= share <= 30 for share in shares) and len(set(shares)) > 1


def test_examples_of_a_prompt_stay_together() -> None:
    examples = examples_of(3, 3, 3, 2, 2)  # 9 and 4
    order = order_of(examples, make_mixture(["a", "b"], [9, 4], [9, 4]), 5)
    for start in range(0, 65, 13):  # passes end with epochs
        epoch = order[start : start + 13]
        assert sorted(epoch) == list(range(13))
        prompts = [examples[index].prompt_index for index in epoch]
        assert sum(a != b for a, b in pairwise(prompts)) == 4
    # An epoch of 5 of the first cuts a prompt; the rest follows in the next one.
    order = order_of(examples, Mixture([9, 4], [5, 8]), 9)
    assert Counter(index for index in order if index < 9) == {index: 5 for index in range(9)}


def test_the_order_follows_the_seed() -> None:
    examples, mixture = examples_of(*[1] * 12), Mixture([8, 4], [3, 9])
    assert order_of(examples, mixture, 2) == order_of(examples, mixture, 2) != order_of(examples, mixture, 2, seed=1)


@pytest.mark.parametrize("length_grouping", [False, True])
def test_a_source_continues_after_any_example(length_grouping: bool) -> None:
    def source() -> StoredExamples:
        options: dict[str, Any] = {"batch_size": 4, "seed": 0, "n_epochs": 3, "n_examples": None}
        return StoredExamples(examples, **options, length_grouping=length_grouping, mixture=Mixture([8, 4], [3, 9]))

    examples = examples_of(*[1] * 12)
    whole = [id(example) for batch in source().batches() for example in batch]
    assert len(whole) == source().num_examples == 36
    for start in (1, 4, 12, 17, 36):
        assert [id(example) for batch in source().batches(start) for example in batch] == whole[start:]


def test_new_batches_hold_every_example_the_run_sees() -> None:
    examples, batches = examples_of(*[1] * 12), {}
    for name, mixture in (("mixed", Mixture([8, 4], [1, 11])), ("plain", None)):
        source = StoredExamples(examples, batch_size=4, seed=0, n_epochs=None, n_examples=10**9, mixture=mixture)
        batches[name] = [[id(example) for example in batch] for batch in source.new_batches()]
        assert {*chain.from_iterable(batches[name])} == {*map(id, examples)}
        planned = [[id(example) for example in batch] for batch in islice(source.batches(), 100)]
        assert all(batch in planned for batch in batches[name])
    assert len(batches["plain"]) == 3 < len(batches["mixed"]) <= 12


def test_a_line_says_the_shares() -> None:
    line = describe_mixture(["a", "b"], make_mixture(["a", "b"], [0.75, 0.25], [100, 300]))
    assert line == (
        "mixture in an epoch: a 75.0% (300 examples, 3.00 passes over its 100), "
        "b 25.0% (100 examples, 0.33 passes over its 300)"
    )


def test_a_data_set_without_examples_is_refused() -> None:
    with pytest.raises(UserError, match=r"error\[DATA\] datasets: no train example of b is left"):
        make_mixture(["a", "b"], [1, 1], [3, 0])
    with pytest.raises(UserError, match=r"error\[CONFIG\] weights: 0\.01 gives b none of the 6 examples"):
        make_mixture(["a", "b"], [1, 0.01], [3, 3])


# ---- Through the command line ----


@pytest.fixture
def two_files(program: Program) -> str:
    paths: list[Path] = []
    for name, count in (("large", 24), ("small", 8)):
        paths.append(program.directory / f"{name}.jsonl")
        rows = [{"prompt": f"{name} {n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(count)]
        paths[-1].write_text("\n".join(map(json.dumps, rows)))
    return f"datasets=[{','.join(map(str, paths))}]"


MIXED = ("loss=dpo", "loss.beta=0.1", "weights=[1,3]", "test_fraction=0.25", "n_examples=null", "n_epochs=2")


def test_a_mixed_run_says_its_shares_and_resumes_bitwise(program: Program, two_files: str) -> None:
    common = (*MIXED, two_files, "save_every=12", "eval_every=12", "optimizer=AdamW")
    whole = program.ok(*common, "keep_checkpoints=9")
    assert (
        "mixture in an epoch: " in whole.out and "small.jsonl 75.0% (18 examples, 3.00 passes over its 6)" in whole.out
    )
    assert whole.steps[-1]["counters/examples"] == 48
    directory = program.directory / "resumed"
    copy_stopped(whole, directory, 12)
    resumed = program.ok(*common, f"local_run_dir={directory}", "resume=auto", "keep_checkpoints=9")
    assert "after 12 examples" in resumed.out and numbers(resumed) == numbers(whole)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    other = program(*common, "weights=[1,2]", f"local_run_dir={directory}", "resume=auto")
    assert other.status == 2 and "weights was [1, 3] and is [1, 2]" in other.err


@pytest.mark.parametrize(
    "option",
    slow_except(["batch_size=4", "length_grouping=true", "gradient_accumulation_steps=2"], "length_grouping=true"),
)
def test_the_reference_is_cached_for_all_that_is_drawn(program: Program, two_files: str, option: str) -> None:
    common = (*MIXED, two_files, option, "n_epochs=3")
    cached = program.ok(*common, "reference=cached", f"cache_dir={program.directory / 'own'}")
    assert numbers(program.ok(*common, "reference=live")) == numbers(cached)


def test_equal_weights_of_equal_data_sets_see_each_example_once(program: Program, two_files: str) -> None:
    run = program.ok(*MIXED[:2], two_files, "weights=[24,8]", "test_fraction=0", "n_examples=null", "lr=0")
    plain = program.ok(*MIXED[:2], two_files, "test_fraction=0", "n_examples=null", "lr=0")
    means = [np.mean([row["logps_train/chosen"] for row in each.steps]) for each in (run, plain)]
    assert means[0] == pytest.approx(means[1], rel=1e-6)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[1]", "weights: must have one number for each of datasets (2), not 1"),
        ("[1,2,3]", "weights: must have one number for each of datasets (2), not 3"),
        ("[1,0]", "weights: must be null or a list of numbers above 0"),
        ("[1,-1]", "weights: must be null or a list of numbers above 0"),
        ("[1,.nan]", "weights: must be null or a list of numbers above 0"),
        ("0.5", "weights: must be null or a list of numbers above 0"),
        ("[1,x]", "weights: must be null or a list of numbers above 0"),
    ],
)
def test_wrong_weights_are_refused(program: Program, two_files: str, value: str, problem: str) -> None:
    run = program(two_files, f"weights={value}")
    assert run.status == 2 and problem in run.err


def test_a_data_set_that_lost_all_rows_is_named(program: Program, two_files: str) -> None:
    path = program.directory / "useless.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{n}", "chosen": "a", "rejected": "a"}) for n in range(3)))
    datasets = two_files.replace("]", f",{path}]")
    program.ok(*MIXED[:2], datasets, "test_fraction=0")
    run = program(*MIXED[:2], datasets, "test_fraction=0", "weights=[1,1,1]")
    assert run.status == 3 and "no train example of" in run.err and "useless.jsonl" in run.err
