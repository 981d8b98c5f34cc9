"""Hold out prompts of a training split, where there is no test split."""

import random
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from engine.data.examples import Split

SHARE, MOST = 0.05, 256  # of the prompts


def hold_out_prompts(split: Split, seed: int) -> tuple[Split, Split]:
    """Divide a split into training and held-out examples, by prompt.

    Returns:
        the split and an empty one, if it has a single prompt.
    """
    prompts = sorted({example.prompt_index for example in split.examples})
    num_held_out = min(MOST, max(1, round(SHARE * len(prompts)))) if len(prompts) > 1 else 0
    held_out = {*random.Random(f"{seed}/held out").sample(prompts, num_held_out)}
    ends, sizes = list(accumulate(split.sizes)), [0] * len(split.sizes)
    train, test = [], []
    for index, example in enumerate(split.examples):
        if example.prompt_index in held_out:
            test.append(example)
        else:
            train.append(example)
            sizes[bisect_right(ends, index)] += 1
    return replace(split, examples=train, sizes=sizes), Split(test)
