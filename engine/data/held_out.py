"""Hold out prompts of a training split, where there is no test split."""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from engine.data.examples import Split
from engine.data.mismatched import group_by_prompt

SHARE_OF_PROMPTS, MAX_PROMPTS = 0.05, 256


def hold_out_prompts(split: Split, seed: int) -> tuple[Split, Split]:
    """Divide a split into training and held-out examples, by prompt.

    - A prompt has all its examples in one of them, also those of other data sets and of other truncated forms.
    - Every data set keeps a prompt to train on.

    Returns:
        the split and an empty one, if no prompt can be held out.
    """
    prompts = group_by_prompt(split.examples, split.prompt_texts)
    num_wanted = min(MAX_PROMPTS, max(1, round(SHARE_OF_PROMPTS * len(prompts))))
    random.Random(f"{seed}/held out").shuffle(prompts)
    datasets = _datasets(split)
    num_left = Counter(datasets)
    held_out: list[list[int]] = []
    for indices in prompts:
        taken = Counter(datasets[index] for index in indices)
        if len(held_out) < num_wanted and all(num_left[dataset] > number for dataset, number in taken.items()):
            held_out.append(indices)
            num_left -= taken
    test = sorted(index for indices in held_out for index in indices)
    train = sorted({*range(len(split.examples))}.difference(test))
    return replace(_select(split, train), counts=split.counts), _select(split, test)


def _datasets(split: Split) -> list[int]:
    """The number of each example's data set."""
    ends = list(accumulate(split.sizes))
    return [bisect_right(ends, index) for index in range(len(split.examples))]


def _select(split: Split, indices: Sequence[int]) -> Split:
    """Examples of a split, without counts."""
    datasets = _datasets(split)
    sizes = Counter(datasets[index] for index in indices)
    return Split(
        [split.examples[index] for index in indices],
        sizes=[sizes[dataset] for dataset in range(len(split.sizes))],
        prompt_texts=[split.prompt_texts[index] for index in indices] if split.prompt_texts else [],
    )
