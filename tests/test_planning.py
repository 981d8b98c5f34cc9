"""Batches planned in numpy are those of a plain plan, and a plan from the middle is the rest of it."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice, repeat
from typing import Any

import numpy as np
import pytest

from engine.data.examples import Example
from engine.step import sources
from engine.step.layout import num_fed_tokens
from engine.step.mixing import Mixture
from engine.step.sources import StoredExamples, plan_batches

Prompt = list[int]


def plain_order(
    examples: Sequence[Example], batch_size: int, seed: int, is_grouped: bool, mixture: Mixture | None
) -> Iterator[int]:
    """The indices of endless epochs, one after another."""
    by_prompt: dict[int, Prompt] = {}
    for index, example in enumerate(examples):
        by_prompt.setdefault(example.prompt_index, []).append(index)
    prompts = list(by_prompt.values())
    for epoch, taken in enumerate(plain_mixture(prompts, mixture, seed) if mixture else repeat(prompts)):
        rng = random.Random(f"{seed}/{epoch}")
        order = list(taken)
        rng.shuffle(order)
        num_begun = epoch * len(examples) % batch_size
        yield from plain_groups(order, examples, batch_size, num_begun, rng) if is_grouped else chain(*order)


def plain_mixture(prompts: Sequence[Prompt], mixture: Mixture, seed: int) -> Iterator[list[Prompt]]:
    """The prompts of endless epochs: each data set in one shuffle after another."""
    ends = list(accumulate(mixture.sizes))
    data_sets = [
        [prompt for prompt in prompts if bisect_right(ends, prompt[0]) == number] for number in range(len(ends))
    ]
    left: list[list[Prompt]] = [[] for _ in ends]
    passes = [0 for _ in ends]
    while True:
        taken: list[Prompt] = []
        for number, missing in enumerate(mixture.counts):
            while missing > 0:
                if not left[number]:
                    left[number] = list(data_sets[number])
                    random.Random(f"{seed}/data set {number}/{passes[number]}").shuffle(left[number])
                    passes[number] += 1
                prompt = left[number].pop()
                if len(prompt) > missing:  # it goes on in the next epoch
                    left[number].append(prompt[missing:])
                taken.append(prompt[:missing])
                missing -= len(taken[-1])
        yield taken


def plain_groups(
    prompts: Sequence[Prompt], examples: Sequence[Example], batch_size: int, num_begun: int, rng: random.Random
) -> list[int]:
    def longest(prompt: Prompt) -> int:
        return max(num_fed_tokens(examples[index]) for index in prompt)

    remaining, first = list(prompts), list[int]()
    while num_begun and remaining and len(first) < batch_size - num_begun:
        first += remaining.pop(0)
    window = sources.GROUPED_BATCHES * batch_size
    windows = [sorted(remaining[start : start + window], key=longest) for start in range(0, len(remaining), window)]
    order = [index for each in windows for prompt in each for index in prompt]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    short = batches.pop() if len(order) % batch_size else []
    rng.shuffle(batches)
    return [*first, *chain(*batches), *short]


def batched(order: Iterator[int], batch_size: int) -> list[list[int]]:
    return list(iter(lambda: list(islice(order, batch_size)), []))


@pytest.mark.parametrize("trial", range(60))
def test_a_plan_is_the_plain_one_from_any_place(trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(trial)

    def tokens() -> np.ndarray:
        return np.zeros(rng.randrange(1, 30), np.int32)

    number = rng.randrange(1, 60)
    prompt_indices = [rng.randrange(number) for _ in range(number)]
    mixture = None
    if trial % 3 == 0 and number > 5:  # two data sets, each with its own prompts
        first, share = number // 2, rng.randrange(1, number)
        prompt_indices = [*sorted(index % 9 for index in prompt_indices[:first]), *range(9, 9 + number - first)]
        mixture = Mixture([first, number - first], [share, number - share])
    examples = [Example(tokens(), (tokens(), tokens()), index) for index in prompt_indices]
    monkeypatch.setattr(sources, "GROUPED_BATCHES", rng.choice([1, 2, 50]))
    batch_size, is_grouped = rng.randrange(1, 9), trial % 2 == 0
    limits: dict[str, Any] = rng.choice(
        [{"n_epochs": 3, "n_examples": None}, {"n_epochs": None, "n_examples": rng.randrange(1, 200)}]
    )
    num_examples = sources.num_planned(number, **limits)
    expected = list(islice(plain_order(examples, batch_size, trial, is_grouped, mixture), num_examples))
    options: dict[str, Any] = {"seed": trial, "length_grouping": is_grouped, "mixture": mixture, **limits}
    for start in (0, 1, rng.randrange(num_examples), num_examples - 1, num_examples, num_examples + 1):
        found = list(plan_batches(examples, batch_size, start=start, **options))
        assert found == batched(iter(expected[start:]), batch_size), start
    source = StoredExamples(examples, batch_size=batch_size, **options)
    assert [[id(each) for each in batch] for batch in source.batches()] == [
        [id(examples[index]) for index in batch] for batch in batched(iter(expected), batch_size)
    ]
