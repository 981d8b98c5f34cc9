"""The source of online training: iterations of prompts, their sampled responses, and the batches of these.

An iteration takes prompts, samples responses to each, and gives batches in several passes. Its responses depend on the
policy at its start, so nothing is made ahead.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.data.examples import Example, Rollout, fingerprint
from engine.step.mixing import Mixture
from engine.step.sources import num_planned, plan_batches
from online_losses import Mean, token_weights

ROLLOUTS_FILE = "rollouts.npz"  # of a checkpoint inside an iteration


@dataclass(frozen=True)
class Iteration:
    """Prompts of an iteration with their responses.

    Args:
        first_prompt: the number of prompts of the run before it.
        examples: one for each prompt. Without responses, if all of them are left out.
    """

    first_prompt: int
    examples: list[Example]


class RollOut(Protocol):
    """Samples the responses of iterations.

    Attributes:
        metrics: of the last iteration.
        rows: responses of the last iteration, for the log.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]

    def make(self, first_prompt: int, prompts: Sequence[Example]) -> list[Example]:
        """The prompts with responses. Weights of the tokens are still empty.

        Args:
            first_prompt: the number of prompts of the run before these.
        """
        ...


class SampledResponses:
    """Batches of sampled responses. An example is a prompt with its responses; each pass counts.

    Args:
        prompts: examples without responses.
        prompts_per_iteration: a multiple of batch_size.
        passes: over the responses of an iteration.
        n_epochs: over the prompts.
        n_examples: of all passes. The run ends at the first limit reached; one of them may be None.
        mean, max_new_tokens: for online_losses.token_weights.
        mixture: see plan_batches.

    Attributes:
        roll_out: samples the responses; set once there is a policy.
    """

    roll_out: RollOut
    may_prefetch = False

    def __init__(
        self,
        prompts: Sequence[Example],
        *,
        prompts_per_iteration: int,
        passes: int,
        batch_size: int,
        seed: int,
        n_epochs: int | None,
        n_examples: int | None,
        mean: Mean,
        max_new_tokens: int,
        mixture: Mixture | None = None,
    ):
        self.examples = prompts
        self._prompts_per_iteration, self._passes, self._batch_size = prompts_per_iteration, passes, batch_size
        self._seed, self._n_epochs, self._n_examples = seed, n_epochs, n_examples
        self._mean, self._max_new_tokens, self._mixture = mean, max_new_tokens, mixture
        self._iteration: Iteration | None = None

    @property
    def num_examples(self) -> int:
        return num_planned(len(self.examples) * self._passes, self._n_epochs, self._n_examples)

    @property
    def num_updates(self) -> int:
        num_prompts = math.ceil(self.num_examples / self._passes)
        whole, rest = divmod(num_prompts, self._prompts_per_iteration)
        per_pass = math.ceil(rest / self._batch_size)
        return whole * self._passes * self._prompts_per_iteration // self._batch_size + self._passes * per_pass

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.examples)

    def batches(self, start: int = 0) -> Iterator[list[Example]]:
        num_prompts = math.ceil(self.num_examples / self._passes)
        first_prompt = 0
        for indices in plan_batches(
            self.examples,
            self._prompts_per_iteration,
            seed=self._seed,
            n_epochs=None,
            n_examples=num_prompts,
            mixture=self._mixture,
        ):
            position, prompts = first_prompt * self._passes, [self.examples[index] for index in indices]
            num_left = min(self.num_examples - position, len(prompts) * self._passes)  # of the iteration
            if start < position + num_left:
                yield from self._batches_of_iteration(first_prompt, prompts, max(0, start - position), num_left)
            first_prompt += len(prompts)

    def new_batches(self) -> Iterator[list[Example]]:
        return iter(())  # responses are unknown before training

    def _batches_of_iteration(
        self, first_prompt: int, prompts: list[Example], num_done: int, num_examples: int
    ) -> Iterator[list[Example]]:
        """The batches of an iteration after its first num_done examples, up to num_examples."""
        iteration = self._iteration
        if iteration is None or iteration.first_prompt != first_prompt:
            num_learned = num_done // self._passes  # by a run with a shorter last iteration, resumed here
            num_done, num_examples = 0, num_examples - num_done
            first_prompt, prompts = first_prompt + num_learned, prompts[num_learned:]
            iteration = self._iteration = Iteration(first_prompt, self.roll_out.make(first_prompt, prompts))
        end = 0
        for batch in self._minibatches(iteration):
            start, end = end, end + len(batch)
            batch = batch[max(0, num_done - start) : num_examples - start]
            if batch:
                yield self._with_weights(batch)

    def _minibatches(self, iteration: Iteration) -> Iterator[list[Example]]:
        """The batches of all passes: the first in the order of the prompts, the others shuffled."""
        for number in range(self._passes):
            order = list(iteration.examples)
            if number:
                random.Random(f"{self._seed}/{iteration.first_prompt}/{number}").shuffle(order)
            for start in range(0, len(order), self._batch_size):
                yield order[start : start + self._batch_size]

    def _with_weights(self, batch: Sequence[Example]) -> list[Example]:
        """A batch with the weights of its tokens. The mean over its examples is then the loss of the batch."""
        lengths = [len(response) for example in batch for response in example.responses]
        if not lengths:
            return list(batch)
        weights = token_weights(self._mean, torch.tensor(lengths), self._max_new_tokens).numpy() * len(batch)
        by_response = iter(np.split(weights, np.cumsum(lengths)[:-1]))
        found = []
        for example in batch:
            rollout = example.rollout
            if example.responses:
                assert rollout is not None
                of_example = tuple(next(by_response) * example.weight for _ in example.responses)
                rollout = replace(rollout, weights=of_example)
            found.append(replace(example, rollout=rollout))
        return found

    def take_metrics(self, log_samples: Callable[..., None]) -> dict[str, float]:
        if not self.roll_out.rows:
            return {}
        log_samples(self.roll_out.rows, is_shown=False)
        self.roll_out.rows = []
        return self.roll_out.metrics

    def ends_iteration(self, num_examples: int) -> bool:
        return num_examples >= self.num_examples or self.state(num_examples) is None

    # ---- Checkpoints ----

    def state(self, num_examples: int) -> Callable[[Path], None] | None:
        """The responses of an iteration with batches left."""
        iteration = self._iteration
        if iteration is None or num_examples >= (iteration.first_prompt + len(iteration.examples)) * self._passes:
            return None
        return lambda directory: write_iteration(iteration, directory / ROLLOUTS_FILE)

    def restore(self, checkpoint: Path) -> None:
        path = checkpoint / ROLLOUTS_FILE
        self._iteration = read_iteration(path, self.examples) if path.exists() else None


ARRAYS = ("old_logps", "reference_logps", "advantages")


def write_iteration(iteration: Iteration, path: Path) -> None:
    """Write the responses of an iteration, and the numbers of their tokens."""
    responses = [response for example in iteration.examples for response in example.responses]
    rollouts = [example.rollout for example in iteration.examples if example.rollout is not None]
    arrays: dict[str, Any] = {
        "prompts": np.array([example.prompt_index for example in iteration.examples]),
        "num_responses": np.array([len(example.responses) for example in iteration.examples]),
        "lengths": np.array([len(response) for response in responses]),
        "tokens": np.concatenate([np.zeros(0, dtype=np.int32), *responses]),
    }
    for name in ARRAYS:
        of_examples = [getattr(rollout, name) for rollout in rollouts]
        if of_examples and of_examples[0] is not None:
            arrays[name] = np.concatenate([values for each in of_examples for values in each])
    facts = np.array(json.dumps({"first_prompt": iteration.first_prompt}))
    np.savez(path, facts=facts, **arrays)


def read_iteration(path: Path, prompts: Sequence[Example]) -> Iteration:
    """Read what write_iteration() wrote.

    Args:
        prompts: of the run.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    by_index = {prompt.prompt_index: prompt for prompt in prompts}
    ends = np.cumsum(arrays["lengths"])[:-1]
    columns = {
        name: np.split(arrays[name], ends) if name in arrays and len(arrays["lengths"]) else None
        for name in ("tokens", *ARRAYS)
    }
    examples, start = [], 0
    for prompt_index, number in zip(arrays["prompts"].tolist(), arrays["num_responses"].tolist(), strict=True):
        end = start + number
        parts = {name: None if each is None else tuple(each[start:end]) for name, each in columns.items()}
        rollout = None
        if number:
            old_logps, reference_logps, advantages = (parts[name] for name in ARRAYS)
            assert old_logps is not None and advantages is not None
            rollout = Rollout((), old_logps, reference_logps, advantages)
        responses = (parts["tokens"] or ()) if number else ()
        examples.append(replace(by_index[prompt_index], responses=responses, rollout=rollout))
        start = end
    return Iteration(json.loads(str(arrays["facts"]))["first_prompt"], examples)
