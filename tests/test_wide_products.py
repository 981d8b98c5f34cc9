"""Products of low dtype with fp32 sums, of CPUs and by stand-ins for a GPU's, and the head with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.models.precision
import engine.models.wide_products
import engine.step.logprobs
from engine.models.precision import HEAD, low_weight, run_in_dtype
from engine.models.rounding import Thresholds, round_by, weight_thresholds
from engine.models.wide_products import add_product, copy_for_products, wide_product
from engine.step.heads import response_logps, run_head
from engine.step.layout import lay_out
from engine.step.logprobs import chunk_logits, chunked_head, plain_head, scatter_selected, sum_by_response
from tests.models import VOCABULARY, pair_examples, random_examples, tiny_model

LOW, WIDE = torch.bfloat16, torch.float32


def wide_mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """torch.mm, and on a CPU its out_dtype."""
    wide = (left, right) if out_dtype is None else (left.to(out_dtype), right.to(out_dtype))
    product = wide[0] @ wide[1]
    return product if out is None else out.copy_(product)


def wide_addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    assert out is total and total.dtype == out_dtype
    return out.copy_(torch.addmm(total, left.to(out_dtype), right.to(out_dtype)))


def addmm_of_one_dtype(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """As in older versions of torch."""
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


@pytest.fixture(params=[wide_addmm, addmm_of_one_dtype])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if the CPU had wide products."""
    engine.models.wide_products._can_add_in_place.cache_clear()
    monkeypatch.setattr(torch, "addmm", request.param)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(engine.models.wide_products, "has_wide_products", lambda device: True)
    request.addfinalizer(engine.models.wide_products._can_add_in_place.cache_clear)


def low_factors(num_chunks: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(40, 24, generator=generator).to(LOW), torch.randn(24, 16, generator=generator).to(LOW))
        for _ in range(num_chunks)
    ]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def sum_of_products(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    total = None
    for left, right in factors:
        total = add_product(total, left, right, WIDE)
    assert total is not None and total.dtype == WIDE
    return total


def test_wide_products_are_not_rounded(wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.models.wide_products, "BLOCK", 16)  # of 40 rows
    factors = low_factors(8)
    exact = torch.stack([left.double() @ right.double() for left, right in factors]).sum(0)
    assert relative_error(sum_of_products(factors), exact) < 1e-6
    monkeypatch.setattr(engine.models.wide_products, "has_wide_products", lambda device: False)
    assert relative_error(sum_of_products(factors), exact) > 1e-4  # each product is rounded


def test_a_total_is_changed_in_place(wide: None) -> None:
    (left, right), other = low_factors(2)
    total = add_product(None, left, right, WIDE)
    assert add_product(total, *other, WIDE) is total


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("device-side assert")])
def test_other_errors_of_a_product_are_raised(error: Exception, wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise error

    monkeypatch.setattr(torch, "addmm", fail)
    with pytest.raises(type(error), match=str(error)):
        sum_of_products(low_factors(2))


def test_copies_have_rows_of_zeros_on_a_gpu_only(wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(VOCABULARY, 8)
    copy = copy_for_products(weight, LOW)
    assert copy.shape == (64, 8) and torch.equal(copy[:VOCABULARY], weight.to(LOW)) and not copy[VOCABULARY:].any()
    assert copy_for_products(copy, LOW).data_ptr() == copy.data_ptr()  # 64 rows need no copy
    monkeypatch.setattr(engine.models.wide_products, "has_wide_products", lambda device: False)
    assert copy_for_products(weight, LOW).shape == weight.shape


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [WIDE, LOW], ids=str)
def test_the_head_with_wide_products_equals_the_plain_head(
    dtype: torch.dtype, bias: bool, wide: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of 61 in rows of 64, in several chunks."""
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_TOKENS", 9)
    monkeypatch.setattr(engine.step.logprobs, "CHUNK_LOGITS", {"cpu": 1})
    batch = lay_out(pair_examples())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.num_tokens, 32, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, 32, generator=generator).to(LOW).float()
    offset = torch.randn(VOCABULARY, generator=generator) if bias else None

    def run(head: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, offset) if tensor is not None]
        loss, logps = head(
            *(leaves if bias else [*leaves, None]), batch, lambda logps, span: (0.1 * logps).sigmoid().sum()
        )
        loss.backward()
        return logps, [leaf.grad for leaf in leaves if leaf.grad is not None]

    logps, gradients = run(chunked_head)
    plain_logps, plain_gradients = run(plain_head)
    torch.testing.assert_close(logps, plain_logps, rtol=1e-5, atol=1e-5)
    assert len(gradients) == 2 + bias
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        # In low dtype, factors of the products are rounded to it.
        assert relative_error(ours, plain.double()) < (1e-5 if dtype == WIDE else 5e-3)


def test_large_gpus_take_larger_chunks() -> None:
    assert chunk_logits("cuda", 24 * 10**9) == 2**26 and chunk_logits("cuda", 80 * 10**9) == 2**28
    assert chunk_logits("cpu", 10**12) == 2**22


# ---- The copy of the head's weight ----


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of all copies from now on."""
    copied = []

    def copy(weight: Tensor, dtype: torch.dtype, thresholds: Thresholds | None = None) -> Tensor:
        copied.append(weight)
        return copy_for_products(weight, dtype, thresholds)

    for module in (engine.models.precision, engine.step.logprobs):
        monkeypatch.setattr(module, "copy_for_products", copy)
    return copied


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2 with tied embeddings
def test_the_head_is_cast_once_for_all_microbatches(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture)
    head = model.get_output_embeddings()
    model.set_attn_implementation("eager")
    batch = lay_out(pair_examples())
    batch.segments = None
    copied = count_copies(monkeypatch)

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        head.weight.grad = None
        loss, _ = run_head(model, batch, lambda logps, span: logps.sum())
        loss.backward()
        assert head.weight.grad is not None
        return loss.detach(), head.weight.grad.clone()

    with run_in_dtype(model, LOW):
        first = loss_and_gradient()
        with torch.no_grad(), run_in_dtype(model, LOW):  # as of a reference that shares the policy's weights
            response_logps(model, batch)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(loss_and_gradient(), first, strict=True))
    assert len(copied) == 1 and not hasattr(head, "low_weight")
    with torch.no_grad():
        head.weight.mul_(1.5)  # an optimizer's step
    with run_in_dtype(model, LOW):
        found = loss_and_gradient()
        del head.low_weight  # the head makes its own
        expected = loss_and_gradient()
        head.low_weight = None, None
    assert not torch.equal(found[0], first[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_copy_of_another_weight_is_not_used() -> None:
    head = tiny_model("llama").get_output_embeddings()
    with engine.models.precision.low_weight_in(head, LOW, is_trained=True):
        kept = low_weight(head, LOW)
        assert kept is not None and low_weight(head, LOW) is kept and low_weight(head, torch.float16) is not kept
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        assert low_weight(head, LOW) is not kept


@pytest.mark.parametrize("takes_low", [False, True])
def test_without_gradients_a_cpu_copies_where_its_products_take_the_copy(
    takes_low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.models.precision, "takes_low_weight", lambda device, dtype: takes_low)
    model = tiny_model("llama")
    copied = count_copies(monkeypatch)
    with torch.no_grad(), run_in_dtype(model, LOW):
        assert (low_weight(model.get_output_embeddings(), LOW) is not None) == takes_low
    with run_in_dtype(model.requires_grad_(False), LOW):
        assert bool(copied) == takes_low


# ---- A CPU with matrix units ----


@pytest.fixture
def low_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the head's products from its bf16 copy, as a CPU with matrix units does."""
    for module in (engine.models.precision, engine.step.logprobs):
        monkeypatch.setattr(module, "takes_low_weight", lambda device, dtype: dtype == LOW)


def test_products_of_a_cpu_are_exact_for_bf16_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With matrix units and without, a part of the weight at a time."""
    monkeypatch.setattr(engine.models.wide_products, "BLOCK", 48)
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(size, 96, generator=generator).to(LOW) for size in (70, 130))
    out = torch.empty(70, 130)
    wide_product(inputs, weight, out)
    assert relative_error(out, inputs.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_only_the_products_of_the_head_may_round(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        engine.models.wide_products.cpu_rounds_products.cache_clear()
        engine.models.wide_products.cpu_rounds_products()
        assert torch.get_float32_matmul_precision() == precision
        if precision == "highest":
            values = torch.full((64, 64), 1 + 2**-10)
            assert torch.equal(values @ torch.eye(64), values)
        with pytest.raises(RuntimeError):
            wide_product(torch.ones(2, 3).to(LOW), torch.ones(4, 5).to(LOW), torch.empty(2, 4))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_low_head_equals_its_rounded_weights(low_head: None) -> None:
    """Log-probs are those of fp32 products with weights rounded by thresholds, not of logits rounded to bf16."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    batch = lay_out(pair_examples())
    batch.segments = None
    head = model.get_output_embeddings()
    rounded = round_by(head.weight.detach(), weight_thresholds(HEAD, head.weight)).float()
    assert not torch.equal(rounded, head.weight.to(LOW).float())
    with torch.no_grad(), run_in_dtype(model, LOW):
        found = response_logps(model, batch)
        output = model.base_model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        _, logps = plain_head(output.last_hidden_state[0], rounded, None, batch, lambda logps, span: logps.sum())
    torch.testing.assert_close(found, sum_by_response(logps, batch.response_lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2 with tied embeddings
def test_a_tiny_step_makes_no_leap_in_the_low_head(
    architecture: str, low_head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights stored in fp16 often lie halfway between two values of bf16: to the nearest, a tiny step tips them."""
    batch = lay_out(pair_examples())
    batch.segments = None

    def moved(dtype: torch.dtype | None) -> float:
        """How far the log-probs move when the head moves along their gradient."""
        model = tiny_model(architecture)
        model.set_attn_implementation("eager")
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            head.copy_(head.half())

        def total() -> float:
            with torch.no_grad(), run_in_dtype(model, dtype):
                return response_logps(model, batch).double().sum().item()

        before = total()
        run_head(model, batch, lambda logps, span: logps.sum())[0].backward()
        with torch.no_grad():
            head += 1e-7 * head.grad.sign()
        return total() - before

    exact = moved(None)
    assert abs(moved(LOW) - exact) < 0.02
    monkeypatch.setattr(engine.models.precision, "has_thresholds", lambda values, dtype: False)
    assert moved(LOW) > 0.05


# ---- Gradients of hidden states ----


@pytest.mark.parametrize("examples", [pair_examples(), random_examples([(3, 1), (4, 2)]), random_examples([(2, 1, 1)])])
def test_gradients_of_shared_positions_equal_index_add(examples: list) -> None:
    """Bitwise, as sums of a prompt's responses are in their order."""
    batch = lay_out(examples)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(len(batch.targets), 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(batch.num_tokens, 8, dtype=torch.float64)
    expected = torch.zeros_like(hidden).index_add_(0, batch.predict_index, grad)
    assert torch.equal(scatter_selected(grad, hidden, batch), expected)


def test_low_gradients_of_shared_positions_are_summed_in_fp32() -> None:
    batch = lay_out(random_examples([(2, 3, 4, 5, 6, 7, 8, 9)]))
    grad = torch.full((len(batch.targets), 1), 1 / 512, dtype=LOW)
    first = batch.response_lengths.cumsum(0) - batch.response_lengths
    grad[first[0]] = 1
    hidden = torch.zeros(batch.num_tokens, 1, dtype=LOW)
    # 1 + 6 / 512, rounded. Added one by one in bf16, each 1 / 512 would vanish.
    assert scatter_selected(grad, hidden, batch)[1].item() == 1 + 2**-6


def test_no_response_shares_a_position_but_of_its_prompt() -> None:
    """Its first target alone may share its position: scatter_selected() relies on it."""
    batch = lay_out(pair_examples())
    first = batch.response_lengths.cumsum(0) - batch.response_lengths
    others = torch.ones(len(batch.targets), dtype=torch.bool)
    others[first] = False
    rest = batch.predict_index[others]
    assert len(rest.unique()) == len(rest) and not torch.isin(rest, batch.predict_index[first]).any()
    assert batch.num_responses.sum() == len(batch.response_lengths)
    assert sum_by_response(torch.ones(len(batch.targets)), batch.response_lengths).tolist() == [
        float(length) for length in batch.response_lengths
    ]
