"""GPU kernels of packed attention, with plain kernels of the same signatures in their place."""

import copy
import random
from collections.abc import Iterator
from functools import partial
from inspect import signature
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

import engine.step.attention
from engine.models.layers import find_layers
from engine.placement.placement import Placement
from engine.step.attention import Segments, choose_kernel, packed, packed_varlen, register_packed_attention
from engine.step.attention_kernels import (
    VariableLengths,
    efficient_attention,
    efficient_runs,
    flash_runs,
    gather_keys,
    plain_gather_keys,
    takes_gqa,
)
from engine.step.layout import lay_out
from tests.models import random_examples, tiny_model
from tests.test_attention import GROUPS, HEADS, SCALING, by_blocks, by_varlen, dense, plain_varlen_attn, run, states

CPU = torch.device("cpu")
V100, T4, A100, A10, H100, RTX5090 = (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)


# ---- The kernels' plain twins ----


def varlen_attn_of_torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert scale is not None
    arguments = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return plain_varlen_attn(*arguments, scale=scale, window_size=window_size, enable_gqa=True)


def branch_weights(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Per branch: its queries, its keys and the masked scores, [heads, queries, keys]."""
    for rows, columns in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        queries, keys = query[0, slice(*rows)], key[0, slice(*columns)]
        distance = torch.arange(len(keys) - len(queries), len(keys))[:, None] - torch.arange(len(keys))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        yield slice(*rows), slice(*columns), scores.masked_fill(distance < 0, -torch.inf)


def plain_efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Tensor | None = None,
    window_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Log-sum-exps are padded to [branches, heads, a multiple of 32], as the kernel does."""
    assert cu_seqlens_q is not None and cu_seqlens_k is not None and scale is not None
    assert max_seqlen_q is not None and max_seqlen_k is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert bias is None and dropout_p == 0 and custom_mask_type == 2 and compute_log_sumexp
    assert seqlen_k is None and window_size is None
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    output = torch.empty_like(query)
    logsumexp = torch.full((len(cu_seqlens_q) - 1, query.shape[2], -(-max_seqlen_q // 32) * 32), torch.inf).to(query)
    branches = branch_weights(query, key, cu_seqlens_q, cu_seqlens_k, scale)
    for index, (rows, columns, scores) in enumerate(branches):
        assert scores.shape[1] <= max_seqlen_q and scores.shape[2] <= max_seqlen_k
        output[0, rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[0, columns])
        logsumexp[index, :, : scores.shape[1]] = scores.logsumexp(-1)
    seed, offset = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    return output, logsumexp, seed, offset, max_seqlen_q, max_seqlen_k


def plain_efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    num_splits_key: int | None = None,
    window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert cu_seqlens_q is not None and cu_seqlens_k is not None and scale is not None
    assert bias is None and dropout_p == 0 and custom_mask_type == 2 and not bias_requires_grad
    assert window_size is None and not shared_storage_dqdkdv
    # With num_splits_key unset, the kernel may give other bits in each run.
    assert num_splits_key == (1 if torch.are_deterministic_algorithms_enabled() else None)
    assert grad_out_.shape == out.shape == query.shape
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    delta = (grad_out_ * out).sum(-1)[0].T  # [heads, queries]
    branches = branch_weights(query, key, cu_seqlens_q, cu_seqlens_k, scale)
    for index, (rows, columns, scores) in enumerate(branches):
        weights = (scores - logsumexp[index, :, : scores.shape[1], None]).exp()
        grad_weights = torch.einsum("qhd,khd->hqk", grad_out_[0, rows], value[0, columns])
        grad_scores = weights * (grad_weights - delta[:, rows, None]) * scale
        grads[0][0, rows] = torch.einsum("hqk,khd->qhd", grad_scores, key[0, columns])
        grads[1][0, columns] = torch.einsum("hqk,qhd->khd", grad_scores, query[0, rows])
        grads[2][0, columns] = torch.einsum("hqk,qhd->khd", weights, grad_out_[0, rows])
    return *grads, torch.empty(())


plain_efficient_attention = partial(
    efficient_attention, forward=plain_efficient_forward, backward=plain_efficient_backward
)


def by_efficient(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    assert window is None
    return plain_efficient_attention(query, key, value, Segments(GROUPS).varlen(CPU), SCALING)


def on_meta(lengths: VariableLengths) -> VariableLengths:
    tensors = {name: value.to("meta") for name, value in vars(lengths).items() if isinstance(value, Tensor)}
    return VariableLengths(**{**vars(lengths), **tensors})


# ---- Flash ----


@pytest.mark.parametrize("kernel", [plain_varlen_attn, varlen_attn_of_torch_2_11])
@pytest.mark.parametrize("num_key_heads", [1, 2, HEADS])
@pytest.mark.parametrize("window", [None, 3])
def test_flash_is_called_as_its_version_asks(kernel: Any, num_key_heads: int, window: int | None) -> None:
    def by_kernel(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        return packed_varlen(query, key, value, Segments(GROUPS), SCALING, window, kernel=kernel)

    tensors = states(num_key_heads, torch.float64)
    for ours, truth in zip(run(by_kernel, tensors, window), run(dense, tensors, window), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_installed_varlen_attn_takes_the_call() -> None:
    """The one of torch, on tensors without data."""
    query, key = torch.empty(HEADS, 4, 8, device="meta"), torch.empty(2, 4, 8, device="meta")
    segments = Segments([(2, 1, 1)])
    segments._varlen[query.device] = on_meta(segments.varlen(CPU))
    assert packed_varlen(query, key, key, segments, SCALING, 2).shape == (4, HEADS, 8)
    assert takes_gqa(varlen_attn) == ("enable_gqa" in signature(varlen_attn).parameters)


@pytest.mark.parametrize(
    "capability, head_dim, dtype, runs",
    [
        (H100, 128, torch.bfloat16, True),
        (A100, 80, torch.float16, True),
        (RTX5090, 256, torch.bfloat16, True),
        (T4, 64, torch.float16, False),
        (H100, 64, torch.float32, False),
        (H100, 36, torch.bfloat16, False),
        (H100, 264, torch.bfloat16, False),
        (H100, 224, torch.bfloat16, True),
        (A10, 224, torch.bfloat16, False),
        (RTX5090, 200, torch.bfloat16, False),
    ],
)
def test_flash_runs(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, runs: bool) -> None:
    assert flash_runs(capability, head_dim, dtype) == runs


# ---- Gathered keys ----


def random_groups(generator: random.Random) -> list[list[int]]:
    """One to nine responses, each of one token (0 fed) at times."""
    return [
        [generator.randint(1, 6), *(generator.choice([0, 0, 1, 2, 5]) for _ in range(generator.randint(1, 9)))]
        for _ in range(generator.randint(1, 5))
    ]


def gather_case(seed: int, dtype: torch.dtype) -> tuple[VariableLengths, Tensor, Tensor, Tensor, Tensor]:
    """Lengths, key, value, and gradients of the gathered key and value."""
    groups = random_groups(random.Random(seed))
    lengths = Segments(groups).varlen(CPU)
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_keys = sum(map(sum, groups)), len(lengths.key_index)

    def tensor(rows: int) -> Tensor:
        return torch.randn(rows, 2, 4, generator=generator, dtype=torch.float64).to(dtype)

    return lengths, tensor(num_tokens), tensor(num_tokens), tensor(num_keys), tensor(num_keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_gathered_keys_have_the_gradient_of_an_index(seed: int, dtype: torch.dtype) -> None:
    """Bitwise: index_put_ adds copies in their order too."""
    lengths, key, value, *grads = gather_case(seed, dtype)
    states = key.requires_grad_(), value.requires_grad_()
    ours, truths = gather_keys(*states, lengths), plain_gather_keys(*states, lengths)
    for our, truth in zip(
        (*ours, *torch.autograd.grad(ours, states, grads)),
        (*truths, *torch.autograd.grad(truths, states, grads)),
        strict=True,
    ):
        assert torch.equal(our, truth)
    total = torch.zeros_like(key).index_put_((lengths.key_index,), grads[0], accumulate=True)
    assert torch.equal(torch.autograd.grad(gather_keys(*states, lengths)[0], key, grads[0])[0], total)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_bfloat16_keys_round_once(seed: int) -> None:
    lengths, key, value, *grads = gather_case(seed, torch.bfloat16)
    states = key.requires_grad_(), value.requires_grad_()
    ours = torch.autograd.grad(gather_keys(*states, lengths), states, grads)
    for our, grad in zip(ours, grads, strict=True):
        total = torch.zeros(key.shape).index_put_((lengths.key_index,), grad.float(), accumulate=True)
        assert torch.equal(our, total.bfloat16())


def test_gathered_keys_are_summed_without_a_sort_or_a_race() -> None:
    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.overloadpacket.__name__)
            if func.overloadpacket.__name__ == "index_add_":
                assert len(args[2].unique()) == len(args[2])  # no row twice
            return func(*args, **(kwargs or {}))

    tensors = states(2, torch.float64)
    with Operations() as operations:
        run(by_varlen, tensors, None)
    assert operations.names.count("index_add_") == 2 * 3  # key and value; the second, third and fourth response
    assert not {"index_put", "index_put_", "_index_put_impl_"} & set(operations.names)


def test_copies_by_hand() -> None:
    """The keys P P r | P P s | P P t | Q u of the row P P r s t | Q u."""
    lengths = Segments([(2, 1, 1, 0, 1), (1, 1)]).varlen(CPU)
    assert lengths.first_copies.tolist() == [0, 1, 2, 5, 8, 9, 10]
    assert lengths.repeat_rows.tolist() == [0, 1, 0, 1]
    assert lengths.repeat_copies.tolist() == [3, 4, 6, 7]
    assert lengths.repeat_sizes.tolist() == [2, 2]


# ---- Memory-efficient attention ----


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_key_heads", [1, 2, HEADS])
def test_efficient_attention_matches_the_dense_mask(
    num_key_heads: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    tensors = states(num_key_heads, torch.float64)
    for ours, truth in zip(run(by_efficient, tensors, None), run(dense, tensors, None), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "plain, kernel",
    [
        (plain_efficient_forward, torch.ops.aten._efficient_attention_forward),
        (plain_efficient_backward, torch.ops.aten._efficient_attention_backward),
    ],
)
def test_plain_efficient_kernels_have_the_signature_of_torch(plain: Any, kernel: Any) -> None:
    arguments = kernel.default._schema.arguments
    parameters = signature(plain).parameters.values()
    ours = [(parameter.name, parameter.kind is parameter.KEYWORD_ONLY) for parameter in parameters]
    assert ours == [(argument.name, argument.kwarg_only) for argument in arguments]


def test_installed_efficient_attention_takes_the_call() -> None:
    """The forward kernel of torch, on tensors without data. Torch's own backward fails on those."""
    lengths = on_meta(Segments([(2, 1)]).varlen(CPU))
    query, key = torch.empty(HEADS, 3, 8, device="meta"), torch.empty(2, 3, 8, device="meta")
    assert efficient_attention(query, key, key, lengths, SCALING).shape == (3, HEADS, 8)


@pytest.mark.parametrize(
    "capability, head_dim, dtype, runs",
    [
        (H100, 80, torch.float32, True),
        (T4, 64, torch.float32, True),
        (H100, 36, torch.float32, True),
        (H100, 6, torch.float32, False),
        (H100, 36, torch.bfloat16, False),
        (H100, 512, torch.bfloat16, True),
        (T4, 64, torch.float16, True),
        (T4, 64, torch.bfloat16, False),
        (H100, 64, torch.float64, False),
        ((13, 0), 64, torch.float32, False),
    ],
)
def test_efficient_runs(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, runs: bool) -> None:
    assert efficient_runs(capability, head_dim, dtype) == runs


# ---- torch.compile ----


@torch.library.custom_op("tests::varlen_attn", mutates_args=())
def varlen_operator(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    query, key, value = (tensor[None].contiguous() for tensor in (query, key, value))
    output, logsumexp, *_ = plain_efficient_forward(
        query, key, value, None, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, 2, compute_log_sumexp=True, scale=scale
    )
    return output[0], logsumexp


@varlen_operator.register_fake
def _(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale):
    logsumexp = query.new_empty(cu_seq_q.shape[0] - 1, query.shape[1], (max_q + 31) // 32 * 32)
    return query.new_empty(query.shape), logsumexp


@torch.library.custom_op("tests::varlen_attn_backward", mutates_args=())
def varlen_backward_operator(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = key.shape[1], query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shape[1], dim=1) for tensor in (key, value))
    query, key, value = (tensor[None].contiguous() for tensor in (query, key, value))
    none = torch.empty(())
    grad_query, *grads, _ = plain_efficient_backward(
        grad[None], query, key, value, None, output[None], cu_seq_q, cu_seq_k, max_q, max_k, logsumexp, 0.0, none, none,
        2, False, scale=scale,
    )  # fmt: skip
    grad_key, grad_value = (tensor[0].unflatten(1, shape).sum(2) for tensor in grads)
    return grad_query[0], grad_key, grad_value


@varlen_backward_operator.register_fake
def _(grad, query, key, value, *others):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.numbers = inputs[5:]


varlen_operator.register_autograd(
    lambda ctx, grad, _: (*varlen_backward_operator(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 5),
    setup_context=_save,
)


def varlen_attn_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    assert window_size == (-1, 0)
    return varlen_operator(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_layers_with_flash_compile_as_one_graph(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any lengths share few graphs. The kernel is plain, and graphs run without a code generator."""
    monkeypatch.setattr(packed_varlen, "__defaults__", (varlen_attn_operator,))
    register_packed_attention()
    graphs = CompileCounterWithBackend("aot_eager")
    model = tiny_model(architecture, torch.float64, num_hidden_layers=1)
    compiled = copy.deepcopy(model)
    compiled.set_attn_implementation("packed_compiled")
    model.set_attn_implementation("packed_dense")
    torch.compiler.reset()
    for layer in find_layers(compiled, None):
        layer.compile(dynamic=True, fullgraph=True, backend=graphs)
    for seed in range(5):
        generator = random.Random(seed)
        lengths = [(generator.randint(2, 9), *generator.choices(range(2, 9), k=1 + seed % 4)) for _ in range(2 + seed)]
        microbatch = lay_out(random_examples(lengths, seed))
        assert microbatch.segments is not None
        microbatch.segments.varlen(CPU)
        gradients = []
        for each in (model, compiled):
            each.zero_grad()
            output = each(
                input_ids=microbatch.input_ids,
                position_ids=microbatch.position_ids,
                segments=microbatch.segments,
                use_cache=False,
            )
            output.logits.square().sum().backward()
            gradients.append([output.logits.detach(), *(parameter.grad for parameter in each.parameters())])
        for ours, truth in zip(*reversed(gradients), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-8)
    assert graphs.frame_count <= 4  # one, two, and more responses are compiled apart


@pytest.mark.parametrize(
    "device, dtype, name",
    [
        ("cuda", torch.bfloat16, "packed_compiled"),
        ("cuda", None, "packed"),  # in fp32, which flash does not take
        ("cpu", torch.bfloat16, "packed"),
    ],
)
def test_compiled_models_of_a_gpu_switch_their_attention(
    device: str, dtype: torch.dtype | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.step.attention, "_capability", lambda device: H100)
    register_packed_attention()
    model = tiny_model("llama")
    model.set_attn_implementation("packed")
    settings = SimpleNamespace(compile=True, model=SimpleNamespace(block_name=None))
    placement: Any = SimpleNamespace(settings=settings, device=torch.device(device), mixed_precision=dtype)
    assert Placement.compile_layers(placement, model).config._attn_implementation == name


# ---- The choice ----


@pytest.mark.parametrize(
    "capability, head_dim, dtype, window, kernel",
    [
        (H100, 128, torch.bfloat16, None, "flash"),
        (H100, 128, torch.bfloat16, 3, "flash"),
        (H100, 128, torch.float32, None, "efficient"),
        (H100, 128, torch.float32, 3, "blocks"),
        (H100, 512, torch.bfloat16, None, "efficient"),
        (H100, 36, torch.bfloat16, None, "blocks"),
        (T4, 64, torch.float16, None, "efficient"),
        (T4, 64, torch.bfloat16, None, "blocks"),
        (V100, 64, torch.float32, None, "efficient"),
    ],
)
def test_kernel_of_a_gpu(
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    window: int | None,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.step.attention, "_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert choose_kernel(device, head_dim, dtype, window) == kernel
    monkeypatch.setattr(engine.step.attention, "GPU_KERNELS", ())
    assert choose_kernel(device, head_dim, dtype, window) == "blocks"


def test_kernel_of_a_cpu() -> None:
    assert choose_kernel(CPU, 128, torch.bfloat16, None) == "blocks"


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_packed_runs_the_chosen_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that hides no key is none."""
    seen: list[int | None] = []

    def choose(device: torch.device, head_dim: int, dtype: torch.dtype, window: int | None) -> str:
        seen.append(window)
        return kernel

    monkeypatch.setattr(engine.step.attention, "choose_kernel", choose)
    monkeypatch.setattr(engine.step.attention, "packed_varlen", partial(packed_varlen, kernel=plain_varlen_attn))
    monkeypatch.setattr(engine.step.attention, "efficient_attention", plain_efficient_attention)
    tensors = states(2, torch.float64)
    longest = max(branch.num_keys for branch in Segments(GROUPS).branches)
    for ours, truth in zip(run(by_blocks, tensors, longest), run(dense, tensors, longest), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    assert seen == [None]


def test_a_window_that_hides_a_key_stays() -> None:
    segments = Segments([(2, 1, 4)])
    assert [segments.effective_window(window) for window in (None, 5, 6, 7)] == [None, 5, None, None]


def test_errors_of_a_kernel_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel found to launch")

    monkeypatch.setattr(engine.step.attention, "choose_kernel", lambda *arguments: "efficient")
    monkeypatch.setattr(engine.step.attention, "efficient_attention", fail)
    query = torch.randn(1, HEADS, 3, 8)
    with pytest.raises(RuntimeError, match="no kernel found"):
        packed(torch.nn.Module(), query, query, query, None, segments=Segments([(2, 1)]))
