"""Values of a critic, and the entropy of a policy: packed rows, padded rows and one response at a time agree."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example, PromptRow, Rollout
from engine.settings.schema import LossSettings
from engine.step.first_pass import FirstPass
from engine.step.layout import in_group_order, lay_out
from engine.step.logprobs import chunked_head, plain_head
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import MicrobatchRunner, Prepared
from engine.step.packing_check import use_packed_attention
from engine.step.splitting import split_batch
from engine.step.token_needs import TokenNeeds
from engine.step.value_objective import ValueObjective
from online_losses import value_loss
from tests.invariants.batches import make_runner
from tests.models import SIZES, exact_norms, random_examples, tiny_reward_model

CLIP = 0.2


def examples_with_returns() -> list[Example]:
    """Groups of several sizes; one response is there twice. Every token has a weight, an old value and a return."""
    generator, found = np.random.default_rng(0), []
    for example in random_examples([(9, 4, 7, 2), (1, 6), (5, 1, 3, 1)]):
        responses = (*example.responses, example.responses[0])

        def of_tokens(responses=responses) -> tuple[np.ndarray, ...]:
            return tuple(generator.normal(size=len(response)) for response in responses)

        rollout = Rollout(of_tokens(), of_tokens(), None, of_tokens(), of_tokens(), of_tokens())
        found.append(replace(example, responses=responses, row=PromptRow("", {}), rollout=rollout))
    return found


def critic(architecture: str, layout: str) -> MicrobatchRunner:
    model = exact_norms(tiny_reward_model(architecture, torch.float64))
    if layout == "packed":
        use_packed_attention(model)
    objective = ValueObjective(LossSettings(name="ppo", keywords={"value_clip": CLIP}))
    return make_runner(model, objective, layout)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def oracle(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[list[Tensor], float, dict[str, Tensor]]:
    """One response at a time: the value of each token is read at the position before it."""
    found, total = [], torch.zeros((), dtype=torch.float64)
    for example in examples:
        rollout = example.rollout
        assert rollout is not None and rollout.values is not None and rollout.returns is not None
        for number, response in enumerate(example.responses):
            tokens = torch.tensor([*example.prompt.tolist(), *response.tolist()])
            hidden = model.base_model(tokens[None]).last_hidden_state[0]
            values = model.score(hidden)[len(example.prompt) - 1 : -1, 0]
            columns = (rollout.values[number], rollout.returns[number], rollout.weights[number])
            old, returns, weights = map(torch.from_numpy, columns)
            total = total + (value_loss(values, old, returns, value_clip=CLIP) * weights).sum() / len(examples)
            found.append(values.detach())
    total.backward()
    return found, total.item(), gradients(model)


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_values_and_gradients_are_those_of_one_response_at_a_time(architecture, layout):
    examples = in_group_order(examples_with_returns())
    expected_values, expected_loss, expected = oracle(critic(architecture, "padded").policy, examples)
    for parts in ([examples], split_batch(examples, 3, 1000, layout)):
        runner, metrics, total = critic(architecture, layout), MetricAccumulator(), 0.0
        of_examples = {
            id(example): values
            for part in parts
            for example, (values, _) in zip(in_group_order(part), runner.sample_logps(part), strict=True)
        }
        found = [value for example in examples for value in of_examples[id(example)]]
        for value, wanted in zip(found, expected_values, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-10)
        for part in parts:
            loss = runner.loss(Prepared(runner.lay_out(part), None), len(examples), FirstPass([], {}), metrics)
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(expected_loss, abs=1e-10)
        for name, gradient in gradients(runner.policy).items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10)
        assert gradient.norm() > 0


def test_a_critic_feeds_no_last_token():
    """So it runs the very microbatches of the policy."""
    runner, (first, *_) = critic("llama", "packed"), examples_with_returns()
    batch = runner.lay_out([first])
    assert batch.score_index is None
    assert batch.num_tokens == lay_out([first]).num_tokens


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("limit", [4, 100])
def test_entropies_and_their_gradient(bias, limit, monkeypatch):
    """Chunks equal autograd through the whole softmax; also where a group is longer than a chunk."""
    monkeypatch.setattr("engine.step.logprobs.CHUNK_TOKENS", limit)
    monkeypatch.setattr("engine.step.logprobs.CHUNK_LOGITS", {"cpu": 1})
    batch = lay_out(random_examples([(9, 4, 7, 2), (3, 6)]))
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch.num_tokens, 8), (23, 8), (23,))
    hidden, weight, offsets = (torch.randn(size, generator=generator).double().requires_grad_() for size in sizes)
    batch.targets = batch.targets % 23
    factors, others = torch.randn(2, len(batch.targets), generator=generator).double()

    def loss(logps, span, entropy):
        return (factors[span.targets] * logps).sum() + (others[span.targets] * entropy).sum()

    results = []
    for head in (plain_head, chunked_head):
        found, logps = head(
            hidden, weight, offsets if bias else None, batch, span_loss=loss, needs=TokenNeeds(entropy=True)
        )
        inputs = [hidden, weight, *([offsets] if bias else [])]
        results.append([found.detach(), logps, *torch.autograd.grad(found, inputs)])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
