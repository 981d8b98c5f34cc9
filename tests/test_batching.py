"""Layouts, cuts and plans of batches, by hand."""

import numpy as np
import pytest
import torch

from engine.batching import cut, lay_out, num_fed_tokens, num_planned, plan_batches
from engine.tokenization import Example
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


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("budget", [1, 20, 40, 10**6])
def test_cut_keeps_every_example_and_the_budget(parts: int, budget: int) -> None:
    examples = pair_examples()
    microbatches = cut(examples, parts, budget)
    assert [example for part in microbatches for example in part] == examples
    assert len(microbatches) >= min(parts, len(examples))
    assert all(len(part) == 1 or sum(map(num_fed_tokens, part)) <= budget for part in microbatches)
    if budget == 10**6:
        sizes = [len(part) for part in microbatches]
        assert len(sizes) == min(parts, len(examples)) and max(sizes) - min(sizes) <= 1


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


def test_plan_ends_at_whichever_comes_first_with_a_short_batch() -> None:
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


def test_to_moves_every_tensor() -> None:
    batch = lay_out(random_examples([(3, 2, 2)])).to(torch.device("meta"))
    assert {value.device.type for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize("budget", [1, 30, 100, 10**6])
def test_the_budget_of_padded_rows_counts_their_padding(budget: int) -> None:
    examples = pair_examples()
    microbatches = cut(examples, 1, budget, "padded")
    assert [example for part in microbatches for example in part] == examples
    assert all(len(part) == 1 or lay_out(part, "padded").input_ids.numel() <= budget for part in microbatches)
    assert (len(microbatches) == 1) == (budget == 10**6)
