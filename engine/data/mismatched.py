"""Mismatched responses: each example gets the response to another prompt."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.data.example_table import ExampleTable, prompt_hashes, prompt_indices
from engine.data.examples import Example
from engine.data.preferences import SplitName
from utils import UserError


def add_mismatched(examples: Sequence[Example], max_length: int, seed: int, split: SplitName) -> Sequence[Example]:
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
    other = np.zeros(len(examples), np.int64)  # the example whose response each gets
    for indices, others in zip(prompts, prompts[1:] + prompts[:1], strict=True):
        for position, index in enumerate(indices):
            other[index] = others[position % len(others)]
    if isinstance(examples, ExampleTable):
        return examples.with_mismatched(other, max_length)
    return [
        replace(example, mismatched=examples[index].responses[0][: max_length - len(example.prompt)])
        for example, index in zip(examples, other.tolist(), strict=True)
    ]


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

    first_indices: dict[int, int] = {}  # hash of a prompt's tokens -> the first prompt index with them
    indices = prompt_indices(examples).tolist()
    for index, tokens in zip(indices, prompt_hashes(examples).tolist(), strict=True):
        parents.setdefault(index, index)
        parents[root(index)] = root(first_indices.setdefault(tokens, index))
    first_of_text: dict[int, int] = {}
    for text, index in zip(prompt_texts, indices, strict=bool(prompt_texts)):
        parents[root(index)] = root(first_of_text.setdefault(text, index))
    prompts: dict[int, list[int]] = {}
    for number, index in enumerate(indices):
        prompts.setdefault(root(index), []).append(number)
    return list(prompts.values())
