"""Packed, padded and one row at a time give the same log-probs, losses and gradients on every model."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import engine.step.attention
import engine.step.logprobs
from engine.data.examples import Example
from engine.step.heads import response_logps, run_head
from engine.step.layout import GroupSpan, Microbatch, empty_microbatch, lay_out
from engine.step.logprobs import SpanLoss, chunked_head, plain_head, sum_by_response
from engine.step.packing_check import use_packed_attention
from engine.step.splitting import split_batch
from tests.models import SIZES, VOCABULARY, exact_norms, pair_examples, tiny_model

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ARCHITECTURES = list(SIZES)
DTYPES = [torch.float64, torch.float32]


def pair_loss(batch: Microbatch, num_examples: int) -> SpanLoss:
    def span_loss(token_logps: Tensor, span: GroupSpan) -> Tensor:
        assert batch.rejected is not None
        logps = sum_by_response(token_logps, batch.response_lengths[span.responses])
        chosen = logps[batch.chosen[span.examples] - span.responses.start]
        rejected = logps[batch.rejected[span.examples] - span.responses.start]
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum() / num_examples

    return span_loss


def gradient(model: PreTrainedModel) -> Tensor:
    gradients = [parameter.grad.flatten().clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return torch.cat(gradients)


def loss_and_gradient(
    model: PreTrainedModel, microbatches: Sequence[Sequence[Example]], layout: str = "packed"
) -> tuple[float, Tensor]:
    num_examples = sum(map(len, microbatches))
    total = 0.0
    for examples in microbatches:
        batch = lay_out(examples, layout)
        loss, _ = run_head(model, batch, pair_loss(batch, num_examples))
        loss.backward()
        total += loss.item()
    return total, gradient(model)


def one_row_at_a_time(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[float, Tensor]:
    """The oracle: each prompt + response through the plain forward of the model."""
    losses = []
    for example in examples:
        logps = []
        for response in example.responses:
            tokens = torch.tensor([*example.prompt.tolist(), *response.tolist()])[None]
            log_softmax = model(tokens).logits.log_softmax(-1)[0]
            start = len(example.prompt)
            logps.append(log_softmax[range(start - 1, tokens.shape[1] - 1), tokens[0, start:]].sum())
        losses.append(-F.logsigmoid(0.1 * (logps[0] - logps[1])))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), gradient(model)


def make_logits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make logits of two tokens at a time, fewer than in nearly every group."""
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_TOKENS", 2)
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_LOGITS", {"cpu": 1})


def assert_same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor], dtype: torch.dtype) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE[dtype])
    assert ((ours[1] - theirs[1]).norm() / theirs[1].norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_padded_equals_one_row_at_a_time(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact_norms(tiny_model(architecture, dtype))
    examples = pair_examples()
    truth = one_row_at_a_time(model, examples)
    assert_same(loss_and_gradient(model, [examples], "padded"), truth, dtype)
    use_packed_attention(model)
    assert_same(loss_and_gradient(model, [examples]), truth, dtype)
    monkeypatch.setattr(engine.step.attention, "BLOCK", 3)  # several query tiles
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_TOKENS", 8)  # several chunks
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_LOGITS", {"cpu": 9 * VOCABULARY})
    assert_same(loss_and_gradient(model, [examples]), truth, dtype)
    make_logits_twice(monkeypatch)
    assert_same(loss_and_gradient(model, [examples]), truth, dtype)
    model.set_attn_implementation("packed_dense")
    assert_same(loss_and_gradient(model, [examples]), truth, dtype)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_any_split_gives_the_same_gradient(layout: str) -> None:
    model = exact_norms(tiny_model("llama", torch.float64))
    if layout == "packed":
        use_packed_attention(model)
    examples = pair_examples() + pair_examples(seed=5)
    truth = loss_and_gradient(model, [examples], layout)
    for parts, budget in [(2, 10**6), (8, 10**6), (10, 10**6), (1, 30), (3, 25), (1, 1)]:
        assert_same(loss_and_gradient(model, split_batch(examples, parts, budget), layout), truth, torch.float64)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_siblings_and_other_groups_are_never_attended(architecture: str) -> None:
    """Changing one response changes no log-prob but its own."""
    model = tiny_model(architecture, torch.float64)
    use_packed_attention(model)
    examples = pair_examples()
    with torch.no_grad():
        before = response_logps(model, lay_out(examples))
        chosen, rejected = examples[2].responses
        examples[2] = Example(examples[2].prompt, (chosen, (rejected + 7) % VOCABULARY), 2)
        batch = lay_out(examples)
        after = response_logps(model, batch)
    assert batch.rejected is not None
    changed = (before != after).nonzero().flatten().tolist()
    # Groups are ordered by their first example; the last pair joins the group of its prompt.
    assert changed == [batch.rejected.tolist()[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_chunked_head_equals_the_plain_head(
    dtype: torch.dtype, bias: bool, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of the fused head against plain fp32 log-softmax; log-probs are never rounded to bf16."""
    batch = lay_out(pair_examples())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.num_tokens, 32, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, 32, generator=generator).to(dtype)
    offset = torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_TOKENS", 9)
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_LOGITS", {"cpu": 1})
    if twice:
        make_logits_twice(monkeypatch)

    def run(head) -> tuple[float, Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, offset) if tensor is not None]
        arguments = leaves if bias else [*leaves, None]
        loss, logps = head(*arguments, batch, pair_loss(batch, 5))
        loss.backward()
        return loss.item(), logps, [leaf.grad for leaf in leaves if leaf.grad is not None]

    loss, logps, gradients = run(chunked_head)
    plain_loss, plain_logps, plain_gradients = run(plain_head)
    assert logps.dtype == torch.float32
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    torch.testing.assert_close(logps, plain_logps, rtol=1e-6, atol=1e-5)
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6) if dtype == torch.float32 else None
        assert ((ours - plain).float().norm() / plain.float().norm()).item() < (
            1e-6 if dtype == torch.float32 else 0.01
        )


def head_leaves(batch: Microbatch, hidden_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, and weight and bias of a head in fp32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator) for shape in [(batch.num_tokens, 32), (VOCABULARY, 32), (VOCABULARY,)]
    )
    return hidden.to(hidden_dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def test_gradients_scale_with_the_loss() -> None:
    """The head computes its gradients before the scale of its loss is known."""
    batch = lay_out(pair_examples())
    gradients = []
    for head in (chunked_head, plain_head):
        leaves = head_leaves(batch)
        loss, _ = head(*leaves, batch, pair_loss(batch, 5))
        gradients.append(torch.autograd.grad(3 * loss, leaves))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("with_loss", [False, True])
def test_chunks_cover_all_targets_without_gradients(
    with_loss: bool, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation has a loss and no gradient. The reference has neither."""
    batch = lay_out(pair_examples())
    leaves = head_leaves(batch)
    plain_loss, plain_logps = plain_head(*leaves, batch, pair_loss(batch, 5))
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_TOKENS", 9)
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_LOGITS", {"cpu": 1})
    if twice:
        make_logits_twice(monkeypatch)
    with torch.no_grad():
        loss, logps = chunked_head(*leaves, batch, pair_loss(batch, 5) if with_loss else None)
    torch.testing.assert_close(logps, plain_logps, rtol=1e-6, atol=1e-5)
    assert loss.item() == pytest.approx(plain_loss.item() if with_loss else 0, rel=1e-6)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1)])
def test_frozen_tensors_get_no_gradient(frozen: tuple[int, ...]) -> None:
    """The others get theirs."""
    batch = lay_out(pair_examples())
    gradients = []
    for head in (chunked_head, plain_head):
        hidden, weight, bias = leaves = head_leaves(batch)
        for index in frozen:
            leaves[index].requires_grad_(False)
        head(hidden, weight, bias, batch, pair_loss(batch, 5))[0].backward()
        gradients.append([leaf.grad for leaf in leaves])
    for index, (ours, plain) in enumerate(zip(*gradients, strict=True)):
        assert (ours is None) == (plain is None) == (index in frozen)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("takes_low", [False, True])
def test_bf16_hidden_states_meet_unrounded_weights_or_their_copy(
    takes_low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed precision on a CPU: the head's products take its copy only where there are matrix units. Sums are fp32."""
    monkeypatch.setattr(engine.step.logprobs, "takes_low_weight", lambda device, dtype: takes_low)
    batch = lay_out(pair_examples())
    hidden, weight, bias = head_leaves(batch, torch.bfloat16)
    truth = weight.detach().bfloat16().float() if takes_low else weight
    loss = pair_loss(batch, 5)
    _, ours = chunked_head(hidden, weight, bias, batch, loss)
    _, plain = plain_head(hidden, truth, bias, batch, loss)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_responses", [1, 2])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_empty_microbatch_gives_every_parameter_a_zero_gradient(
    architecture: str, layout: str, num_responses: int
) -> None:
    """An idle rank takes part in all-reduces."""
    model = tiny_model(architecture)
    if layout == "packed":
        use_packed_attention(model)
    batch = empty_microbatch(num_responses, layout)
    calls = []

    def span_loss(token_logps: Tensor, span: GroupSpan) -> Tensor:
        roles = [
            role[span.examples] - span.responses.start for role in (batch.chosen, batch.rejected) if role is not None
        ]
        logps = sum_by_response(token_logps, batch.response_lengths[span.responses])
        calls.append([len(logps), *map(len, roles)])
        return sum((logps[role].exp().sum() for role in roles), logps.new_zeros(())) / 5

    loss, logps = run_head(model, batch, span_loss)
    loss.backward()
    assert calls == [[0] * (1 + num_responses)]
    assert loss.item() == 0 and logps.shape == (0,) and batch.num_examples == batch.num_tokens == 0
    for parameter in model.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
