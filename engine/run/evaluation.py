"""Evaluate a policy: losses of held-out examples, and metrics of sampled responses."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.models.adapters import adapter_of
from engine.models.generation import sample_responses
from engine.models.precision import run_in_dtype
from engine.placement.placement import Placement
from engine.run.histograms import reward_histograms
from engine.run.kl import KLMeter, mean_and_error
from engine.run.win_rates import WinRates
from engine.settings.schema import Settings
from engine.step.metrics import MetricAccumulator, prefix_metrics, to_floats
from engine.step.microbatches import MicrobatchRunner
from engine.step.reward_metrics import evaluation_metrics
from utils import content_hash, prefetch, progress

Rows = list[dict[str, Any]]


class Evaluator:
    """Evaluates the policy of a runner, always on the same examples and prompts.

    Args:
        examples: to evaluate on; may be empty.
        reward: the ground-truth reward of a response; None for data sets without one.
        say: prints a notice.
        win_rates: of the policy over the reference; None for no such metrics.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        placement: Placement,
        runner: MicrobatchRunner,
        examples: Sequence[Example],
        reward: Callable[[str], float] | None,
        say: Callable[[str], None],
        win_rates: WinRates | None = None,
    ):
        self.examples = examples
        self._settings, self._tokenizer = settings, tokenizer
        self._placement, self._runner, self._reward = placement, runner, reward
        self._prompts = self.prompts()[: settings.n_eval_model_samples]
        self.histograms: dict[str, Any] = {}  # of the last evaluation
        self.win_rates = win_rates
        self.kl = KLMeter(settings, placement, runner, self._prompts, say)

    def prompts(self) -> list[np.ndarray]:
        """Distinct prompts of the examples, to sample responses for."""
        return list({example.prompt.tobytes(): example.prompt for example in self.examples}.values())

    @property
    def num_bytes(self) -> float:
        """Memory of the training device that stays taken beside the models of training."""
        return float(self.win_rates.num_bytes) if self.win_rates else 0.0

    @property
    def should_sample(self) -> bool:
        """Whether evaluations sample responses."""
        return self._settings.sample_during_eval and bool(self._prompts)

    def batches(self, token_budget: int) -> Iterator[list[list[Example]]]:
        """The examples, eval_batch_size at a time, each batch split into microbatches."""
        for start in range(0, len(self.examples), self._settings.eval_batch_size):
            batch = self.examples[start : start + self._settings.eval_batch_size]
            yield self._placement.split_batch(batch, 1, token_budget)

    @torch.no_grad()
    def measure(self, token_budget: int, sync_stop_request: Callable[[], bool]) -> dict[str, float] | None:
        """Mean metrics over the examples; None after a stop request."""
        runner, placement = self._runner, self._placement
        has_rankings = runner.objective.batch == "ranked"
        metrics = MetricAccumulator(keeps_rankings=has_rankings)
        num_batches = math.ceil(len(self.examples) / self._settings.eval_batch_size)
        batches = self.batches(token_budget)
        prepared = prefetch(placement.prepare_batch(runner, parts, 1, token_budget) for parts in batches)
        with runner.in_mixed_precision():
            shown = progress(prepared, description="evaluating", total=num_batches, unit="batches", stays=False)
            for batch in shown:
                if sync_stop_request():
                    return None
                runner.measure(batch, placement.all_reduce_sum, metrics)
        means = metrics.reduce(placement.all_reduce_sum).means
        self.histograms = reward_histograms(placement.gather_from_data_ranks(metrics.values_of("rewards/")))
        if has_rankings:
            by_rank = placement.gather_from_data_ranks([each.cpu() for each in metrics.rankings or []])
            means |= evaluation_metrics([each for of_rank in by_rank for each in of_rank])
        return to_floats(prefix_metrics(means, "eval"))

    def sample(self, model: PreTrainedModel, num_examples: int) -> list[np.ndarray]:
        """Sample one response of model per prompt, int32 [response tokens] each. Ranks share the work.

        Args:
            num_examples: trained on so far; part of the seed.
        """
        settings, placement = self._settings, self._placement
        prompts = self._prompts[placement.data_rank :: placement.num_data_ranks]
        seed = int(content_hash(["sample", settings.seed, num_examples])[:8], 16) + placement.data_rank
        # Full models sample in their own dtype. With adapters, frozen weights may be stored in the compute dtype.
        dtype = placement.compute_dtype if adapter_of(model) else None
        with run_in_dtype(model, dtype), placement.gathered(model):  # shards are rounded, and then gathered
            responses = sample_responses(
                model,
                self._tokenizer,
                prompts,
                max_new_tokens=settings.max_length - settings.max_prompt_length,
                max_length=settings.max_length,
                batch_size=settings.eval_batch_size,
                seed=seed,
            )
        by_rank, num_ranks = placement.gather_from_data_ranks(responses), placement.num_data_ranks
        return [by_rank[index % num_ranks][index // num_ranks] for index in range(len(self._prompts))]

    def sample_policy(self, num_examples: int, token_budget: int, is_last: bool) -> tuple[Rows, dict[str, float]]:
        """Sample responses of the policy.

        Args:
            is_last: this evaluation is the last of the run.

        Returns:
            rows with the texts, and metrics: the ground-truth reward, if any, KL divergences and win rates.
        """
        policy = self.sample(self._runner.policy, num_examples)
        samples = {"policy": policy} | ({"reference": self.kl.reference_samples} if self.kl.reference_samples else {})
        texts = {model: self._tokenizer.batch_decode(ids, skip_special_tokens=True) for model, ids in samples.items()}
        prompts = self._tokenizer.batch_decode(self._prompts, skip_special_tokens=True)
        rows: Rows = [{"examples": num_examples, "prompt": prompt} for prompt in prompts]
        for model in texts:
            for row, text in zip(rows, texts[model], strict=True):
                row[model] = text
        metrics = self._add_rewards(rows, list(texts)) | self._lengths(policy)
        metrics |= self.kl.measure(policy, token_budget, is_last)
        return rows, metrics | self.compare(policy, num_examples)

    def compare(self, samples: Sequence[np.ndarray], num_examples: int) -> dict[str, float]:
        """Win rates over the reference, if they are measured.

        Args:
            samples: of the policy, for the first prompts.
        """
        return self.win_rates.measure(self._runner.policy, samples, num_examples) if self.win_rates else {}

    def _lengths(self, samples: Sequence[np.ndarray]) -> dict[str, float]:
        """Means of lengths in tokens and of responses without end of text; and their change from the reference."""

        def numbers(responses: Sequence[np.ndarray]) -> dict[str, Tensor]:
            ends = [response[-1] == self._tokenizer.eos_token_id for response in responses]
            lengths = torch.tensor([len(response) for response in responses], dtype=torch.float64)
            return {"length": lengths, "unfinished": 1 - torch.tensor(ends, dtype=torch.float64)}

        policy, metrics = numbers(samples), dict[str, float]()
        for name, values in policy.items():
            metrics |= mean_and_error(f"samples_eval/{name}", values)
        if self.kl.reference_samples:
            for name, values in numbers(self.kl.reference_samples).items():
                metrics |= mean_and_error(f"samples_eval/{name}_change", policy[name] - values)
        return metrics

    def _add_rewards(self, rows: Rows, models: Sequence[str]) -> dict[str, float]:
        """Add ground-truth rewards to the rows; returns their means and the win rate."""
        metrics: dict[str, float] = {}
        if self._reward is None:
            return metrics
        for model in models:
            for row in rows:
                row[f"{model}_reward"] = self._reward(row[model])
            metrics[f"ground_truth/{model}"] = float(np.mean([row[f"{model}_reward"] for row in rows]))
        if "reference" in models:
            differences = np.array([row["policy_reward"] - row["reference_reward"] for row in rows])
            metrics["ground_truth/win_rate"] = float(np.mean((differences > 0) + 0.5 * (differences == 0)))
        return metrics
