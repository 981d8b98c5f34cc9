"""Roll out: sample responses to prompts, and compute what their losses need."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.examples import Example, Rollout
from engine.placement.placement import Placement
from engine.run.critic import Critic, critic_metrics
from engine.run.offload import Offload, Part
from engine.run.rollout_metrics import Logps, cost_metrics, learned_metrics, mismatch_metrics, sampling_metrics
from engine.run.sampler import GREEDY, REFERENCE, TRAINING, Costs, Group, Response, Sampler, has_equal_rewards
from engine.settings.keys import keyword_names
from engine.settings.schema import Settings
from engine.step.layout import in_group_order
from engine.step.microbatches import MicrobatchRunner
from engine.step.reference import LiveReference
from engine.step.rollout_source import ARRAYS
from losses import LOSSES
from online_losses import Scored, sampler_ratios
from utils import UserError


class Rollouts:
    """Makes the iterations of online training.

    Args:
        split_batch: a batch -> its microbatches, as in training.
        critic: gives values; None for losses without one.
        offload: of models that are not in use.

    Attributes:
        metrics: of the last iteration, until a step takes them.
        rows: responses of its first prompt, for samples.jsonl.
    """

    def __init__(
        self,
        settings: Settings,
        sampler: Sampler,
        placement: Placement,
        runner: MicrobatchRunner,
        split_batch: Callable[[Sequence[Example]], list[list[Example]]],
        critic: Critic | None,
        offload: Offload,
    ):
        self._critic, self._offload = critic, offload
        self._settings, self._sampler, self._placement = settings, sampler, placement
        self._runner, self._split_batch = runner, split_batch
        self._loss = LOSSES[settings.loss.name]
        self.metrics: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self._has_warned = False
        self._start: tuple[int, float] | None = None  # of the last iteration: its first prompt, and beta before it

    def make(self, first_prompt: int, prompts: Sequence[Example], *, again: bool = False) -> list[Example]:
        """The prompts with sampled responses. All ranks call this together.

        Args:
            first_prompt: the number of prompts of the run before these.
            again: the run has made this iteration before, and has gone back to a checkpoint.
        """
        # A checkpoint inside the iteration has the beta that the iteration has moved already.
        is_known = again and self._start is not None and self._start[0] == first_prompt
        if is_known and self._start is not None:
            self._set_beta(self._start[1])
        before = self._beta()
        self._start = first_prompt, before
        with self._offload.using("policy"):  # the optimizers stay away until the responses are learned
            examples = self._make(first_prompt, prompts)
        if again and not is_known:  # made before a resume, so the checkpoint is inside the iteration
            self._set_beta(before)
        return examples

    def _make(self, first_prompt: int, prompts: Sequence[Example]) -> list[Example]:
        sampler = self._sampler
        sampler.costs = Costs()
        in_use: list[Part] = ["policy", "reference"] if self._loss.samples_reference else ["policy"]
        with self._offload.using(*in_use):
            first, groups, num_resampled = self._sample(first_prompt, prompts)
            self._check_rewards(first_prompt, groups)
            greedy = self._greedy(first_prompt, prompts)
        kept = self._leave_out(groups, greedy)
        examples = [
            replace(prompt, responses=tuple(response.tokens for response in group))
            for prompt, group in zip(prompts, kept, strict=True)
        ]
        with sampler.timed("logps"):
            logps, values = self._logps(examples), self._values(examples)
        beta = self._beta()
        examples, scored = self._with_advantages(examples, kept, logps, greedy, values)
        self._move_beta(scored)
        learned = [self._without_unlearned(*pair) for pair in zip(examples, kept, strict=True)]
        self._warn_of_masks(kept)
        learned = self._with_new_logps(examples, learned)
        metrics = sampling_metrics(first)
        metrics["rollout/left_out"] = float(sum(map(len, groups)) - sum(map(len, kept)))
        if self._settings.rollout.max_resamples is not None:
            metrics["rollout/resampled_groups"] = float(num_resampled)
        metrics |= mismatch_metrics(kept, logps)
        metrics |= learned_metrics(self._settings, beta, kept, scored, logps, metrics.get("objective/scores"))
        metrics |= critic_metrics(learned)
        seconds = self._placement.gather_from_data_ranks(sampler.costs.seconds)
        self.metrics = metrics | cost_metrics(sampler.costs, seconds)
        self.rows = [
            {
                "examples": first_prompt * self._settings.rollout.epochs,
                "prompt": prompts[0].row.text if prompts[0].row else "",
                "response": response.text,
                "reward": response.reward,
                **({"is_of_reference": response.is_of_reference} if self._loss.samples_reference else {}),
                **{f"reward/{name}": value for name, value in response.score.parts.items()},
            }
            for response in groups[0]
        ]
        return learned

    def _sample(self, first_prompt: int, prompts: Sequence[Example]) -> tuple[list[Group], list[Group], int]:
        """Sample responses to each prompt. Groups of equal rewards are sampled again, if so set.

        Returns:
            the groups as first sampled, those to learn, and the number of groups sampled again.
        """
        rollout = self._settings.rollout
        first: list[Group] = []
        groups: list[Group] = [[] for _ in prompts]
        places, num_resampled = list(range(len(prompts))), 0
        for attempt in range((rollout.max_resamples or 0) + 1):
            numbers = [(first_prompt + place, attempt) for place in places]
            found = self._sample_groups([prompts[place] for place in places], numbers)
            for place, group in zip(places, found, strict=True):
                groups[place] = group
            first = first or found
            num_resampled += len(places) if attempt else 0
            places = [place for place in places if has_equal_rewards(groups[place])]
            if not places:
                break
        return first, groups, num_resampled

    def _check_rewards(self, first_prompt: int, groups: Sequence[Group]) -> None:
        """Check that some response has a reward.

        Raises:
            UserError: DATA without any, as functions failed.
        """
        num_bad = self._sampler.costs.num_bad_rewards
        if num_bad and all(response.reward is None for group in groups for response in group):
            num_responses, epochs = sum(map(len, groups)), self._settings.rollout.epochs
            raise UserError(
                "DATA",
                f"rewards: none of the {num_responses:,} responses after {first_prompt * epochs:,} examples has one;"
                f" functions failed {num_bad:,} times",
                "on_bad_reward=raise shows the error; correct the function or the rows",
            )

    def _sample_groups(self, prompts: Sequence[Example], numbers: Sequence[Sequence[int]]) -> list[Group]:
        """Sample a group of responses to each prompt: of the policy, and its last one of the reference if so set.

        Args:
            numbers: of each prompt, for its random numbers.
        """
        num_responses, runner = self._settings.rollout.num_responses, self._runner

        def seeds(stream: int) -> list[Sequence[int]]:
            return [(stream, *each) for each in numbers]

        if not self._loss.samples_reference:
            return self._sampler.sample(runner.policy, prompts, seeds(TRAINING), num_responses)
        of_policy = self._sampler.sample(runner.policy, prompts, seeds(TRAINING), num_responses - 1)
        assert isinstance(runner.reference, LiveReference)
        with runner.reference.as_reference():
            of_reference = self._sampler.sample(runner.reference.model, prompts, seeds(REFERENCE), 1)
        return [
            [*group, *(replace(response, is_of_reference=True) for response in last)]
            for group, last in zip(of_policy, of_reference, strict=True)
        ]

    def _greedy(self, first_prompt: int, prompts: Sequence[Example]) -> list[Response] | None:
        """The most likely response to each prompt, if the loss compares with it."""
        if not self._loss.has_greedy_baseline:
            return None
        seeds = [(GREEDY, first_prompt + place) for place in range(len(prompts))]
        return [group[0] for group in self._sampler.sample(self._runner.policy, prompts, seeds, 1)]

    def _leave_out(self, groups: Sequence[Group], greedy: Sequence[Response] | None) -> list[Group]:
        """The responses that count: with a reward, and not of a group left out or without a baseline."""
        leaves_out = self._settings.rollout.max_resamples is not None
        if greedy is not None:
            groups = [group if best.reward is not None else [] for group, best in zip(groups, greedy, strict=True)]
        return [
            []
            if leaves_out and has_equal_rewards(group)
            else [response for response in group if response.reward is not None]
            for group in groups
        ]

    def _logps(self, examples: Sequence[Example]) -> list[Logps]:
        """Log-probs of each example's responses under policy and reference, as the first pass computes them."""
        with self._offload.using("policy", "reference"):
            return self._as_in_training(self._runner, examples)

    def _values(self, examples: Sequence[Example]) -> list[list[np.ndarray]] | None:
        """The critic's values of each example's responses, as the first pass computes them; None without a critic."""
        if self._critic is None:
            return None
        with self._offload.using("critic"):
            return [values for values, _ in self._as_in_training(self._critic.runner, examples)]

    def _as_in_training(self, runner: MicrobatchRunner, examples: Sequence[Example]) -> list[Logps]:
        """What a runner computes of the responses of each example.

        Each batch is split as in training, and each rank runs its microbatches of training. So the bits are the same.
        """
        placement, batch_size = self._placement, self._settings.batch_size
        found: dict[int, dict[int, Logps]] = {}  # of the parts of each example

        def to_numpy(values: list[Tensor] | None) -> list[np.ndarray] | None:
            return None if values is None else [each.numpy() for each in values]

        with runner.in_mixed_precision():
            for start in range(0, len(examples), batch_size):
                parts = self._split_batch(examples[start : start + batch_size])
                local = [
                    [(to_numpy(policy), to_numpy(reference)) for policy, reference in runner.sample_logps(part)]
                    for part in placement.rank_slice(parts)
                ]
                by_rank = placement.gather_from_data_ranks(local)
                for number, part in enumerate(parts):
                    logps_of_part = by_rank[number % placement.num_data_ranks][number // placement.num_data_ranks]
                    order = in_group_order([example for example in part if example.responses])
                    for example, (policy, reference) in zip(order, logps_of_part, strict=True):
                        assert policy is not None
                        whole, number = example.part or (example, 0)
                        found.setdefault(id(whole), {})[number] = policy, reference
        return [_join_logps(found.get(id(example), {})) for example in examples]

    def _with_advantages(
        self,
        examples: Sequence[Example],
        kept: Sequence[Group],
        logps: Sequence[Logps],
        greedy: Sequence[Response] | None,
        values: Sequence[list[np.ndarray]] | None,
    ) -> tuple[list[Example], Scored | None]:
        """The examples with the numbers of their tokens, and what the advantages came from; None without responses."""
        places = [place for place, group in enumerate(kept) if group]
        if not places:
            return list(examples), None
        old = [torch.from_numpy(values).double() for place in places for values in logps[place][0]]
        lengths = torch.tensor([len(values) for values in old])
        k1 = torch.zeros(int(lengths.sum()), dtype=torch.float64)
        if logps[places[0]][1] is not None:
            reference = [torch.from_numpy(values).double() for place in places for values in logps[place][1] or []]
            k1 = torch.cat(old) - torch.cat(reference)
        rewards = [response.reward for place in places for response in kept[place]]
        greedy_rewards = [greedy[place].reward for place in places] if greedy else None
        masks = self._settings.rollout.truncated == "mask"
        is_learned = [not response.is_truncated for place in places for response in kept[place]]
        scored = Scored(
            rewards=torch.tensor(rewards, dtype=torch.float64),
            group_sizes=torch.tensor([len(kept[place]) for place in places]),
            lengths=lengths,
            k1=k1,
            greedy_rewards=None if greedy_rewards is None else torch.tensor(greedy_rewards, dtype=torch.float64),
            values=None if values is None else _joined(values[place] for place in places),
            is_learned=torch.tensor(is_learned) if masks else None,
        )
        advantages, returns = self._advantages(scored)
        responses = [response for place in places for response in kept[place]]
        advantages = advantages * self._sampler_ratios(responses, old)

        def of_examples(of_tokens: Tensor) -> Iterator[tuple[np.ndarray, ...]]:
            by_response = iter(of_tokens.split(lengths.tolist()))
            return (tuple(next(by_response).numpy() for _ in kept[place]) for place in places)

        returns_of = [None] * len(places) if returns is None else of_examples(returns)
        found = list(examples)
        for place, of_advantages, of_returns in zip(places, of_examples(advantages), returns_of, strict=True):
            policy, of_reference = logps[place]
            rollout = Rollout(
                weights=(),
                old_logps=tuple(policy),
                reference_logps=None if of_reference is None else tuple(of_reference),
                advantages=of_advantages,
                values=None if values is None else tuple(values[place]),
                returns=of_returns,
            )
            found[place] = replace(examples[place], rollout=rollout)
        return found, scored

    def _advantages(self, scored: Scored) -> tuple[Tensor, Tensor | None]:
        """Advantages, and returns for a critic, [tokens] each."""
        function, keywords = self._loss.advantages, self._settings.loss.keywords | {"beta": self._beta()}
        assert function is not None
        found = function(scored, **{name: keywords[name] for name in keyword_names(function)})
        return found if self._critic is not None else (found, None)

    def _beta(self) -> float:
        """The weight of the KL, as it is now."""
        state, fixed = self._runner.objective.state, self._settings.loss.keywords.get("beta", 0.0)
        return state["beta"].item() if "beta" in state else float(fixed)

    def _move_beta(self, scored: Scored | None) -> None:
        """Adapt the weight of the KL to that of an iteration, for the next one."""
        function, state = self._loss.next_beta, self._runner.objective.state
        if function is None or "beta" not in state or scored is None:
            return
        keywords = {name: self._settings.loss.keywords[name] for name in keyword_names(function)}
        num_responses = len(scored.rewards)
        beta = function(self._beta(), scored.k1.sum().item() / num_responses, num_responses, **keywords)
        self._set_beta(beta)

    def _set_beta(self, beta: float) -> None:
        state = self._runner.objective.state
        if "beta" in state:
            state["beta"] = torch.full_like(state["beta"], beta)

    def _sampler_ratios(self, responses: Sequence[Response], old_logps: Sequence[Tensor]) -> Tensor | float:
        """The weights of another engine's tokens, for losses of ratios of policies; else 1."""
        of_sampler = [response.logps for response in responses if response.logps is not None]
        if not of_sampler or "clip_low" not in self._settings.loss.keywords:
            return 1.0
        lengths = torch.tensor([len(values) for values in old_logps])
        sampler_logps = torch.from_numpy(np.concatenate(of_sampler))
        return sampler_ratios(torch.cat([*old_logps]), sampler_logps, lengths, self._loss.ratios)

    def _without_unlearned(self, example: Example, group: Group) -> Example:
        """An example without the responses that count in the baseline alone."""
        rollout, masks = example.rollout, self._settings.rollout.truncated == "mask"
        if rollout is None:
            return example
        numbers = [
            number
            for number, response in enumerate(group)
            if not (masks and response.is_truncated)
            and not (self._loss.skips_zero_advantages and not rollout.advantages[number].any())
        ]

        def of_numbers(values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            return tuple(values[number] for number in numbers)

        columns = {name: getattr(rollout, name) for name in ARRAYS}
        changes: dict[str, Any] = {name: None if each is None else of_numbers(each) for name, each in columns.items()}
        learned = replace(rollout, **changes)
        return replace(example, responses=of_numbers(example.responses), rollout=learned if numbers else None)

    def _warn_of_masks(self, kept: Sequence[Group]) -> None:
        """Warn once of an iteration without a response to learn: all are truncated, and masked."""
        responses = [response for group in kept for response in group]
        masks = self._settings.rollout.truncated == "mask"
        if self._has_warned or not masks or not all(response.is_truncated for response in responses) or not responses:
            return
        self._has_warned = True
        if self._placement.rank == 0:
            print(
                f"warning: all {len(responses):,} responses of an iteration are truncated, and rollout.truncated=mask"
                " leaves them out: the policy learns nothing from it. What helps: raise rollout.max_new_tokens, or"
                " rollout.truncated=keep with rollout.missing_eos_penalty",
                flush=True,
            )

    def _with_new_logps(self, before: Sequence[Example], after: Sequence[Example]) -> list[Example]:
        """Examples with log-probs as training computes them, after some responses have left their microbatches."""
        if all(len(old.responses) == len(new.responses) for old, new in zip(before, after, strict=True)):
            return list(after)
        found = []
        with self._sampler.timed("logps"):
            new = [replace(example, rollout=None) for example in after]
            logps, values = self._logps(new), self._values(new)
        for number, (example, (policy, reference)) in enumerate(zip(after, logps, strict=True)):
            rollout = example.rollout
            if rollout is not None:
                of_reference = None if reference is None else tuple(reference)
                rollout = replace(rollout, old_logps=tuple(policy), reference_logps=of_reference)
                rollout = rollout if values is None else replace(rollout, values=tuple(values[number]))
            found.append(replace(example, rollout=rollout))
        return found


def _join_logps(parts: Mapping[int, Logps]) -> Logps:
    """Log-probs of an example, from those of its parts by number."""
    in_order = [parts[number] for number in sorted(parts)]
    policy = [values for part, _ in in_order for values in part]
    has_reference = bool(in_order) and in_order[0][1] is not None
    return policy, [values for _, part in in_order for values in part or ()] if has_reference else None


def _joined(values: Iterable[Sequence[np.ndarray]]) -> Tensor:
    """Values of the responses of examples, in fp64, [tokens]."""
    return torch.cat([torch.from_numpy(each).double() for of_example in values for each in of_example])
