"""Mismatched responses: each example gets the response to another prompt."""

import random
from collections.abc import Sequence
from dataclasses import replace

from engine.data.examples import Example
from engine.data.preferences import SplitName
from utils import UserError


def add_mismatched(examples: Sequence[Example], max_length: int, seed: int, split: SplitName) -> list[Example]:
    """The examples, each with a response to another prompt.

    The prompts are shuffled. Each gets the responses to the next one, the last those to the first. Every example has
    its response for the whole run, so that a cached reference knows it.

    Args:
        max_length: of prompt + response, in tokens. A longer response is truncated.
        split: for the error.

    Raises:
        UserError: DATA, for a single prompt.
    """
    prompts = group_by_prompt(examples)
    if len(prompts) == 1:
        problem = f"datasets: the {split} split has a single prompt, and this loss needs responses to other prompts"
        held_out = "; test_fraction holds out more of a file, or none at 0" if split == "test" else ""
        raise UserError("DATA", problem, f"add rows with other prompts{held_out}")
    random.Random(f"{seed}/mismatched").shuffle(prompts)
    added = [*examples]
    for indices, others in zip(prompts, prompts[1:] + prompts[:1], strict=True):
        for position, index in enumerate(indices):
            example, (response, *_) = examples[index], examples[others[position % len(others)]].responses
            added[index] = replace(example, mismatched=response[: max_length - len(example.prompt)])
    return added


def group_by_prompt(examples: Sequence[Example], prompt_texts: Sequence[int] = ()) -> list[list[int]]:
    """Indices of the examples of each prompt, in the order of the data.

    Examples share a prompt by their rows or by their tokens: truncation gives one prompt several forms, and several
    prompts one form.

    Args:
        prompt_texts: Split.prompt_texts, to join equal prompts of several data sets too.
    """
    parents: dict[int, int] = {}  # prompt index -> a prompt index of the same prompt, itself at the root

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    first_indices: dict[bytes, int] = {}  # tokens of a prompt -> the first prompt index with them
    for example in examples:
        parents.setdefault(example.prompt_index, example.prompt_index)
        first = first_indices.setdefault(example.prompt.tobytes(), example.prompt_index)
        parents[root(example.prompt_index)] = root(first)
    first_of_text: dict[int, int] = {}
    for text, example in zip(prompt_texts, examples, strict=bool(prompt_texts)):
        parents[root(example.prompt_index)] = root(first_of_text.setdefault(text, example.prompt_index))
    prompts: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        prompts.setdefault(root(example.prompt_index), []).append(number)
    return list(prompts.values())
