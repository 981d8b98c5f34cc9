"""Scores of packed rows, padded rows and one response at a time are the same, and so are their gradients."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import engine.step.attention
from engine.data.examples import Example
from engine.data.rankings import Comparisons
from engine.settings.schema import LossSettings
from engine.step.heads import run_head
from engine.step.layout import GroupSpan, empty_microbatch, lay_out, num_fed_tokens
from engine.step.metrics import MetricAccumulator
from engine.step.objectives import make_objective
from engine.step.packing_check import use_packed_attention
from engine.step.splitting import split_batch
from reward_losses import reward_loss
from tests.models import SIZES, VOCABULARY, exact_norms, ranking_examples, tiny_reward_model
from utils import UserError

RANKINGS = ["pairs", "plackett_luce"]


def loss_and_gradient(
    model: PreTrainedModel, microbatches: Sequence[Sequence[Example]], layout: str, ranking: Any
) -> tuple[float, dict[str, Tensor]]:
    objective = make_objective(LossSettings(name="reward", keywords={"ranking": ranking, "centering": 0.1}))
    num_examples, total = sum(map(len, microbatches)), 0.0
    for examples in microbatches:
        batch = lay_out(examples, layout, feeds_last_token=True)

        def span_loss(scores: Tensor, span: GroupSpan, batch=batch) -> Tensor:
            inputs = objective.read(scores, batch, span, None)
            return objective.losses(inputs, [], MetricAccumulator()).sum() / num_examples

        loss, _ = run_head(model, batch, span_loss)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def one_response_at_a_time(
    model: PreTrainedModel, examples: Sequence[Example], ranking: Any
) -> tuple[float, dict[str, Tensor]]:
    """The oracle: each prompt + response through the plain forward of transformers' class."""
    losses = []
    for example in examples:
        rows = [torch.tensor([*example.prompt.tolist(), *response.tolist()])[None] for response in example.responses]
        scores = torch.cat([model(row).logits[:, 0] for row in rows])
        assert example.comparisons is not None
        pairs, margins, weights = (torch.from_numpy(array.astype(float)) for array in example.comparisons[:3])
        arguments = (scores[None], pairs.long()[None], margins[None], weights[None])
        losses.append(reward_loss(*arguments, ranking=ranking, centering=0.1)[0])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), gradients(model)


def assert_same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-10)
    assert ours[1].keys() == theirs[1].keys() and "score.weight" in theirs[1]
    for name, gradient in theirs[1].items():
        assert gradient.norm() > 0, name
        assert ((ours[1][name] - gradient).norm() / gradient.norm()).item() < 1e-10, name


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("architecture", list(SIZES))
def test_packed_equals_padded_equals_one_response_at_a_time(
    architecture: str, ranking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact_norms(tiny_reward_model(architecture, torch.float64))
    examples = ranking_examples()
    truth = one_response_at_a_time(model, examples, ranking)
    assert_same(loss_and_gradient(model, [examples], "padded", ranking), truth)
    use_packed_attention(model)
    assert_same(loss_and_gradient(model, [examples], "packed", ranking), truth)
    monkeypatch.setattr(engine.step.attention, "BLOCK", 3)  # several query tiles
    assert_same(loss_and_gradient(model, [examples], "packed", ranking), truth)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pairs_without_an_order_have_the_same_gradient(layout: str) -> None:
    model = exact_norms(tiny_reward_model("llama", torch.float64))
    pairs = np.array([(0, 1), (2, 1), (1, 0), (0, 1)], dtype=np.uint8)
    numbers = np.array([[0.5, 0, 0, 1.5], [1, 2, 3, 0.5]], dtype=np.float32)
    examples = ranking_examples()
    examples[1] = replace(examples[1], comparisons=Comparisons(pairs, *numbers))
    truth = one_response_at_a_time(model, examples, "pairs")
    if layout == "packed":
        use_packed_attention(model)
    for parts in (1, 2, 4):
        split = split_batch(examples, parts, 10**6, layout, feeds_last_token=True)
        assert_same(loss_and_gradient(model, split, layout, "pairs"), truth)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_any_split_gives_the_same_gradient(layout: str) -> None:
    model = exact_norms(tiny_reward_model("llama", torch.float64))
    if layout == "packed":
        use_packed_attention(model)
    examples = ranking_examples() + ranking_examples(seed=5)
    truth = loss_and_gradient(model, [examples], layout, "pairs")
    for parts, budget in [(2, 10**6), (8, 10**6), (10, 10**6), (1, 30), (3, 25), (1, 1)]:
        split = split_batch(examples, parts, budget, layout, feeds_last_token=True)
        assert sum(map(len, split)) == len(examples)
        assert_same(loss_and_gradient(model, split, layout, "pairs"), truth)


@torch.no_grad()
def test_a_score_depends_on_prompt_and_response_alone() -> None:
    model = exact_norms(tiny_reward_model("llama", torch.float64))

    def scores(examples: Sequence[Example], layout: str = "packed") -> Tensor:
        return run_head(model, lay_out(examples, layout, feeds_last_token=True))[1]

    examples = ranking_examples()
    padded = scores(examples, "padded")
    use_packed_attention(model)
    before = scores(examples)
    response = examples[2].responses[1].copy()
    response[-1] = (response[-1] + 7) % VOCABULARY  # its last token is read
    changed = [*examples]
    changed[2] = replace(examples[2], responses=(examples[2].responses[0], response, *examples[2].responses[2:]))
    # Groups are in order of their first example. The last ranking shares a response with the first.
    assert (scores(changed) != before).nonzero().flatten().tolist() == [3 + 3 + 1]
    alone = torch.cat([scores([example]) for example in examples[1:]])
    torch.testing.assert_close(alone[:10], before[3:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(padded, before, rtol=1e-10, atol=1e-10)


def test_the_last_token_is_fed_and_counted() -> None:
    example = ranking_examples()[2]  # prompt of 5, responses of 1, 3, 4 and 2 tokens
    batch = lay_out([example], feeds_last_token=True)
    expected = [*example.prompt, *(token for response in example.responses for token in response)]
    assert batch.input_ids[0].tolist() == expected and batch.num_tokens == 15
    assert num_fed_tokens(example, "packed", feeds_last_token=True) == 15
    assert num_fed_tokens(example) == 11 == lay_out([example]).num_tokens
    assert batch.score_index is not None and batch.position_ids is not None
    assert batch.input_ids[0, batch.score_index].tolist() == [response[-1] for response in example.responses]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7, 5, 6, 7, 8, 5, 6]
    assert lay_out([example]).score_index is None
    padded = lay_out([example], "padded", feeds_last_token=True)
    assert padded.score_index is not None and padded.attention_mask is not None
    assert padded.input_ids.flatten()[padded.score_index].tolist() == [response[-1] for response in example.responses]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("architecture", list(SIZES))
def test_an_empty_microbatch_gives_every_parameter_a_zero_gradient(architecture: str, layout: str) -> None:
    model = tiny_reward_model(architecture)
    if layout == "packed":
        use_packed_attention(model)
    objective = make_objective(LossSettings(name="reward", keywords={"ranking": "pairs", "centering": 0.1}))
    batch, metrics = empty_microbatch(1, layout, feeds_last_token=True), MetricAccumulator()

    def span_loss(scores: Tensor, span: GroupSpan) -> Tensor:
        return objective.losses(objective.read(scores, batch, span, None), [], metrics).sum()

    loss, scores = run_head(model, batch, span_loss)
    loss.backward()
    assert loss.item() == 0 and scores.shape == (0,)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_the_check_of_packed_attention_looks_at_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_reward_model("llama")
    plain = run_head
    calls = []

    def run_wrong(model: PreTrainedModel, batch, span_loss=None):
        loss, scores = plain(model, batch, span_loss)
        calls.append(scores)
        return loss, scores if batch.segments is None else scores * 1.01

    monkeypatch.setattr("engine.step.packing_check.run_head", run_wrong)
    with pytest.raises(UserError, match="scores of LlamaForSequenceClassification change with batching=packed"):
        use_packed_attention(model)
    assert calls
