"""Build the source and the evaluator of a run: of stored examples, of windows of text, or of sampled responses."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from engine.data.corpus import TextWindows
from engine.data.examples import Example, Split
from engine.data.windows import Windows
from engine.models.sampling_engines import check_engine
from engine.placement.placement import Placement
from engine.run.critic import Critic
from engine.run.evaluation import Evaluator
from engine.run.offload import Offload
from engine.run.reward_functions import build_rewards
from engine.run.rollout_evaluation import RolloutEvaluator
from engine.run.rollouts import Rollouts
from engine.run.sampler import Sampler
from engine.run.win_rates import WinRates, build_judge
from engine.run.window_evaluation import WindowEvaluator, choose_eval_windows
from engine.settings.schema import Settings
from engine.step.microbatches import MicrobatchRunner
from engine.step.mixing import choose_mixture
from engine.step.rollout_source import SampledResponses
from engine.step.sources import Source, StoredExamples, choose_eval_examples
from engine.step.window_source import TokenWindows
from losses import LOSSES


def build_source(settings: Settings, train_split: Split) -> Source:
    """The batches of a run: stored examples, windows of text, or sampled responses to stored prompts.

    Raises:
        UserError: CONFIG if the engine of sampling is not installed.
    """
    common: dict[str, Any] = {
        name: getattr(settings, name) for name in ("batch_size", "seed", "n_epochs", "n_examples")
    }
    if isinstance(train_split, TextWindows):
        return TokenWindows(train_split.windows, **common, weights=settings.weights, data_hash=train_split.content)
    common["mixture"] = choose_mixture(settings, train_split)
    mean = LOSSES[settings.loss.name].mean
    if mean is None:
        return StoredExamples(train_split.examples, **common, length_grouping=settings.length_grouping)
    check_engine(settings)  # before models are loaded
    return SampledResponses(
        train_split.examples,
        **common,
        prompts_per_iteration=settings.rollout.prompts or settings.batch_size,
        passes=settings.rollout.epochs,
        mean=mean,
        max_new_tokens=settings.max_new_tokens,
    )


def examples_to_evaluate(settings: Settings, test_split: Split) -> list[Example]:
    """Held-out examples. None for sampled responses without samples in evaluations: nothing else is measured there."""
    if settings.loss.is_online and not settings.sample_during_eval:
        return []
    if isinstance(test_split, TextWindows):
        return choose_eval_windows(test_split.windows, settings.n_eval_examples, settings.seed)
    return choose_eval_examples(test_split.examples, settings.n_eval_examples, settings.seed)


def build_evaluator(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement,
    runner: MicrobatchRunner,
    examples: Sequence[Example],
    ground_truth: Callable[[str], float] | None,
    source: Source,
    split_batch: Callable[[Sequence[Example]], list[list[Example]]],
    say: Callable[[str], None],
    chat_form: Callable[[Sequence[str]], str | None],
    critic: Critic | None,
    offload: Offload,
) -> Evaluator:
    """The evaluator of a run. A source of sampled responses gets its sampler.

    Args:
        examples: to evaluate on.
        ground_truth: the reward of the data set.
        split_batch: a batch -> its microbatches, as in training.
        say: prints a notice.
        chat_form: names of data sets -> their common chat template.
        critic: gives the values of sampled responses.
        offload: of models that are not in use.
    """
    if isinstance(source, TokenWindows):
        return WindowEvaluator(settings, tokenizer, placement, runner, examples, ground_truth, say)
    if settings.plan:  # it samples nothing
        return Evaluator(settings, tokenizer, placement, runner, examples, ground_truth, say)
    judge = build_judge(settings, tokenizer, placement, ground_truth, chat_form) if examples else None
    win_rates = WinRates(judge, settings, tokenizer, placement, examples, say) if judge else None
    if not isinstance(source, SampledResponses):
        return Evaluator(settings, tokenizer, placement, runner, examples, ground_truth, say, win_rates)
    rewards = build_rewards(settings, tokenizer, placement.device, ground_truth, chat_form)
    sampler = Sampler(settings, tokenizer, placement, rewards)
    source.roll_out = Rollouts(settings, sampler, placement, runner, split_batch, critic, offload)
    return RolloutEvaluator(settings, tokenizer, placement, runner, examples, sampler, say, offload, win_rates)


def examples_to_fit(settings: Settings, examples: Sequence[Example]) -> Sequence[Example]:
    """Training examples, to measure memory. Of prompts, the longest with the longest responses to it.

    Where examples may be cut, only two responses: the measure takes no more, and no group needs to fit as a whole.
    """
    if isinstance(examples, Windows):  # the first window of the longest stream: no other is longer
        longest_stream = max(range(len(examples.streams)), key=lambda number: len(examples.streams[number].tokens))
        return [examples[examples.first_of(longest_stream)]]
    if not settings.loss.is_online:
        return examples
    num_responses = settings.rollout.num_responses
    if settings.loss.cuts_examples:
        num_responses = min(2, num_responses)
    longest = max(examples, key=lambda example: len(example.prompt))
    num_tokens = min(settings.max_new_tokens, settings.max_length - len(longest.prompt))
    response = np.zeros(num_tokens, dtype=np.int32)
    return [replace(longest, responses=(response,) * num_responses)]
