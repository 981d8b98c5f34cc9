"""Losses of sampled responses: on-policy identities, and the same gradient for every layout and split."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example, PromptRow, Rollout
from engine.data.parts import join_parts
from engine.settings.keys import keyword_names
from engine.settings.schema import LossSettings
from engine.step.first_pass import FirstPass
from engine.step.layout import in_group_order, lay_out, num_fed_tokens
from engine.step.metrics import MetricAccumulator, to_floats
from engine.step.microbatches import Batch, MicrobatchRunner, Prepared
from engine.step.objectives import make_objective
from engine.step.packing_check import use_packed_attention
from engine.step.reference import LiveReference
from engine.step.rollout_source import SampledResponses
from engine.step.splitting import split_batch
from losses import LOSSES
from online_losses import Scored
from tests.invariants.batches import make_runner
from tests.models import SIZES, exact_norms, random_examples, tiny_model
from tests.quick import slow_except

PAIRS = {"beta": 0.1, "pair_loss": "dpo", "pair_options": None}
KEYWORDS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.1},
    "dr_grpo": {"beta": 0.0},
    "dapo": {"beta": 0.0},
    "rloo": {"beta": 0.1},
    "reinforce_pp": {"beta": 0.1, "baseline": "batch"},
    "remax": {"beta": 0.1},
    "ppo": {"beta": 0.1, "gamma": 1.0, "gae_lambda": 0.95, "entropy_bonus": 0.0},
    "online_dpo": PAIRS,
    "xpo": {**PAIRS, "alpha": 0.01},
    "best_of_n": {},
}
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def keywords_of(name: str) -> dict[str, Any]:
    """The keys of a loss."""
    takes_clips = "clip_low" in keyword_names(LOSSES[name].function)
    return KEYWORDS[name] | (CLIPS if takes_clips else {})


def prompts_with_responses() -> list[Example]:
    """Groups of many sizes. One response is there twice, and two examples share a prompt."""
    examples = random_examples([(9, 4, 7, 2), (1, 6), (5, 1, 3, 1, 1), (12, 5, 1)])
    first, second, third, last = (replace(each, row=PromptRow("", {})) for each in examples)
    third = replace(third, responses=(*third.responses[:3], third.responses[1]))
    return [first, second, third, last, replace(last, responses=(second.responses[0], last.responses[0]))]


def runner_of(
    model: PreTrainedModel,
    name: str,
    layout: str,
    reference: PreTrainedModel | None = None,
    temperature: float = 1.0,
    **keywords: Any,
) -> MicrobatchRunner:
    if layout == "packed":
        use_packed_attention(model)
        if reference is not None:
            use_packed_attention(reference)
    settings = LossSettings(name=name, keywords={**keywords_of(name), **keywords})
    runner = make_runner(model, make_objective(settings), layout, temperature=temperature)
    runner.reference = None if reference is None else LiveReference(reference)
    return runner


def with_rollouts(
    runner: MicrobatchRunner, name: str, parts: Sequence[Sequence[Example]], rewards: Sequence[float] | None = None
) -> list[Example]:
    """Examples with log-probs of the runner's models, advantages and weights, in the order of the parts."""
    found: list[Example] = []
    for part in parts:
        for example, (policy, reference) in zip(in_group_order(part), runner.sample_logps(part), strict=True):
            of_reference = None if reference is None else tuple(each.numpy() for each in reference)
            rollout = Rollout((), tuple(each.numpy() for each in policy), of_reference, ())
            found.append(replace(example, rollout=rollout))
    rollouts = [example.rollout for example in found if example.rollout is not None]
    lengths = torch.tensor([len(response) for example in found for response in example.responses])
    number = len(lengths)
    old = np.concatenate([each for rollout in rollouts for each in rollout.old_logps]).astype(np.float64)
    reference_logps = old
    if rollouts[0].reference_logps is not None:
        reference_logps = np.concatenate([each for rollout in rollouts for each in rollout.reference_logps or ()])
    values = rewards or np.random.default_rng(1).normal(size=number).tolist()
    scored = Scored(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor([len(example.responses) for example in found]),
        lengths,
        torch.from_numpy(old - reference_logps),
        greedy_rewards=torch.linspace(-1, 1, len(found), dtype=torch.float64),
        values=torch.linspace(-1, 1, int(lengths.sum()), dtype=torch.float64),  # of any critic
    )
    function = LOSSES[name].advantages
    assert function is not None
    keywords = KEYWORDS[name]
    advantages = function(scored, **{key: keywords[key] for key in keyword_names(function)})
    if LOSSES[name].value_loss is not None:
        advantages, _ = advantages  # the returns are the critic's
    by_response = iter(advantages.split(lengths.tolist()))
    for index, (example, rollout) in enumerate(zip(found, rollouts, strict=True)):
        of_example = tuple(next(by_response).numpy() for _ in example.responses)
        found[index] = replace(example, rollout=replace(rollout, advantages=of_example))
    if LOSSES[name].skips_zero_advantages:
        found = [without_zeros(example) for example in found]
    return with_weights(found, name)


def without_zeros(example: Example) -> Example:
    """An example without its responses of advantage 0."""
    rollout = example.rollout
    assert rollout is not None
    numbers = [number for number, values in enumerate(rollout.advantages) if values.any()]

    def selected(values: tuple[np.ndarray, ...] | None) -> Any:
        return None if values is None else tuple(values[number] for number in numbers)

    columns = (rollout.old_logps, rollout.reference_logps, rollout.advantages)
    kept = Rollout((), *map(selected, columns)) if numbers else None
    return replace(example, responses=selected(example.responses), rollout=kept)


def with_weights(examples: list[Example], name: str) -> list[Example]:
    mean = LOSSES[name].mean
    assert mean is not None
    source = SampledResponses(
        examples,
        prompts_per_iteration=8,
        passes=1,
        batch_size=8,
        seed=0,
        n_epochs=1,
        n_examples=None,
        mean=mean,
        max_new_tokens=16,
    )
    return source._with_weights(examples)


def loss_and_gradient(
    runner: MicrobatchRunner, parts: Sequence[Sequence[Example]], metrics: MetricAccumulator | None = None
) -> tuple[float, dict[str, Tensor]]:
    metrics, total, num_examples = metrics or MetricAccumulator(), 0.0, sum(map(len, parts))
    for part in parts:
        loss = runner.loss(Prepared(runner.lay_out(part), None), num_examples, FirstPass([], {}), metrics)
        loss.backward()
        total += loss.item()
    named = runner.policy.named_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    runner.policy.zero_grad()
    return total, gradients


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model after a small change of its weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def test_a_group_feeds_its_prompt_once():
    """G samples feed P + sum(R - 1) tokens; equal samples are fed once."""
    first, *_, third, _, _ = prompts_with_responses()
    assert lay_out([first]).num_tokens == num_fed_tokens(first) == 9 + 3 + 6 + 1
    third = prompts_with_responses()[2]
    assert lay_out([third]).num_tokens == 5 + 0 + 2 + 0
    samples = lay_out([third]).samples
    assert samples is not None and samples.lengths.tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in KEYWORDS), ("grpo", 0.7)])
def test_the_first_ratio_is_1_to_the_bit(name, layout, temperature):
    runner = runner_of(tiny_model("llama"), name, layout, tiny_model("llama"), temperature)
    examples = with_rollouts(runner, name, split_batch(prompts_with_responses(), 2, 40, layout))
    parts = split_batch(examples, 2, 40, layout)
    if LOSSES[name].skips_zero_advantages:  # other microbatches: as the trainer does, compute the log-probs again
        examples = with_logps_of(runner, parts)
        parts = split_batch(examples, 2, 40, layout)
    metrics = MetricAccumulator()
    loss, _ = loss_and_gradient(runner, parts, metrics)
    means = metrics.reduce(lambda totals: None).means
    assert means["policy/ratio_max"] == 1
    assert means["policy/approxkl"] == 0
    assert means.get("policy/clipfrac", 0) == 0
    if name in ("online_dpo", "xpo"):
        num_pairs = sum(len(example.responses) for example in examples) // 2
        bonus = 0.01 * sum(example.rollout.old_logps[1].sum() for example in examples if example.rollout)
        expected = math.log(2) + (bonus / num_pairs if name == "xpo" else 0)
        assert loss == pytest.approx(expected, abs=1e-6)  # no margin yet
    for example in examples:
        if example.rollout is None:
            continue
        assert example.rollout.reference_logps is not None
        for old, reference in zip(example.rollout.old_logps, example.rollout.reference_logps, strict=True):
            assert np.array_equal(old, reference)  # KL(policy, itself) is 0


def with_logps_of(runner: MicrobatchRunner, parts: Sequence[Sequence[Example]]) -> list[Example]:
    """Examples with the log-probs of the runner's models, in the order of the parts."""
    found: list[Example] = []
    for part in parts:
        with_responses = [example for example in part if example.responses]
        logps = runner.sample_logps(with_responses) if with_responses else []
        for example, (policy, reference) in zip(in_group_order(with_responses), logps, strict=True):
            assert example.rollout is not None and reference is not None
            old, of_reference = (tuple(each.numpy() for each in values) for values in (policy, reference))
            rollout = replace(example.rollout, old_logps=old, reference_logps=of_reference)
            found.append(replace(example, rollout=rollout))
        found += [example for example in part if not example.responses]
    return found


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_equal_rewards_give_no_gradient(name, layout):
    model = tiny_model("llama", torch.float64)
    runner = runner_of(model, name, layout, beta=0.0)
    examples = with_rollouts(runner, name, [prompts_with_responses()], rewards=[0.3] * 12)
    loss, gradients = loss_and_gradient(runner, [examples])
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_grpo_is_reinforce_with_a_group_baseline_at_ratio_1():
    """The gradient of -A log pi, by plain forward passes, with A = (R - mean) / std of the group."""
    runner = runner_of(exact_model("llama"), "grpo", "packed", beta=0.0)
    rewards = np.random.default_rng(3).normal(size=12).tolist()
    examples = with_rollouts(runner, "grpo", [prompts_with_responses()], rewards)
    _, gradients = loss_and_gradient(runner, [examples])
    model, total, number = exact_model("llama"), torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        group = np.array(rewards[number : number + len(example.responses)])
        number += len(group)
        if len(group) == 1:  # no others to compare with
            continue
        advantages = (group - group.mean()) / (group.std(ddof=1) + 1e-6)
        for response, advantage in zip(example.responses, advantages, strict=True):
            total = total - advantage * plain_logps(model, example.prompt, response, 1.0).mean() / 12
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12)


def plain_logps(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray, temperature: float) -> Tensor:
    """Log-probs of a response, by the forward of transformers' class."""
    tokens = torch.tensor([*prompt.tolist(), *response.tolist()])
    logits = model(tokens[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, tokens[len(prompt) :, None]).squeeze(-1)


def oracle(
    model: PreTrainedModel, name: str, examples: Sequence[Example], temperature: float
) -> tuple[float, dict[str, Tensor]]:
    """One response at a time through the plain forward of transformers' class."""
    function, keywords = LOSSES[name].function, keywords_of(name)
    keywords = {key: keywords[key] for key in keyword_names(function) if key in keywords}
    if LOSSES[name].learns_pairs:
        keywords["pair_loss"] = lambda pairs, beta: (
            -torch.nn.functional.logsigmoid(
                beta * (pairs.policy_better - pairs.reference_better - pairs.policy_worse + pairs.reference_worse)
            )
        )
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        rollout = example.rollout
        if rollout is None:
            continue
        logps = [plain_logps(model, example.prompt, response, temperature) for response in example.responses]
        columns = [rollout.old_logps, rollout.reference_logps or rollout.old_logps, rollout.advantages]
        old, reference, advantages = (torch.from_numpy(np.concatenate(each)).double() for each in columns)
        lengths = torch.tensor([len(response) for response in example.responses])
        losses = function(torch.cat(logps), old, reference, advantages, lengths, **keywords)
        total = total + (losses * torch.from_numpy(np.concatenate(rollout.weights))).sum() / len(examples)
    total.backward()
    named = model.named_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    model.zero_grad()
    return total.item(), gradients


def exact_model(architecture: str) -> PreTrainedModel:
    return exact_norms(tiny_model(architecture, torch.float64))


# Each loss with one architecture and each architecture with two losses; `make soak` runs the other pairs.
PAIRED = [(architecture, name) for row, architecture in enumerate(SIZES) for name in [*KEYWORDS][row :: len(SIZES)]]


@pytest.mark.parametrize("architecture, name", slow_except(itertools.product(SIZES, KEYWORDS), *PAIRED))
def test_packed_padded_and_one_at_a_time_agree(architecture, name):
    temperature = 0.7 if name == "grpo" else 1.0
    results = []
    reference = exact_model(architecture) if KEYWORDS[name].get("beta") else None
    if reference is not None:
        moved(reference)
    start = runner_of(exact_model(architecture), name, "padded", reference, temperature)
    examples = with_rollouts(start, name, [prompts_with_responses()])
    results.append(oracle(moved(exact_model(architecture)), name, examples, temperature))
    for layout in ("packed", "padded"):
        for num_parts in (1, 3):
            runner = runner_of(moved(exact_model(architecture)), name, layout, None, temperature)
            results.append(loss_and_gradient(runner, split_batch(examples, num_parts, 1000, layout)))
    (expected_loss, expected), *others = results
    assert abs(expected_loss) > 1e-4
    for loss, gradients in others:
        assert loss == pytest.approx(expected_loss, abs=1e-10)
        for key, gradient in expected.items():
            torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", [name for name in KEYWORDS if not LOSSES[name].skips_zero_advantages])
def test_a_budget_below_a_group_changes_nothing_but_memory(name, layout):
    """Its responses go to several microbatches. Loss, gradient and metrics are of whole examples."""
    results = []
    start = runner_of(exact_model("llama"), name, layout)
    examples = with_rollouts(start, name, [prompts_with_responses()])
    cut = split_batch(examples, 1, 14, layout, cuts_examples=True)
    assert len(cut) > len(examples)
    assert all(lay_out(part, layout).input_ids.numel() <= 14 for part in cut if sum(len(e.responses) for e in part) > 1)
    # By identity: each example is there once, with all its responses.
    assert sorted(map(id, join_parts([each for part in cut for each in part]))) == sorted(map(id, examples))
    for parts in ([examples], cut):
        runner, metrics = runner_of(moved(exact_model("llama")), name, layout), MetricAccumulator()
        prepared = [runner.prepare(part) for part in parts]
        loss = torch.stack([*runner.losses(Batch(examples, 14, prepared), FirstPass([], {}), metrics)]).sum()
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in runner.policy.named_parameters()}
        results.append((loss.item(), gradients, to_floats(metrics.reduce(lambda totals: None).means)))
    (expected_loss, expected, expected_metrics), (loss_of_parts, gradients, metrics_of_parts) = results
    assert abs(expected_loss) > 1e-4 and loss_of_parts == pytest.approx(expected_loss, abs=1e-12)
    assert metrics_of_parts == pytest.approx(expected_metrics, abs=1e-10)
    for key, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=1e-10)


def test_an_example_without_responses_counts_and_feeds_nothing():
    model = tiny_model("llama", torch.float64)
    runner = runner_of(model, "grpo", "packed", tiny_model("llama", torch.float64))
    examples = with_rollouts(runner, "grpo", [prompts_with_responses()])
    metrics = MetricAccumulator()
    empty = replace(examples[0], responses=(), rollout=None)
    batch = with_weights([*examples, empty], "grpo")
    loss, gradients = loss_and_gradient(runner, [batch[:3], batch[3:]], metrics)
    expected_loss, expected = loss_and_gradient(runner, [with_weights(examples, "grpo")])
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=1e-12)
    loss, gradients = loss_and_gradient(runner, [[empty]])
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())
