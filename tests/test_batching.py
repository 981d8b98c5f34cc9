"""Layouts, splits and plans of batches, by hand."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import engine.step.sources
from engine.data.examples import Example
from engine.step.layout import GroupSpan, empty_microbatch, lay_out, num_fed_tokens
from engine.step.sources import choose_eval_examples, num_planned, plan_batches
from engine.step.splitting import split_batch
from tests.models import pair_examples, random_examples


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


PAIR = Example(array(10, 11, 12), (array(20, 21, 1), array(30, 1)), 0)
OTHER = Example(array(13), (array(40), array(50, 51, 1)), 1)


def test_packed_row_by_hand() -> None:
    batch = lay_out([PAIR, OTHER])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 13, 50, 51]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert batch.targets.tolist() == [20, 21, 1, 30, 1, 40, 50, 51, 1]
    assert batch.predict_index.tolist() == [2, 3, 4, 2, 5, 6, 6, 7, 8]
    assert batch.response_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3]
    assert batch.response_lengths.tolist() == [3, 2, 1, 3]
    assert batch.chosen.tolist() == [0, 2]
    assert batch.rejected is not None and batch.rejected.tolist() == [1, 3]
    assert batch.segments is not None
    assert batch.segments.groups == [(3, 2, 1), (1, 0, 2)]
    assert batch.num_tokens == 9 == num_fed_tokens(PAIR) + num_fed_tokens(OTHER)


def test_padded_rows_by_hand() -> None:
    batch = lay_out([PAIR, OTHER], "padded", pad_token_id=0)
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 20, 21, 1],
        [10, 11, 12, 30, 1, 0],
        [13, 40, 0, 0, 0, 0],
        [13, 50, 51, 1, 0, 0],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [6, 5, 2, 4]
    assert batch.predict_index.tolist() == [2, 3, 4, 8, 9, 12, 18, 19, 20]
    assert batch.num_tokens == 6 + 5 + 2 + 4  # without padding, for tokens per second
    assert num_fed_tokens(PAIR, "padded") == 2 * 6 and num_fed_tokens(OTHER, "padded") == 2 * 4  # with it, for memory


def test_pairs_of_one_prompt_share_it_and_their_responses() -> None:
    third = array(60, 61)
    examples = [PAIR, OTHER, Example(PAIR.prompt, (third, PAIR.responses[0]), 0)]
    batch = lay_out(examples)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 60, 13, 50, 51]]
    assert batch.chosen.tolist() == [0, 2, 3]
    assert batch.rejected is not None and batch.rejected.tolist() == [1, 0, 4]
    assert [(g.responses, g.examples) for g in batch.groups] == [
        (slice(0, 3), slice(0, 2)),
        (slice(3, 5), slice(2, 3)),
    ]


def test_sft_has_no_rejected() -> None:
    batch = lay_out([Example(PAIR.prompt, PAIR.responses[:1], 0)])
    assert batch.rejected is None
    assert batch.chosen.tolist() == [0]


def assert_split_in_order(microbatches: list[list[Example]], examples: list[Example]) -> None:
    """Every example once, prompts in the order of their first examples, within and across microbatches."""
    first: dict[bytes, int] = {}
    for index, example in enumerate(examples):
        first.setdefault(example.prompt.tobytes(), index)
    assert sorted(id(example) for part in microbatches for example in part) == sorted(map(id, examples))
    positions = [[first[example.prompt.tobytes()] for example in part] for part in microbatches]
    assert all(each == sorted(each) for each in positions)
    starts = [each[0] for each in positions]
    assert starts == sorted(starts)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("budget", [1, 20, 27, 40, 10**6])
def test_splits_keep_all_examples_their_order_and_the_budget(parts: int, budget: int) -> None:
    examples = pair_examples()
    shared = [examples[0], examples[4]]  # one prompt: 22 tokens together, 18 and 17 alone
    microbatches = split_batch(examples, parts, budget)
    assert_split_in_order(microbatches, examples)
    assert all(len(part) == 1 or lay_out(part).num_tokens <= budget for part in microbatches)
    assert len(microbatches) >= min(parts, 4)
    together = any(all(any(e is s for e in part) for s in shared) for part in microbatches)
    assert together == (budget >= lay_out(shared).num_tokens)
    if budget == 10**6:
        assert len(microbatches) == min(parts, 4)


def sized(*sizes: int) -> list[Example]:
    """Examples with sizes fed tokens, each with another prompt. Responses have one token."""
    return [Example(np.full(n, 2 + i, np.int32), (array(0), array(1)), i) for i, n in enumerate(sizes)]


def split_sizes(sizes: Sequence[int], parts: int, budget: int = 10**6) -> list[list[int]]:
    return [[num_fed_tokens(example) for example in part] for part in split_batch(sized(*sizes), parts, budget)]


def test_the_longest_go_where_they_leave_the_largest_smallest() -> None:
    assert split_sizes([5, 4, 3, 3, 3], 2) == [[5, 3], [4, 3, 3]]
    assert split_sizes([1, 1, 1, 9], 2) == [[1, 1, 1], [9]]
    assert split_sizes([2, 7, 1, 6, 3], 2) == [[2, 7, 1], [6, 3]]


def test_a_budget_adds_as_few_microbatches_as_possible() -> None:
    assert split_sizes([6, 5, 5, 4], 1, budget=10) == [[6, 4], [5, 5]]
    assert split_sizes([6, 5, 5, 4], 1, budget=9) == [[6], [5, 4], [5]]
    assert split_sizes([5, 4, 3, 3, 3], 1, budget=10) == [[5, 3], [4, 3, 3]]
    assert split_sizes([5, 4, 3, 3, 3], 1, budget=9) == [[5], [4, 3], [3, 3]]  # [5, 4] and [3, 3, 3] are not found
    assert split_sizes([30, 40], 1, budget=9) == [[30], [40]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_one_example_over_the_budget_does_not_scatter_the_others(layout: str) -> None:
    microbatches = split_batch(sized(3, 300, 3, 3), 1, 30, layout)
    assert [len(part) for part in microbatches] == [3, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_microbatch_is_near_the_optimum(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 40, 7)
    for parts in (2, 3):
        best = min(
            max(sum(size for size, where in zip(sizes, places, strict=True) if where == part) for part in range(parts))
            for places in itertools.product(range(parts), repeat=len(sizes))
        )
        assert max(map(sum, split_sizes(sizes.tolist(), parts))) <= best * (4 / 3 - 1 / (3 * parts)) + 1e-9


def examples_of(*pairs_per_prompt: int) -> list[Example]:
    return [
        Example(PAIR.prompt, PAIR.responses, prompt)
        for prompt, count in enumerate(pairs_per_prompt)
        for _ in range(count)
    ]


def test_plan_covers_each_epoch_once_and_runs_on() -> None:
    examples = examples_of(1, 3, 1, 1, 2, 1, 1)
    batches = list(plan_batches(examples, 4, seed=0, n_epochs=2, n_examples=None))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4]
    order = [index for batch in batches for index in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    where = order.index(1)
    assert order[where : where + 3] == [1, 2, 3]  # the pairs of a prompt stay together


def test_plan_ends_at_the_first_limit_with_a_short_batch() -> None:
    def sizes(n_epochs: int | None, n_examples: int | None) -> list[int]:
        plan = plan_batches(examples_of(*[1] * 10), 4, seed=0, n_epochs=n_epochs, n_examples=n_examples)
        return [len(batch) for batch in plan]

    assert sizes(1, None) == [4, 4, 2]
    assert sizes(None, 13) == [4, 4, 4, 1]
    assert sizes(1, 5) == [4, 1]
    assert sizes(1, 50) == [4, 4, 2]
    assert sizes(None, 3) == [3]
    assert num_planned(10, 3, None) == 30
    assert list(plan_batches([], 4, seed=0, n_epochs=1, n_examples=None)) == []


def test_plan_follows_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        return list(plan_batches(examples_of(*[1] * 10), 4, seed=seed, n_epochs=1, n_examples=None))

    assert order(0) == order(0) != order(1)


def test_the_evaluation_subset_follows_the_seed() -> None:
    examples = examples_of(*[1] * 30)
    chosen = [[example.prompt_index for example in choose_eval_examples(examples, 8, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 8 and chosen[0] != sorted(chosen[0])
    larger = [example.prompt_index for example in choose_eval_examples(examples, 12, 0)]
    assert larger[:8] == chosen[0]  # a larger subset contains the smaller one
    assert sorted(example.prompt_index for example in choose_eval_examples(examples, 99, 0)) == list(range(30))


def test_an_empty_microbatch_by_hand() -> None:
    packed, padded = empty_microbatch(2), empty_microbatch(1, "padded")
    assert packed.input_ids.tolist() == padded.input_ids.tolist() == [[0]]
    assert packed.position_ids is not None and packed.position_ids.tolist() == [[0]]
    assert packed.segments is not None and packed.segments.groups == [(1, 0)] and packed.attention_mask is None
    assert padded.attention_mask is not None and padded.attention_mask.tolist() == [[1]]
    assert padded.position_ids is None and padded.segments is None
    assert packed.rejected is not None and len(packed.rejected) == 0 and padded.rejected is None
    for batch in (packed, padded):
        assert batch.span == batch.groups[0] == GroupSpan(slice(0, 0), slice(0, 0), slice(0, 0))
        assert (batch.num_examples, batch.num_tokens, batch.responses, batch.prompt_indices) == (0, 0, [], [])
        assert len(batch.targets) == len(batch.predict_index) == len(batch.response_index) == 0


def test_to_moves_every_tensor() -> None:
    batch = lay_out(random_examples([(3, 2, 2)])).to(torch.device("meta"))
    assert {value.device.type for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize("budget", [1, 30, 100, 10**6])
def test_the_budget_of_padded_rows_counts_their_padding(budget: int) -> None:
    examples = pair_examples()
    microbatches = split_batch(examples, 1, budget, "padded")
    assert_split_in_order(microbatches, examples)
    assert all(len(part) == 1 or lay_out(part, "padded").input_ids.numel() <= budget for part in microbatches)
    assert (len(microbatches) == 1) == (budget == 10**6)


def grouped_plan(
    examples: Sequence[Example], seed: int = 0, n_epochs: int | None = 1, n_examples: int | None = None, on: bool = True
) -> list[list[int]]:
    return list(plan_batches(examples, 8, seed=seed, n_epochs=n_epochs, n_examples=n_examples, length_grouping=on))


def spread(plan: list[list[int]], examples: Sequence[Example]) -> float:
    """The mean difference between the longest and shortest example of a batch."""
    lengths = [[num_fed_tokens(examples[index]) for index in batch] for batch in plan]
    return float(np.mean([max(batch) - min(batch) for batch in lengths]))


@pytest.fixture
def few_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.step.sources, "GROUPED_BATCHES", 10)


def test_length_grouping_makes_batches_of_similar_lengths_in_random_order(few_grouped: None) -> None:
    examples = sized(*np.random.default_rng(0).integers(1, 100, 160))
    grouped = grouped_plan(examples)
    assert spread(grouped, examples) < spread(grouped_plan(examples, on=False), examples) / 5
    means = [np.mean([num_fed_tokens(examples[index]) for index in batch]) for batch in grouped]
    assert sum(later > earlier for earlier, later in itertools.pairwise(means)) < 15  # of 19, if sorted 18 or 19


def test_length_grouping_keeps_the_epochs_the_seed_and_the_end(few_grouped: None) -> None:
    examples = sized(*np.random.default_rng(0).integers(1, 100, 150))  # not a multiple of the batch size
    batches = grouped_plan(examples, n_epochs=2)
    assert [len(batch) for batch in batches] == [8] * 37 + [4]
    order = [index for batch in batches for index in batch]
    assert sorted(order[:150]) == sorted(order[150:]) == list(range(150))
    assert order[:150] != order[150:]
    assert batches == grouped_plan(examples, n_epochs=2) != grouped_plan(examples, n_epochs=2, seed=1)
    some = grouped_plan(examples, n_epochs=None, n_examples=170)
    assert some[:-1] == batches[:21] and some[-1] == batches[21][:2]


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_length_grouping_survives_a_short_batch(n_epochs: int, few_grouped: None) -> None:
    examples = sized(*np.random.default_rng(0).integers(1, 100, 156))
    spreads = {
        on: np.mean([spread(grouped_plan(examples, seed, n_epochs, on=on), examples) for seed in range(4)])
        for on in (True, False)
    }
    assert spreads[True] < spreads[False] / 5


def test_length_grouping_keeps_the_examples_of_a_prompt_together() -> None:
    examples = [
        Example(np.full(5, 2 + prompt, np.int32), (np.zeros(length, np.int32),), prompt)
        for prompt in range(16)
        for length in (1, 40)
    ]
    order = [index for batch in grouped_plan(examples) for index in batch]
    assert all(abs(order.index(2 * prompt) - order.index(2 * prompt + 1)) == 1 for prompt in range(16))
