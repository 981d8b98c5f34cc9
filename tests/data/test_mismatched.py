"""Mismatched responses: always of another prompt, in a seeded order, within max_length."""

import numpy as np
import pytest

from engine.data.examples import Example, fingerprint
from engine.data.mismatched import add_mismatched
from utils import UserError


def example(prompt: list[int], response: list[int], prompt_index: int, label: bool = True) -> Example:
    return Example(np.array(prompt, np.int32), (np.array(response, np.int32),), prompt_index, label)


def random_examples(seed: int, num_prompts: int) -> list[Example]:
    """Examples with one to four responses a prompt. Each response begins with its prompt's index."""
    rng = np.random.default_rng(seed)
    return [
        example([index, *rng.integers(9, size=rng.integers(1, 5))], [index, *rng.integers(9, size=3)], index)
        for index in range(num_prompts)
        for _ in range(rng.integers(1, 5))
    ]


@pytest.mark.parametrize("num_prompts", [2, 3, 40])
@pytest.mark.parametrize("seed", range(5))
def test_prompts_always_differ(num_prompts: int, seed: int) -> None:
    examples = random_examples(seed, num_prompts)
    added = add_mismatched(examples, 100, seed, "train")
    responses = {each.responses[0].tobytes() for each in examples}
    for before, after in zip(examples, added, strict=True):
        assert after.mismatched is not None and after.mismatched.tobytes() in responses
        assert after.mismatched[0] != before.prompt_index
        assert (after.prompt is before.prompt) and (after.responses is before.responses) and after.label
    used = {int(each.mismatched[0]) for each in added if each.mismatched is not None}
    assert used == set(range(num_prompts))  # every prompt lends its responses


def test_the_pairing_is_seeded() -> None:
    examples = random_examples(0, 40)
    same, again, other = (fingerprint(add_mismatched(examples, 100, seed, "train")) for seed in (3, 3, 4))
    assert same == again != other
    assert fingerprint(examples) != same


def test_forms_of_one_prompt_are_one_prompt() -> None:
    """Truncation shortens a prompt for one response, and makes two prompts equal."""
    examples = [
        example([1, 2, 3], [10], 0),
        example([2, 3], [11], 0),
        example([2, 3], [12], 1),
        example([7, 2, 3], [13], 1),
        example([7, 2, 3], [14], 2),
        example([5], [15], 3),
    ]
    for seed in range(5):
        found = [each.mismatched for each in add_mismatched(examples, 10, seed, "train")]
        assert all(each is not None and each.tolist() == [15] for each in found[:5])
        assert found[5] is not None and found[5].tolist() == [10]


def test_a_long_response_is_truncated() -> None:
    examples = [example([1] * 8, [2, 3], 0), example([4], [5] * 9, 1)]
    short, long = add_mismatched(examples, 10, 0, "train")
    assert short.mismatched is not None and short.mismatched.tolist() == [5, 5]
    assert long.mismatched is not None and long.mismatched.tolist() == [2, 3]


@pytest.mark.parametrize(("split", "fix"), [("train", "add rows with other prompts"), ("test", "test_fraction")])
def test_a_single_prompt_is_refused(split, fix) -> None:
    with pytest.raises(UserError, match=f"the {split} split has a single prompt.*{fix}"):
        add_mismatched([example([1], [2], 0), example([1], [3], 0)], 10, 0, split)
