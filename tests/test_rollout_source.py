"""The source of online training: prompts and passes of its iterations, and resume from any place."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.examples import Example, PromptRow, Rollout
from engine.step.rollout_source import SampledResponses

PROMPTS = [Example(np.array([1, 2 + i], dtype=np.int32), (), i, row=PromptRow(str(i), {})) for i in range(64)]
Batches = list[list[tuple[int, int]]]  # of each example its prompt, and the first prompt of its iteration


class FakeResponses:
    """A response of one token: the number of the first prompt of its iteration."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]

    def make(self, first_prompt: int, prompts: Sequence[Example], *, again: bool = False) -> list[Example]:
        response, zero = np.array([first_prompt], dtype=np.int32), np.zeros(1)
        rollout = Rollout((), (zero,), None, (zero,))
        return [replace(prompt, responses=(response,), rollout=rollout) for prompt in prompts]


class Learner:
    """Learns n_examples, from a checkpoint or from scratch.

    Args:
        shape: passes, prompts of an iteration, and batch_size.
    """

    def __init__(self, directory: Path, shape: tuple[int, int, int], prompts: Sequence[Example] = PROMPTS):
        self.directory, self.shape, self.prompts = directory, shape, prompts
        self.num_done = 0

    def source(self, n_examples: int) -> SampledResponses:
        passes, num_prompts, batch_size = self.shape
        source = SampledResponses(
            self.prompts,
            prompts_per_iteration=num_prompts,
            passes=passes,
            batch_size=batch_size,
            seed=0,
            n_epochs=None,
            n_examples=n_examples,
            mean="tokens",
            max_new_tokens=8,
        )
        source.roll_out = FakeResponses()
        return source

    def learn(self, n_examples: int, start: int = 0, stop: int | None = None) -> Batches:
        """The batches after the checkpoint at start, up to stop; then a checkpoint is saved."""
        source, num_done, batches = self.source(n_examples), start, Batches()
        source.restore(self.directory / f"step-{start}")
        for batch in source.batches(start):
            batches.append([(example.prompt_index, int(example.responses[0][0])) for example in batch])
            num_done += len(batch)
            if num_done == stop:
                break
        directory = self.directory / f"step-{num_done}"
        directory.mkdir(exist_ok=True)
        write = source.state(num_done)
        if write is not None:
            write(directory)
        self.num_done = num_done
        return batches


SHAPES = [(1, 8, 2), (2, 4, 2), (2, 4, 4), (3, 6, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_first", [5, 9, 10, 24])
def test_an_extended_run_resumes_from_any_checkpoint(tmp_path, shape, num_first):
    """n_examples may end inside an iteration, and inside a pass of it."""
    learner = Learner(tmp_path, shape)
    learner.learn(num_first)
    whole = learner.learn(30, num_first)
    assert learner.num_done == 30
    ends = np.cumsum([num_first, *map(len, whole)]).tolist()
    for number, stop in enumerate(ends[1:-1], 1):
        assert learner.learn(30, num_first, stop) == whole[:number]
        assert learner.learn(30, stop) == whole[number:]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_first", [5, 9, 10, 24])
def test_an_extended_run_learns_each_prompt_in_every_pass(tmp_path, shape, num_first):
    passes = shape[0]
    n_examples = 30 * passes
    learner = Learner(tmp_path, shape)
    batches = [*learner.learn(num_first), *learner.learn(n_examples, num_first)]
    learned = [example for batch in batches for example in batch]
    assert len(learned) == n_examples
    planned = Learner(tmp_path / "other", (1, 1, 1))
    planned.directory.mkdir()
    prompts = [prompt for batch in planned.learn(30) for prompt, _ in batch]
    assert sorted(prompt for prompt, _ in learned) == sorted(prompts * passes)
    assert all(learned.count(example) == passes for example in learned)  # in the passes of one iteration


@pytest.mark.parametrize("shape", [*SHAPES, (4, 4, 4), (4, 8, 4)])
@pytest.mark.parametrize("n_examples", [1, 8, 9, 13, 24, 31])
def test_the_number_of_updates(tmp_path, shape, n_examples):
    learner = Learner(tmp_path, shape)
    assert learner.source(n_examples).num_updates == len(learner.learn(n_examples))


def test_prompts_of_several_rows_keep_their_rows(tmp_path):
    """Equal prompts with other columns share a prompt_index."""
    prompts = [replace(each, prompt_index=i // 2) for i, each in enumerate(PROMPTS)]
    learner = Learner(tmp_path, (1, 4, 2), prompts)
    learner.learn(2, stop=2)
    source = learner.source(4)
    source.restore(tmp_path / "step-2")
    (batch,) = source.batches(2)
    whole = learner.source(4)
    _, expected = whole.batches()
    assert [example.row for example in batch] == [example.row for example in expected]
