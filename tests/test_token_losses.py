"""Losses with further numbers of each response: by hand, and the numbers against plain logits."""

import dataclasses
import inspect
import math
import sqlite3
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import engine.models.wide_products
import engine.step.logprobs
from engine.data.examples import Example
from engine.step.first_pass import FirstPass
from engine.step.layout import Microbatch, empty_microbatch, lay_out
from engine.step.logprobs import chunked_head, plain_head
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import MicrobatchRunner
from engine.step.objectives import make_objective
from engine.step.packing_check import use_packed_attention
from engine.step.reference import LiveReference, fill_cache
from engine.step.reference_cache import CachedReference
from engine.step.splitting import split_batch
from engine.step.token_needs import ReferenceHead, TokenNeeds
from losses import LOSSES, dpo_loss, ld_dpo_loss, tdpo1_loss, tdpo2_loss, wpo_loss
from tests.configs import make_settings
from tests.invariants.batches import make_runner
from tests.invariants.test_packing import make_logits_twice
from tests.models import VOCABULARY, exact_norms, pair_examples, random_examples, tiny_model
from tests.runs import Program

NAMES = ["tdpo1", "tdpo2", "wpo", "ld_dpo"]


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def log_loss(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


def slope(margin: float) -> float:
    return -1 / (1 + math.exp(margin))


def assert_values(found: Tensor | None, *expected: float) -> None:
    assert found is not None and found.tolist() == pytest.approx(expected, abs=1e-14)


# ---- The functions by hand ----


# Log-ratios 1 and -2, so D = 3; then 0 and 0.5, so D = -0.5.
def log_probs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fp64(-8, -5), fp64(-12, -6.5), fp64(-9, -5), fp64(-10, -7)


def test_tdpo1_by_hand() -> None:
    logps, chosen_kl, rejected_kl = log_probs(), fp64(0.4, 0.0), fp64(1.4, 0.3)
    losses, chosen, rejected, metrics = tdpo1_loss(*logps, chosen_kl, rejected_kl, beta=0.5)
    # 0.5 * (3 - (1.4 - 0.4)) = 1 and 0.5 * (-0.5 - (0.3 - 0)) = -0.4
    assert_values(losses, log_loss(1.0), log_loss(-0.4))
    losses.sum().backward()
    slopes = [0.5 * slope(1.0), 0.5 * slope(-0.4)]
    for column, sign in ((logps[0], 1), (logps[1], -1), (chosen_kl, 1), (rejected_kl, -1)):
        assert_values(column.grad, *(sign * each for each in slopes))
    assert_values(chosen, 0.5, 0)
    assert_values(rejected, -1, 0.25)
    assert metrics["token_kl/chosen"] is chosen_kl and metrics["token_kl/rejected"] is rejected_kl


def test_tdpo2_by_hand() -> None:
    logps, chosen_kl, rejected_kl = log_probs(), fp64(0.4, 0.0), fp64(1.4, 0.3)
    losses, chosen, rejected, _ = tdpo2_loss(*logps, chosen_kl, rejected_kl, beta=0.5, alpha=0.2)
    # 0.5 * (3 - 0.2 * 1) = 1.4 and 0.5 * (-0.5 - 0.2 * 0.3) = -0.28
    assert_values(losses, log_loss(1.4), log_loss(-0.28))
    losses.sum().backward()
    slopes = [0.5 * slope(1.4), 0.5 * slope(-0.28)]
    for column, factor in ((logps[0], 1), (logps[1], -1), (rejected_kl, -0.2)):
        assert_values(column.grad, *(factor * each for each in slopes))
    assert chosen_kl.grad is None  # stop-gradient
    assert_values(chosen, 0.5, 0)
    assert_values(rejected, -1, 0.25)


def test_tdpo2_without_alpha_is_dpo() -> None:
    logps = log_probs()
    ours, *_ = tdpo2_loss(*logps, fp64(0.4, 0), fp64(1.4, 0.3), beta=0.5, alpha=0)
    assert torch.equal(ours, dpo_loss(*logps, beta=0.5)[0])


def test_wpo_by_hand() -> None:
    logps, chosen_confidence, rejected_confidence = log_probs(), fp64(0.3, -1.0), fp64(0.2, 0.1)
    losses, chosen, rejected, metrics = wpo_loss(*logps, chosen_confidence, rejected_confidence, beta=0.5)
    weights = [math.exp(0.5), math.exp(-0.9)]  # the first is above 1: not clamped
    assert_values(losses, weights[0] * log_loss(1.5), weights[1] * log_loss(-0.25))
    losses.sum().backward()
    slopes = [0.5 * weights[0] * slope(1.5), 0.5 * weights[1] * slope(-0.25)]
    assert_values(logps[0].grad, *slopes)
    assert_values(logps[1].grad, *(-each for each in slopes))
    assert chosen_confidence.grad is None and rejected_confidence.grad is None
    assert_values(chosen, 0.5, 0)
    assert_values(rejected, -1, 0.25)
    assert_values(metrics["weights"], *weights)


def test_ld_dpo_by_hand() -> None:
    logps = log_probs()
    shared = fp64(-6, -5), fp64(-12, -2.5), fp64(-6, -5), fp64(-10, -3)
    losses, chosen, rejected = ld_dpo_loss(*logps, *shared, beta=0.5, alpha=0.25)
    # Log-ratios: shared 0 + 0.25 * 1 of the rest, and -2 + 0; then 0 + 0, and 0.5 + 0.25 * 0.
    assert_values(losses, log_loss(0.5 * 2.25), log_loss(-0.25))
    losses.sum().backward()
    slopes = [0.5 * slope(0.5 * 2.25), 0.5 * slope(-0.25)]
    for column, factor in ((logps[0], 0.25), (logps[1], -0.25), (shared[0], 0.75), (shared[1], -0.75)):
        assert_values(column.grad, *(factor * each for each in slopes))
    assert_values(chosen, 0.125, 0)
    assert_values(rejected, -1, 0.25)


def test_ld_dpo_with_alpha_1_is_dpo() -> None:
    logps = log_probs()
    same = fp64(-1, -1)
    ours, *_ = ld_dpo_loss(*logps, same, same, same, same, beta=0.5, alpha=1)
    assert torch.equal(ours, dpo_loss(*logps, beta=0.5)[0])


FUNCTIONS: dict[Callable, int] = {tdpo1_loss: 2, tdpo2_loss: 2, wpo_loss: 2, ld_dpo_loss: 4}  # and further columns


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_have_finite_values_and_gradients(function: Callable, dtype: torch.dtype) -> None:
    extremes = [0.0, -1e4]
    keywords = {"alpha": 0.5} if "alpha" in inspect.signature(function).parameters else {}
    for chosen_value in extremes:
        for rejected_value in extremes:
            logps = [torch.full((2,), value, dtype=dtype) for value in (chosen_value, rejected_value, -1e4, 0)]
            columns = [torch.zeros(2, dtype=dtype) for _ in range(FUNCTIONS[function])]
            for leaf in (*logps, *columns):
                leaf.requires_grad_()
            losses, *_ = function(*logps, *columns, beta=0.1, **keywords)
            gradients = torch.autograd.grad(losses.sum(), [*logps, *columns], materialize_grads=True)
            assert losses.isfinite().all() and all(each.isfinite().all() for each in gradients)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_equal_responses_have_loss_ln_2(function: Callable) -> None:
    """Whatever the column, as long as it is the same of both. The weight of wpo is e^0 here."""
    keywords = {"alpha": 0.5} if "alpha" in inspect.signature(function).parameters else {}
    columns = [fp64(0.0)] * 2 if function is wpo_loss else [fp64(-3.0)] * FUNCTIONS[function]
    losses, *_ = function(*[fp64(-7.0)] * 4, *columns, beta=0.1, **keywords)
    assert losses.tolist() == [math.log(2)]


# ---- The columns ----


def head_leaves(batch: Microbatch, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias of a head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch.input_ids.numel(), 16), (VOCABULARY, 16), (VOCABULARY,)
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def any_loss(token_logps: Tensor, span: object, **columns: Tensor) -> Tensor:
    """A scalar that depends on every token and column, and on log-prob and KL in opposite directions."""
    total = token_logps.sin().sum()
    if "kl" in columns:
        total = total - 2 * columns["kl"].sqrt().sum() + (columns["reference"] * token_logps).sum()
    if "confidence" in columns:
        total = total + (columns["confidence"] * token_logps).sum()
    return total


def needs_of(batch: Microbatch, confidence: bool, kl: bool) -> TokenNeeds:
    hidden, weight, bias = (leaf.detach() for leaf in head_leaves(batch, seed=1))
    return TokenNeeds(confidence, ReferenceHead(hidden[batch.predict_index], weight, bias) if kl else None)


@pytest.mark.parametrize("chunks", ["one", "several", "groups in several"])
@pytest.mark.parametrize("confidence, kl", [(True, False), (False, True), (True, True)])
def test_columns_of_the_chunked_head_equal_autograd(
    confidence: bool, kl: bool, chunks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = lay_out(pair_examples())
    needs = needs_of(batch, confidence, kl)
    if chunks == "several":
        monkeypatch.setattr(engine.step.logprobs, "CHUNK_TOKENS", 9)
        monkeypatch.setattr(engine.step.logprobs, "CHUNK_LOGITS", {"cpu": 1})
    if chunks == "groups in several":
        make_logits_twice(monkeypatch)

    def run(head: Callable) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        leaves = head_leaves(batch, seed=0)
        loss, logps = head(*leaves, batch, any_loss, needs=needs)
        return loss, logps, torch.autograd.grad(loss, leaves)

    (loss, logps, gradients), (plain_loss, plain_logps, plain_gradients) = run(chunked_head), run(plain_head)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-12)
    for ours, plain in zip((logps, *gradients), (plain_logps, *plain_gradients), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def test_columns_by_hand() -> None:
    """One target, three tokens: policy 1/2, 1/4, 1/4, reference 1/4, 1/2, 1/4."""
    batch = lay_out([Example(np.array([1], np.int32), (np.array([1], np.int32),), 0)])
    hidden = torch.ones(1, 1, dtype=torch.float64)
    policy, other = (torch.tensor(probs, dtype=torch.float64).log()[:, None] for probs in ([2, 1, 1], [1, 2, 1]))
    seen = {}

    def span_loss(token_logps: Tensor, span: object, **columns: Tensor) -> Tensor:
        seen.update(columns)
        return token_logps.new_zeros(())

    with torch.no_grad():
        chunked_head(hidden, policy, None, batch, span_loss, needs=TokenNeeds(True, ReferenceHead(hidden, other, None)))
    assert_values(seen["reference"], math.log(1 / 2))
    assert_values(seen["kl"].detach(), 1 / 4 * math.log(1 / 2) + 1 / 2 * math.log(2))
    assert_values(seen["confidence"], math.log(1 / 4) - math.log(1 / 4 + 1 / 16 + 1 / 16))


def test_the_kl_of_close_models_is_accurate_in_fp32() -> None:
    """Its first-order terms cancel. The rounding errors of two normalizers would outweigh the rest."""
    batch, generator = lay_out(pair_examples()), torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.input_ids.numel(), 16, generator=generator, dtype=torch.float64)
    weight, change = torch.randn(2, 20_000, 16, generator=generator, dtype=torch.float64).unbind()
    found: dict[torch.dtype, Tensor] = {}

    def span_loss(token_logps: Tensor, span: object, **columns: Tensor) -> Tensor:
        found[token_logps.dtype] = columns["kl"].detach().double()
        return token_logps.new_zeros(())

    for dtype in (torch.float32, torch.float64):
        close = (weight + 3e-4 * change).to(dtype)
        needs = TokenNeeds(reference=ReferenceHead(hidden[batch.predict_index].to(dtype), close, None))
        with torch.no_grad():
            chunked_head(hidden.to(dtype), weight.to(dtype), None, batch, span_loss, needs=needs)
    errors = (found[torch.float32] - found[torch.float64]).abs()
    assert errors.mean() < 3e-8 and 3e-7 < found[torch.float64].mean() < 1e-6


def test_rows_of_a_gpu_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the heads have rows of zeros, whose logits are -inf."""
    batch = lay_out(pair_examples())
    needs = needs_of(batch, True, True)
    results = []
    for is_padded in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(engine.models.wide_products, "has_wide_products", lambda device, padded=is_padded: padded)
            leaves = head_leaves(batch, seed=0)
            loss, logps = chunked_head(*leaves, batch, any_loss, needs=needs)
            results.append((loss, logps, *torch.autograd.grad(loss, leaves)))
    for padded, plain in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)


def test_small_gradients_survive_fp16() -> None:
    """A large batch divides the loss by its size. Products with probabilities would vanish."""
    batch = lay_out(pair_examples())
    other, other_weight, _ = (leaf.detach() for leaf in head_leaves(batch, 1, torch.float16))
    needs = TokenNeeds(reference=ReferenceHead(other[batch.predict_index], other_weight, None))

    def gradient(size: int) -> Tensor:
        hidden, weight, _ = head_leaves(batch, 0, torch.float16)
        master = weight.detach().float().requires_grad_()

        def span_loss(*args: Any, **columns: Tensor) -> Tensor:
            return any_loss(*args, **columns) / size

        loss, _ = chunked_head(hidden, master, None, batch, span_loss, needs=needs)
        return size * torch.autograd.grad(loss, master)[0]

    gradients = [gradient(1), gradient(2**16)]
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.01


# ---- The objective, across layouts ----


def runner_of(name: str, layout: str, policy: PreTrainedModel, reference: PreTrainedModel) -> MicrobatchRunner:
    objective = make_objective(make_settings(f"loss={name}").loss)
    runner = make_runner(policy, objective, layout)
    runner.reference = LiveReference(reference)
    return runner


def models(layout: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A policy, and a reference that differs."""
    policy, reference = (exact_norms(tiny_model("llama", torch.float64)) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if layout == "packed":
        use_packed_attention(policy)
        use_packed_attention(reference)
    return policy, reference.requires_grad_(False)


def loss_and_gradient(
    runner: MicrobatchRunner, microbatches: Sequence[Sequence[Example]]
) -> tuple[float, dict[str, float], Tensor]:
    num_examples = sum(map(len, microbatches))
    metrics, total = MetricAccumulator(), 0.0
    for examples in microbatches:
        loss = runner.loss(runner.prepare(examples), num_examples, FirstPass([], {}), metrics)
        loss.backward()
        total += loss.item()
    gradient = torch.cat([each.grad.flatten() for each in runner.policy.parameters() if each.grad is not None])
    runner.policy.zero_grad()
    means = {name: value.item() for name, value in metrics.reduce(lambda totals: None).means.items()}
    return total, means, gradient


def one_row_at_a_time(
    name: str, policy: PreTrainedModel, reference: PreTrainedModel, examples: Sequence[Example]
) -> tuple[float, Tensor]:
    """The oracle: plain forward passes, and the formulas of the losses."""
    losses = []
    for example in examples:
        shorter = min(map(len, example.responses))
        ratios, kls, confidences = [], [], []
        for response in example.responses:
            tokens = torch.tensor([*example.prompt.tolist(), *response.tolist()])[None]
            positions = slice(len(example.prompt) - 1, tokens.shape[1] - 1)
            ours, theirs = (model(tokens).logits[0, positions].log_softmax(-1) for model in (policy, reference))
            chosen = tokens[0, len(example.prompt) :, None]
            log_ratios = (ours - theirs).gather(1, chosen)[:, 0]
            factors = torch.full_like(log_ratios, 0.5 if name == "ld_dpo" else 1.0)
            factors[:shorter] = 1
            ratios.append((factors * log_ratios).sum())
            kls.append((theirs.exp() * (theirs - ours)).sum())
            confidences.append((ours.gather(1, chosen)[:, 0] - ours.exp().square().sum(-1).log()).mean().detach())
        margin, weight = ratios[0] - ratios[1], 1.0
        if name == "tdpo1":
            margin = margin - (kls[1] - kls[0])
        if name == "tdpo2":
            margin = margin - 0.5 * (kls[1] - kls[0].detach())
        if name == "wpo":
            weight = sum(confidences).exp()
        losses.append(-weight * torch.nn.functional.logsigmoid(0.1 * margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = torch.cat([each.grad.flatten() for each in policy.parameters() if each.grad is not None])
    policy.zero_grad()
    return loss.item(), gradient


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded_equals_one_row_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = pair_examples() + pair_examples(seed=5)
    truth, true_gradient = one_row_at_a_time(name, *models("padded"), examples)

    def check(layout: str, microbatches: Sequence[Sequence[Example]]) -> None:
        policy, reference = models(layout)
        loss, _, gradient = loss_and_gradient(runner_of(name, layout, policy, reference), microbatches)
        assert loss == pytest.approx(truth, rel=1e-10)
        assert ((gradient - true_gradient).norm() / true_gradient.norm()).item() < 1e-10

    for layout in ("padded", "packed"):
        check(layout, [examples])
        for parts, budget in ((3, 10**6), (1, 30), (10, 10**6)):
            check(layout, split_batch(examples, parts, budget, layout))
    make_logits_twice(monkeypatch)
    check("packed", [examples])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_examples_has_no_loss(name: str, layout: str) -> None:
    runner = runner_of(name, layout, *models(layout))
    loss = runner.loss(runner.prepare([]), 4, FirstPass([], {}), MetricAccumulator())
    loss.backward()
    assert loss.item() == 0
    assert all(each.grad is not None and not each.grad.any() for each in runner.policy.parameters())


def test_the_token_kl_of_equal_models_is_exactly_0(program: Program) -> None:
    """And the loss ln 2. The gradient of the KL is 0 there, so the first update is that of DPO."""
    dpo = program.ok("loss=dpo", "loss.beta=0.1", "n_examples=4", "reference=live")
    for overrides in (("loss=tdpo1",), ("loss=tdpo2",), ("loss=tdpo2", "batching=padded"), ("loss=tdpo2", "peft=lora")):
        run = program.ok(*overrides, "n_examples=4")
        for row, split in ((run.steps[0], "train"), (run.evals[0], "eval")):
            assert row[f"token_kl_{split}/chosen"] == row[f"token_kl_{split}/rejected"] == 0
            assert row[f"rewards_{split}/margins"] == 0
            assert row[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-7)
        if "peft=lora" not in overrides:
            assert run.steps[0]["grad_norm"] == pytest.approx(dpo.steps[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("policy, reference", [("float32", "bfloat16"), ("float32", "float64"), ("float64", "float32")])
def test_a_reference_of_another_dtype(program: Program, policy: str, reference: str, batching: str) -> None:
    """In fp64, a model from scratch has other weights."""
    dtypes = (f"model.policy_dtype={policy}", f"model.reference_dtype={reference}")
    run = program.ok("loss=tdpo2", *dtypes, f"batching={batching}", "n_examples=4")
    assert 0 < run.steps[0]["token_kl_train/rejected"] < (1e-2 if reference == "bfloat16" else 10)


def test_step_0_of_wpo_is_weighted(program: Program) -> None:
    run = program.ok("loss=wpo", "n_examples=4")
    row = run.steps[0]
    assert row["rewards_train/margins"] == 0
    assert row["loss/train"] == pytest.approx(math.log(2) * row["weights/train"], rel=1e-6)
    assert 0 < row["weights/train"] != 1


@pytest.mark.parametrize("name", ["tdpo2", "wpo", "ld_dpo"])
def test_columns_of_the_whole_batch(program: Program, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A first pass over the batch gives every column its gradient. The result is the same."""
    common = (f"loss={name}", "model.policy_dtype=float64", "gradient_accumulation_steps=2", "n_examples=8")
    plain, loss = program.ok(*common), LOSSES[name]
    monkeypatch.setitem(LOSSES, name, dataclasses.replace(loss, needs={*loss.needs, "whole batch"}))
    for row, other in zip(program.ok(*common).steps, plain.steps, strict=True):
        for key in ("loss/train", "grad_norm", "rewards_train/margins"):
            assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-12)


def test_shared_tokens_of_each_pair() -> None:
    batch = lay_out(pair_examples(), with_shared=True)
    assert batch.shared_index is not None and batch.shared_lengths is not None and batch.rejected is not None
    first_targets = [0, *batch.response_lengths.cumsum(0).tolist()]
    expected = []
    for chosen, rejected in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True):
        shorter = int(batch.response_lengths[[chosen, rejected]].min())
        expected.append([first_targets[each] + index for each in (chosen, rejected) for index in range(shorter)])
    offsets = batch.shared_offsets
    assert [batch.shared_index[a:b].tolist() for a, b in pairwise(offsets)] == expected
    assert batch.shared_lengths.tolist() == [len(each) // 2 for each in expected for _ in range(2)]
    assert lay_out(pair_examples()).shared_index is None


# ---- The reference ----


def test_a_cached_reference_is_refused(program: Program) -> None:
    run = program("loss=tdpo2", "reference=cached")
    assert run.status == 2 and "reference: cached keeps log-probs of responses, and loss=tdpo2 compares" in run.err


def test_auto_is_a_live_reference(program: Program) -> None:
    cache = program.directory / "own"
    auto, live = (program.ok("loss=tdpo2", f"reference={kind}", f"cache_dir={cache}") for kind in ("auto", "live"))
    assert not (cache / "reference").exists()
    assert [row["loss/train"] for row in auto.steps] == [row["loss/train"] for row in live.steps]
    assert make_settings("loss=tdpo2").has_live_reference and not make_settings("loss=wpo").has_live_reference


def test_the_package_compares_too(program: Program) -> None:
    common = ("loss=tdpo2", "model.policy_dtype=float64", "n_examples=8")
    package = ("trainer=TensorParallelTrainer", "tensor_parallel.backend=package", "tensor_parallel_size=2")
    for row, other in zip(program.ok(*common, *package).steps, program.ok(*common).steps, strict=True):
        for key in ("loss/train", "grad_norm", "token_kl_train/rejected"):
            assert row[key] == pytest.approx(other[key], rel=1e-5)


def test_the_kl_of_samples_may_choose_the_best_checkpoint(program: Program) -> None:
    run = program.ok(
        "loss=tdpo2", "keep_best=kl_eval", "sample_during_eval=true", "max_length=280", "n_eval_model_samples=2"
    )
    assert run.evals[-1]["kl_eval"] >= 0


@pytest.mark.slow
def test_a_plan_counts_the_live_reference(program: Program) -> None:
    of_auto, of_live, of_dpo = (
        [line for line in program.ok(*overrides, "plan=true").out.splitlines() if line.startswith("  reference")]
        for overrides in (("loss=tdpo2",), ("loss=tdpo2", "reference=live"), ("loss=dpo", "loss.beta=0.1"))
    )
    assert of_auto == of_live and "not in memory" not in of_auto[0] and "not in memory" in of_dpo[0]


# ---- The cache by token ----


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = tiny_model("llama")
    use_packed_attention(model)
    return model


def filled(path: Path, model: PreTrainedModel, examples: Sequence[Example], by_token: bool) -> CachedReference:
    cache = CachedReference(path, by_token=by_token)
    fill_cache(cache, LiveReference(model), [[[*examples]]], lay_out, data_rank=0, num_data_ranks=1)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_read_by_the_next_process(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    use_packed_attention(model)
    batch, live = lay_out(pair_examples()), LiveReference(model)
    filled(tmp_path / "key.sqlite", model, pair_examples(), by_token=True)
    again = CachedReference(tmp_path / "key.sqlite", by_token=True)
    assert not again.missing(batch.responses)
    assert torch.equal(again.token_logps(batch), live.token_logps(batch))
    assert torch.equal(again.logps(batch), live.logps(batch))
    assert again.token_logps(empty_microbatch(2)).shape == (0,)


def test_a_fill_by_token_serves_other_losses_too(tmp_path: Path, model: PreTrainedModel) -> None:
    batch = lay_out(pair_examples())
    filled(tmp_path / "key.sqlite", model, pair_examples(), by_token=True)
    sums = CachedReference(tmp_path / "key.sqlite")
    assert not sums.missing(batch.responses)
    assert torch.equal(sums.logps(batch).float(), LiveReference(model).logps(batch))


def test_a_cache_of_sums_is_filled_with_tokens(tmp_path: Path, model: PreTrainedModel) -> None:
    """Also one written before there were tokens."""
    path, batch = tmp_path / "key.sqlite", lay_out(pair_examples())
    filled(path, model, pair_examples(), by_token=False)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE token_logps")
        before = connection.execute("SELECT * FROM logps").fetchall()
    assert CachedReference(path, by_token=True).missing(batch.responses)
    cache = filled(path, model, pair_examples(), by_token=True)
    assert torch.equal(cache.token_logps(batch), LiveReference(model).token_logps(batch))
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT * FROM logps").fetchall() == before


def test_a_flipped_bit_of_tokens_is_found_and_repaired(
    tmp_path: Path, model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    path, batch = tmp_path / "key.sqlite", lay_out(pair_examples())
    filled(path, model, pair_examples(), by_token=True)
    with sqlite3.connect(path) as connection:
        response, tokens = connection.execute("SELECT response, logp FROM token_logps LIMIT 1").fetchone()
    content = bytearray(path.read_bytes())
    content[content.index(tokens) + 2] ^= 16
    path.write_bytes(content)
    assert CachedReference(path, by_token=True).missing(batch.responses) == {response}
    assert "1 log-probs" in capsys.readouterr().out
    assert not CachedReference(path).missing(batch.responses)  # the sums are whole
    cache = filled(path, model, pair_examples(), by_token=True)
    assert torch.equal(cache.token_logps(batch), LiveReference(model).token_logps(batch))


def test_tokens_do_not_depend_on_the_batch(tmp_path: Path, model: PreTrainedModel) -> None:
    examples = random_examples([(4, 3, 6), (9, 2, 2), (5, 7, 1)])
    cache = filled(tmp_path / "key.sqlite", model, examples, by_token=True)
    for order in (examples[::-1], examples[1:2]):
        batch = lay_out(order)
        torch.testing.assert_close(
            cache.token_logps(batch), LiveReference(model).token_logps(batch), rtol=1e-5, atol=1e-5
        )
