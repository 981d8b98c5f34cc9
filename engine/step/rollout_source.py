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
from itertools import chain, islice
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
        indices: of its prompts, in the prompts of the run.
        examples: one for each prompt. Without responses, if all of them are left out.
    """

    first_prompt: int
    indices: list[int]
    examples: list[Example]

    @property
    def end(self) -> int:
        """The number of prompts of the run up to its last."""
        return self.first_prompt + len(self.examples)


class RollOut(Protocol):
    """Samples the responses of iterations.

    Attributes:
        metrics: of the last iteration.
        rows: responses of the last iteration, for the log.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]

    def make(self, first_prompt: int, prompts: Sequence[Example], *, again: bool = False) -> list[Example]:
        """The prompts with responses. Weights of the tokens are still empty.

        Args:
            first_prompt: the number of prompts of the run before these.
            again: the run has made this iteration before, and has gone back to a checkpoint.
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
        num_prompts, size = self._prompts_per_iteration, self._batch_size
        num_whole, rest = divmod(self.num_examples, num_prompts * self._passes)  # iterations; examples of the last
        num_prompts_left = math.ceil(rest / self._passes)
        num_passes, num_left = divmod(rest, num_prompts_left) if rest else (0, 0)
        of_whole = num_whole * self._passes * (num_prompts // size)
        return of_whole + num_passes * math.ceil(num_prompts_left / size) + math.ceil(num_left / size)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.examples)

    def batches(self, start: int = 0) -> Iterator[list[Example]]:
        iteration, first_prompt = self._iteration, start // self._passes
        if iteration is not None and iteration.first_prompt * self._passes <= start < iteration.end * self._passes:
            first_prompt = iteration.end
        else:
            iteration = None
        planned = islice(self._planned_prompts(), first_prompt, None)
        while start < self.num_examples:
            if iteration is None:
                indices = [*islice(planned, self._prompts_per_iteration)]
                examples = self.roll_out.make(first_prompt, [self.examples[index] for index in indices])
                iteration = self._iteration = Iteration(first_prompt, indices, examples)
                first_prompt = iteration.end
            num_done = start - iteration.first_prompt * self._passes
            for places in self._minibatches(iteration):
                places, num_done = places[num_done:], max(0, num_done - len(places))
                places = places[: self.num_examples - start]
                start += len(places)
                if places:
                    assert self._iteration is not None
                    examples = self._iteration.examples  # sampled again after a rollback
                    yield self._with_weights([examples[place] for place in places])
            iteration = None

    def new_batches(self) -> Iterator[list[Example]]:
        return iter(())  # responses are unknown before training

    def _planned_prompts(self) -> Iterator[int]:
        """The indices of the prompts of the run, in order."""
        num_prompts = math.ceil(self.num_examples / self._passes)
        plan = plan_batches(
            self.examples, 1, seed=self._seed, n_epochs=None, n_examples=num_prompts, mixture=self._mixture
        )
        return chain.from_iterable(plan)

    def epochs(self, num_examples: int) -> dict[str, float]:
        return {}

    def resample(self, num_examples: int) -> None:
        iteration = self._iteration
        if iteration is None or self.state(num_examples) is None:
            return
        prompts = [self.examples[index] for index in iteration.indices]
        examples = self.roll_out.make(iteration.first_prompt, prompts, again=True)
        self._iteration = replace(iteration, examples=examples)
        self.roll_out.rows = []  # the log has the first ones

    def _minibatches(self, iteration: Iteration) -> Iterator[list[int]]:
        """The examples of the batches of all passes: the first in the order of the prompts, the others shuffled."""
        for number in range(self._passes):
            order = list(range(len(iteration.examples)))
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
        if iteration is None or num_examples >= iteration.end * self._passes:
            return None
        return lambda directory: write_iteration(iteration, directory / ROLLOUTS_FILE)

    def restore(self, checkpoint: Path) -> None:
        path = checkpoint / ROLLOUTS_FILE
        self._iteration = read_iteration(path, self.examples) if path.exists() else None


ARRAYS = ("old_logps", "reference_logps", "advantages", "values", "returns")


def write_iteration(iteration: Iteration, path: Path) -> None:
    """Write the responses of an iteration, and the numbers of their tokens."""
    responses = [response for example in iteration.examples for response in example.responses]
    rollouts = [example.rollout for example in iteration.examples if example.rollout is not None]
    arrays: dict[str, Any] = {
        "prompts": np.array(iteration.indices),
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
    with np.load(path) as file:
        arrays = dict(file)
    indices = arrays["prompts"].tolist()
    ends = np.cumsum(arrays["lengths"])[:-1]
    columns = {
        name: np.split(arrays[name], ends) if name in arrays and len(arrays["lengths"]) else None
        for name in ("tokens", *ARRAYS)
    }
    examples, start = [], 0
    for index, number in zip(indices, arrays["num_responses"].tolist(), strict=True):
        end = start + number
        parts = {name: None if each is None else tuple(each[start:end]) for name, each in columns.items()}
        rollout = None
        if number:
            old_logps, reference_logps, advantages, *of_critic = (parts[name] for name in ARRAYS)
            assert old_logps is not None and advantages is not None
            rollout = Rollout((), old_logps, reference_logps, advantages, *of_critic)
        responses = (parts["tokens"] or ()) if number else ()
        examples.append(replace(prompts[index], responses=responses, rollout=rollout))
        start = end
    return Iteration(json.loads(str(arrays["facts"]))["first_prompt"], indices, examples)
