"""Held-out prompts are of no training example, in no data set and in no truncated form."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.examples import Example, Split
from engine.data.held_out import hold_out_prompts
from engine.data.rankings import compare_by_rank
from tests.configs import make_settings


def example(prompt: list[int], prompt_index: int) -> Example:
    responses = (np.array([1], np.int32), np.array([2], np.int32))
    return Example(np.array(prompt, np.int32), responses, prompt_index, comparisons=compare_by_rank((0, 1)))


@pytest.mark.parametrize("seed", range(10))
def test_equal_prompts_of_several_data_sets_stay_together(seed: int) -> None:
    """By tokens, by the number of the prompt, and by its text before truncation."""
    first = [example([index, 7], index) for index in range(30)]
    same_tokens = [example([index, 7], 30 + index) for index in range(30)]
    same_text = [example([7, index, 99], 60 + index) for index in range(30)]
    examples, texts = [*first, *same_tokens, *same_text], [*range(30), *range(30, 60), *range(30)]
    train, test = hold_out_prompts(Split(examples, sizes=[30, 60], prompt_texts=texts), seed)
    assert len(test.examples) == 6 and len(train.examples) == 84  # 2 of 30 prompts
    assert (train.sizes, test.sizes) == ([28, 56], [2, 4])
    assert not {*train.prompt_texts} & {*test.prompt_texts}
    assert not {*_numbers(train)} & {*_numbers(test)}


def _numbers(split: Split) -> list[int]:
    return [next((int(token) for token in each.prompt[:2] if token != 7), 7) for each in split.examples]


def test_every_data_set_keeps_a_prompt() -> None:
    small, large = [example([100], 0)], [example([index], 1 + index) for index in range(40)]
    for seed in range(40):
        train, test = hold_out_prompts(Split([*small, *large], sizes=[1, 40]), seed)
        assert train.sizes == [1, 38] and len(test.examples) == 2
    both = [example([5], 0), example([5], 1)]
    assert hold_out_prompts(Split(both, sizes=[1, 1]), 0)[1].examples == []


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_truncated_at_either_end_is_one_prompt(tmp_path: Path, seed: int) -> None:
    from engine.models.tokenizers import load_tokenizer
    from preference_datasets import load_split

    def question(number: int) -> str:
        return f"film {number}. " + "The cast was good. " * 30 + f"Was film {number} good?"

    folder = tmp_path / "stack-exchange-paired"
    folder.mkdir()
    answers = {"response_j": " Yes.", "response_k": " No."}
    rows: list[dict[str, Any]] = [{"question": question(number), **answers} for number in range(40)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = [f"Question: {question(number)}\n\nAnswer: " for number in range(40)]
    own = [{"prompt": prompt, "chosen": " It was.", "rejected": " It was not."} for prompt in prompts]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, own)))
    settings = make_settings(
        *("loss=reward", f"datasets=[stack-exchange-paired,{tmp_path / 'own.jsonl'}]", f"data_dir={tmp_path}"),
        *("max_length=64", "max_prompt_length=24", "test_fraction=0", f"cache_dir={tmp_path / 'cache'}"),
    )
    tokenizer = load_tokenizer(settings.model)
    split = load_split(settings, tokenizer, "train", "ranked")
    assert len({each.prompt.tobytes() for each in split.examples}) == 80  # two forms of each prompt
    train, test = hold_out_prompts(split, seed)
    assert len(test.examples) == 4 and train.sizes == [38, 38]

    def numbers(part: Split) -> set[str]:
        return {re.findall(r"film (\d+)", tokenizer.decode(each.prompt))[0] for each in part.examples}

    assert len(numbers(test)) == 2 and not numbers(train) & numbers(test)
