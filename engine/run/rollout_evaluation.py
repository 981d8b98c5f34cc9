"""Evaluate a policy of online training: rewards of responses to held-out prompts."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.placement.placement import Placement
from engine.run.evaluation import Evaluator, Rows
from engine.run.kl import mean_and_error
from engine.run.offload import Offload
from engine.run.sampler import EVALUATION, GREEDY, Group, Sampler, reward_metrics
from engine.run.win_rates import WinRates
from engine.settings.schema import Settings
from engine.step.microbatches import MicrobatchRunner
from engine.step.reference import LiveReference


class RolloutEvaluator(Evaluator):
    """Samples a response to each held-out prompt, always with the same random numbers, and the most likely one."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        placement: Placement,
        runner: MicrobatchRunner,
        examples: Sequence[Example],
        sampler: Sampler,
        say: Callable[[str], None],
        offload: Offload,
        win_rates: WinRates | None = None,
    ):
        super().__init__(settings, tokenizer, placement, runner, examples, None, say, win_rates)
        self._sampler, self._offload = sampler, offload
        first = {example.prompt.tobytes(): index for index, example in reversed([*enumerate(examples)])}
        self._logged = sorted(first.values())[: settings.n_eval_model_samples]  # indices of the prompts of self.kl
        self._sampled: list[Group] = []  # of the policy, for all prompts
        self._rows: Rows = []
        self._reference_groups: list[Group] = []

    @property
    def num_bytes(self) -> float:
        is_vllm, (_, memory) = self._settings.rollout.engine == "vllm", self._placement.memory()
        return (
            super().num_bytes + self._sampler.rewards.num_bytes + is_vllm * self._settings.rollout.vllm_memory * memory
        )

    @torch.no_grad()
    def measure(self, token_budget: int, sync_stop_request: Callable[[], bool]) -> dict[str, float] | None:
        """Mean rewards of sampled and most likely responses, and the KL to the reference; None after a stop request."""
        with self._offload.using("policy", "reference"):
            return self._measure(token_budget, sync_stop_request)

    def _measure(self, token_budget: int, sync_stop_request: Callable[[], bool]) -> dict[str, float] | None:
        policy = self._runner.policy
        sampled = self._sample(policy, EVALUATION, range(len(self.examples)))
        if sync_stop_request():
            return None
        greedy = self._sample(policy, GREEDY, range(len(self.examples)))
        metrics: dict[str, float] = {}
        for name, groups in (("sampled", sampled), ("greedy", greedy)):
            rewards = [group[0].reward for group in groups if group[0].reward is not None]
            if rewards:
                metrics[f"rewards_eval/{name}"] = float(np.mean(rewards))
        responses = [group[0] for group in sampled]
        metrics |= reward_metrics(responses, "rewards_eval")
        metrics["rollout_eval/length_mean"] = float(np.mean([len(response.tokens) for response in responses]))
        metrics["rollout_eval/truncated"] = float(np.mean([response.is_truncated for response in responses]))
        if isinstance(self._runner.reference, LiveReference):
            metrics |= mean_and_error("kl_eval", self._logratios(sampled, token_budget))
        self._sampled, self._rows = sampled, self._make_rows(sampled, greedy)
        return metrics

    def sample(self, model: PreTrainedModel, num_examples: int) -> list[np.ndarray]:
        """Sample a response of the reference to each prompt whose responses are logged."""
        self._reference_groups = self._sample(model, EVALUATION, self._logged)
        return [group[0].tokens for group in self._reference_groups]

    def sample_policy(self, num_examples: int, token_budget: int, is_last: bool) -> tuple[Rows, dict[str, float]]:
        """The logged responses of the last measure(), as rows, with their lengths, and win rates of all."""
        rows = [{"examples": num_examples, **row} for row in self._rows]
        metrics = self._lengths([self._sampled[index][0].tokens for index in self._logged])
        compared = self.win_rates.indices if self.win_rates else []
        return rows, metrics | self.compare([self._sampled[index][0].tokens for index in compared], num_examples)

    def _sample(self, model: PreTrainedModel, stream: int, indices: Sequence[int]) -> list[Group]:
        """A response to each of some prompts, with the random numbers of its index."""
        prompts = [self.examples[index] for index in indices]
        return self._sampler.sample(model, prompts, [(stream, index) for index in indices], 1)

    def _make_rows(self, sampled: Sequence[Group], greedy: Sequence[Group]) -> Rows:
        rows: Rows = []
        of_reference = dict(zip(self._logged, self._reference_groups, strict=False))  # without a reference, none
        for index in self._logged:
            prompt = self.examples[index].row
            assert prompt is not None
            groups = {"policy": sampled[index], "greedy": greedy[index], "reference": of_reference.get(index)}
            row: dict[str, object] = {"prompt": prompt.text}
            for name, group in groups.items():
                if group is not None:
                    row |= {name: group[0].text, f"{name}_reward": group[0].reward}
            rows.append(row)
        return rows

    def _logratios(self, groups: Sequence[Group], token_budget: int) -> Tensor:
        """log(policy / reference) of each sampled response, [prompts]: in the mean KL(policy || reference)."""
        runner, placement = self._runner, self._placement
        pairs = zip(self.examples, groups, strict=True)
        examples = [replace(prompt, responses=(group[0].tokens,)) for prompt, group in pairs]
        logratios = []
        with runner.in_mixed_precision():
            for part in placement.rank_slice(placement.split_batch(examples, 1, token_budget)):
                for policy, reference in runner.sample_logps(part):
                    assert reference is not None
                    logratios.append((policy[0].double() - reference[0].double()).sum().item())
        by_rank = placement.gather_from_data_ranks(logratios)
        return torch.tensor([each for of_rank in by_rank for each in of_rank], dtype=torch.float64)
